"""Philox4x32-10 (Salmon et al. 2011), a counter-based generator of random numbers, which has no state.

The same source serves plain Python, NumPy, torch and compiled code (`compiled(inline="always")(philox)`); it
imports none of them.
"""

LOW = 0xFFFFFFFF  # the low 32 bits
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(c0, c1, c2, c3, k0, k1):
    """Map four counter words and two key words to four uniform words in [0, 2^32).

    Each is an int, or an int64 number or tensor; tensors broadcast. Products of more than 63 bits wrap, and
    the low 64 bits of a signed product are those of the unsigned one.
    """
    for _ in range(10):
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c1, c2, c3 = (b >> 32) & LOW ^ c1 ^ k0, b & LOW, (a >> 32) & LOW ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + KEY_A) & LOW, (k1 + KEY_B) & LOW
    return c0, c1, c2, c3
