"""Philox4x32-10 (Salmon et al. 2011), a counter-based generator, for compiled code."""

from numba import uint64

from pipelines.kernels.compiled import compiled


@compiled(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four counter words and two key words -> four uniform 32-bit words (as uint64)."""
    low = uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = uint64(c0) & low, uint64(c1) & low, uint64(c2) & low, uint64(c3) & low
    k0, k1 = uint64(k0) & low, uint64(k1) & low
    for _ in range(10):
        p0 = uint64(0xD2511F53) * c0
        p1 = uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> uint64(32)) ^ c3 ^ k1, p0 & low
        k0 = (k0 + uint64(0x9E3779B9)) & low
        k1 = (k1 + uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3
