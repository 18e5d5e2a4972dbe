"""Compiled loops that draw the numbers of `noise.py` on a CPU."""

import math

import numpy as np

from pipelines.kernels.compiled import compiled
from pipelines.kernels.philox import LOW, philox

UNIT = 2.0**-24
philox_compiled = compiled(inline="always")(philox)


@compiled()
def fill_uniforms(key: np.ndarray, rows: np.ndarray, stream: int, out: np.ndarray) -> None:
    """Write `noise.plain_uniforms` into `out`, float32 [count, N, D]."""
    k0, k1 = key[0] & LOW, (key[0] >> 32) & LOW
    unit = np.float32(UNIT)
    count, _, dim = out.shape
    for first in range(0, count, 4):
        for n in range(len(rows)):
            for d in range(dim):
                w0, w1, w2, w3 = philox_compiled(rows[n], d, first // 4, stream, k0, k1)
                out[first, n, d] = np.float32(w0 >> 8) * unit
                if first + 1 < count:
                    out[first + 1, n, d] = np.float32(w1 >> 8) * unit
                if first + 2 < count:
                    out[first + 2, n, d] = np.float32(w2 >> 8) * unit
                if first + 3 < count:
                    out[first + 3, n, d] = np.float32(w3 >> 8) * unit


@compiled()
def fill_log_gammas(
    key: np.ndarray, rows: np.ndarray, stream: int, proposals: int, shapes: np.ndarray, out: np.ndarray
) -> None:
    """Write `noise.plain_log_gammas` of shapes, float64 [N, D], into `out`, float64 [count, N, D]."""
    k0, k1 = key[0] & LOW, (key[0] >> 32) & LOW
    count, _, dim = out.shape
    for sample in range(count):
        for n in range(len(rows)):
            for d in range(dim):
                alpha = shapes[n, d]
                size = (alpha + 1 if alpha < 1 else alpha) - 1 / 3
                scale = 1 / math.sqrt(9 * size)
                found, boost = 0.0, 0.0
                for proposal in range(proposals):
                    w0, w1, w2, w3 = philox_compiled(rows[n], d, sample, stream + 256 * proposal, k0, k1)
                    if proposal == 0 and alpha < 1:
                        boost = math.log(1 - (w3 >> 8) * UNIT) / alpha
                    radius = math.sqrt(-2 * math.log(1 - (w0 >> 8) * UNIT))
                    x = radius * math.cos(2 * math.pi * ((w1 >> 8) * UNIT))
                    v = (1 + scale * x) ** 3
                    if v <= 0:
                        continue
                    log_v = math.log(v)
                    if math.log(1 - (w2 >> 8) * UNIT) < 0.5 * x * x + size * (1 - v + log_v):
                        found = log_v
                        break
                out[sample, n, d] = math.log(size) + found + boost
