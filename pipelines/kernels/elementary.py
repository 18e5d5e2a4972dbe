"""exp and log for compiled code, built from sums and products: the same bits on every processor.

The C library's functions differ in the last bit between processors (with and without fused multiply-add), and
so would pixels that depend on them.
"""

import math

import numpy as np

from pipelines.kernels.compiled import compiled

# ln 2 in two parts (fdlibm); the first ends in enough zeros to make its product with an exponent exact.
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
INVERSE_FACTORIALS = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
INVERSE_ODDS = tuple(1 / k for k in range(23, 0, -2))


@compiled()
def exp(x):
    """e^x for finite x below 709, float64, to within 2 units in the last place; 0 below -708."""
    if x < -708.0:
        return 0.0
    exponent = np.rint(x / math.log(2))
    rest = x - exponent * LN2_HIGH - exponent * LN2_LOW  # |rest| <= ln(2) / 2
    total = 0.0
    for factor in INVERSE_FACTORIALS:
        total = total * rest + factor
    return math.ldexp(total, int(exponent))


@compiled()
def log(x):
    """Natural logarithm of normal positive x, float64, to a relative error of 4e-16 (near 1: absolute)."""
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = 2 * mantissa, exponent - 1
    s = (mantissa - 1) / (mantissa + 1)  # log(mantissa) = 2 artanh(s), |s| <= 0.172
    square = s * s
    total = 0.0
    for factor in INVERSE_ODDS:
        total = total * square + factor
    return exponent * LN2_HIGH + (2 * s * total + exponent * LN2_LOW)
