"""`noise.log_gammas` on a GPU in one launch, which stops once a proposal for each variate is accepted. Plain
torch computes all proposals, in some 1,500 launches. Tested in Triton's interpreter; not run on a GPU yet.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(2.0**-24)
THIRD = tl.constexpr(1 / 3)
TAU = tl.constexpr(2 * math.pi)
BLOCK = 128  # variates per program, one per thread


@triton.jit
def _uniform(word):
    """A uniform in (0, 1]."""
    return 1 - (word >> 8).to(tl.float64) * UNIT


@triton.jit
def _cosine(u):
    """cos of u turns, u in [0, 1], by the Taylor series about the nearest multiple of a quarter turn. The
    GPU's own takes any angle, for which it keeps a table in memory."""
    quarter = (u * 4 + 0.5).to(tl.int32)
    r = (u - quarter.to(tl.float64) * 0.25) * TAU
    square = r * r
    cosine, sine = square * 0 + 1, square * 0 + 1  # sum of (-1)^k r^2k / (2k)!, and of sin(r) / r
    for k in tl.static_range(9, 0, -1):
        cosine = 1 - cosine * square * (1 / (2 * k * (2 * k - 1)))
        sine = 1 - sine * square * (1 / (2 * k * (2 * k + 1)))
    found = tl.where(quarter % 2 == 0, cosine, -sine * r)
    return tl.where((quarter & 3) >= 2, -found, found)


@triton.jit
def log_gammas_kernel(shapes, keys, rows, out, size, D, stream, PROPOSALS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1)
    inside = at < size
    key = tl.load(keys)
    row = tl.load(rows + at // D, inside, other=0).to(tl.uint32)
    column = (at % D).to(tl.uint32)
    zero = column * 0
    alpha = tl.load(shapes + at, inside, other=1.0).to(tl.float64)
    small = alpha < 1
    d = tl.where(small, alpha + 1, alpha) - THIRD
    scale = 1 / tl.sqrt(9 * d)
    found, boost = alpha * 0, alpha * 0
    waiting = inside
    proposal = 0
    while (proposal < PROPOSALS) & (tl.sum(waiting.to(tl.int32)) > 0):
        w0, w1, w2, w3 = tl.philox(
            key, row, column, zero + sample, zero + stream + 256 * proposal, n_rounds=10
        )
        x = tl.sqrt(-2 * tl.log(_uniform(w0))) * _cosine(1 - _uniform(w1))
        v = 1 + scale * x
        v = v * v * v
        log_v = tl.log(tl.maximum(v, 1e-300))
        accepted = (v > 0) & (tl.log(_uniform(w2)) < 0.5 * x * x + d * (1 - v + log_v))
        found = tl.where(accepted & waiting, log_v, found)
        waiting = waiting & (accepted == 0)
        if proposal == 0:
            boost = tl.where(small, tl.log(_uniform(w3)) / alpha, 0.0)
        proposal += 1
    tl.store(out + sample.to(tl.int64) * size + at, tl.log(d) + found + boost, inside)


def log_gammas(shapes: Tensor, count: int, key: Tensor, rows: Tensor, stream: int, proposals: int) -> Tensor:
    """Return fp64 [count, N, D] for shapes [N, D] and rows int64 [N], both contiguous."""
    out = torch.empty(count, *shapes.shape, dtype=torch.float64, device=shapes.device)
    size = shapes.numel()
    if out.numel():
        with torch.cuda.device_of(shapes):  # Triton launches on the current device, which may be another
            log_gammas_kernel[triton.cdiv(size, BLOCK), count](
                shapes, key, rows, out, size, shapes.shape[1], stream, PROPOSALS=proposals, BLOCK=BLOCK
            )
    return out
