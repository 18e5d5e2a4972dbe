"""Noise for samples: from a torch generator, or as a function of (key, row, dimension, sample)."""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


class Keyed(NamedTuple):
    """What stands in a generator's place where noise depends on an image's place in the batch alone.

    For families that draw once a sample; the numbers are fp32, whatever the parameters.
    """

    key: Tensor  # int64 [1]
    rows: Tensor  # int64 [N] below 2^32, places in the whole batch


Noise = Generator | Keyed | None  # None: torch's global generator


def uniform(shape: tuple[int, ...], like: Tensor, noise: Noise) -> Tensor:
    """In [0, 1), of the type and on the device of `like`; `shape` is [samples, N, ...]."""
    if isinstance(noise, Keyed):
        return uniforms(*noise, math.prod(shape[2:]), shape[0]).view(shape)
    return torch.rand(shape, generator=noise, device=like.device, dtype=like.dtype)


def normal(shape: tuple[int, ...], like: Tensor, noise: Noise) -> Tensor:
    """N(0, 1), likewise."""
    if isinstance(noise, Keyed):
        return normals(*noise, math.prod(shape[2:]), shape[0]).view(shape)
    return torch.randn(shape, generator=noise, device=like.device, dtype=like.dtype)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each counter (c0, c1, c2, 0) (Salmon et al. 2011); int64 in, int64 out."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The low 64 bits of a signed product are those of the unsigned one.
        a, b = c0 * ROUND_A, c2 * ROUND_B
        high_a, high_b = (a >> 32) & MASK, (b >> 32) & MASK
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, b & MASK, high_a ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + KEY_A) & MASK, (k1 + KEY_B) & MASK
    return c0, c1, c2, c3


def uniforms(key: Tensor, rows: Tensor, dim: int, count: int) -> Tensor:
    """Multiples of 2^-24 in [0, 1): fp32 [count, N, dim]. Sample k is word k % 4 of call k // 4."""
    dims = torch.arange(dim, device=rows.device)
    calls = torch.arange((count + 3) // 4, device=rows.device)
    words = philox(key, rows[None, :, None], dims[None, None], calls[:, None, None])
    stacked = torch.stack(words, dim=1).flatten(0, 1)[:count]
    return (stacked >> 8).float() * 2.0**-24


def normals(key: Tensor, rows: Tensor, dim: int, count: int) -> Tensor:
    """N(0, 1), fp32 [count, N, dim]: Box and Muller on the pairs of each call's words."""
    u = uniforms(key, rows, dim, 4 * ((count + 3) // 4)).unflatten(0, (-1, 2, 2))
    radius, angle = (-2 * (1 - u[:, :, 0]).log()).sqrt(), 2 * math.pi * u[:, :, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(0, 2)[:count]
