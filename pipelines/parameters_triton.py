"""The stream of `parameters.py` on a GPU, word for word: for kernels that draw what they need themselves.

Triton's own Philox4x32-10 with our counter: (index, index >> 32, epoch, view << 16 | block) under the seed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def uniforms(seed, epoch, index, view, block):
    """Four uniforms in [0, 1), multiples of 2^-24, of each index (int64): `pipelines.parameters.uniforms`.

    `seed` is uint64 or int64 with the same bits.
    """
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    third = low * 0 + epoch.to(tl.uint32)
    fourth = low * 0 + ((view << 16) | block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, fourth, n_rounds=10)
    unit: tl.constexpr = 1.0 / 16777216.0
    return (
        (w0 >> 8).to(tl.float32) * unit,
        (w1 >> 8).to(tl.float32) * unit,
        (w2 >> 8).to(tl.float32) * unit,
        (w3 >> 8).to(tl.float32) * unit,
    )


@triton.jit
def _draw(seed, epoch, indices, block, out, count, VIEWS: tl.constexpr, BLOCK: tl.constexpr):
    view = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = row < count
    index = tl.load(indices + row, mask=within, other=0)
    place = out + (row * VIEWS + view) * 4
    u0, u1, u2, u3 = uniforms(seed, epoch, index, view, block)
    tl.store(place, u0, mask=within)
    tl.store(place + 1, u1, mask=within)
    tl.store(place + 2, u2, mask=within)
    tl.store(place + 3, u3, mask=within)


def draw_uniforms(seed: int, epoch: int, indices: Tensor, block: int, views: int = 2) -> Tensor:
    """float32 [B, views, 4] of indices int64 [B], on their device; seed in [0, 2^64), epoch in [0, 2^32)."""
    out = torch.empty((len(indices), views, 4), device=indices.device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    keys = torch.tensor([signed, epoch, block], dtype=torch.int64, device=indices.device)
    grid = (triton.cdiv(len(indices), 256), views)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which may be another
        _draw_from[grid](keys, indices, out, len(indices), views, 256)
    return out


@triton.jit
def _draw_from(keys, indices, out, count, VIEWS: tl.constexpr, BLOCK: tl.constexpr):
    """From memory: as an argument, an integer of 1 or of over 31 bits would compile another kernel."""
    _draw(tl.load(keys), tl.load(keys + 1), indices, tl.load(keys + 2), out, count, VIEWS, BLOCK)
