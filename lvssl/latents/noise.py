"""Noise for samples: a function of (key, row, dimension, sample, stream), the same on every device.

The random words come from Philox4x32-10 (Salmon et al. 2011), a counter-based generator. A rank draws the
numbers of its own rows alone, and the noise depends on (seed, step, row), but not on the rank or device.
Uniforms are multiples of 2^-24, the same bits everywhere; numbers computed from them agree up to rounding.
"""

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipelines.kernels.philox import LOW, philox

UNIT = 2.0**-24
# Keeps these keys apart from those of the augmentation, whose second word is the seed's upper half.
DOMAIN = 0x6E6F6973
STREAMS = 4  # independent draws that a family may make for one sample
# A proposal for a gamma variate is accepted with a probability of at least 0.951. All are rejected once in
# 10^15; the mode is then taken.
GAMMA_PROPOSALS = 12


class Noise(NamedTuple):
    """Key, rows and stream that determine a batch's noise."""

    key: Tensor  # int64 [1], the step's
    rows: Tensor  # int64 [N] below 2^32, the images' places in the whole batch
    stream: int = 0  # below 256; distinguishes draws for the same sample

    def halves(self) -> tuple[Tensor, Tensor]:
        """The key's two words."""
        return self.key & LOW, (self.key >> 32) & LOW

    def shifted(self, streams: int) -> "Noise":
        """Return the noise `streams` further on, which is independent of this one."""
        return self._replace(stream=self.stream + streams)


def keyed(seed: int, rows: int | Tensor, device: torch.device | str = "cpu") -> Noise:
    """Return the noise of a seed, for the first `rows` rows or for the given rows, [N]."""
    places = torch.arange(rows) if isinstance(rows, int) else rows
    return Noise(torch.tensor([key_of(seed)], device=device), places.to(device))


def key_of(seed: int, step: int = 0) -> int:
    """Return the key of a step as an int64, a different one for each seed and step below 2^32."""
    key = (step & LOW) | ((seed + DOMAIN) & LOW) << 32
    return key - 2**64 if key >= 2**63 else key


def rows_of(count: int, views: int, rank: int, ranks: int, device: torch.device) -> Tensor:
    """Return the places of a rank's images in the whole batch, int64 [count], an equal part of each view."""
    part = count // views
    first = torch.arange(part, device=device) + rank * part
    return torch.cat([first + view * ranks * part for view in range(views)])


def uniform(shape: tuple[int, ...], like: Tensor, noise: Noise) -> Tensor:
    """Draw from [0, 1), in the dtype of `like`; `shape` is [samples, N, ...]."""
    require_rows(noise, shape[1])
    return uniforms(noise, math.prod(shape[2:]), shape[0]).view(shape).to(like.dtype)


def normal(shape: tuple[int, ...], like: Tensor, noise: Noise) -> Tensor:
    """Draw from N(0, 1); arguments as for `uniform`."""
    require_rows(noise, shape[1])
    return normals(noise, math.prod(shape[2:]), shape[0], like.dtype).view(shape)


def require_rows(noise: Noise, count: int) -> None:
    """Raise ValueError unless the noise has a row for each image; compiled loops write one for each row."""
    if len(noise.rows) != count:
        raise ValueError(f"{count} images need noise of {count} rows, not {len(noise.rows)}")


def uniforms(noise: Noise, dim: int, count: int) -> Tensor:
    """Draw fp32 [count, N, dim] in [0, 1). Sample k is word k % 4 of call k // 4."""
    if not on_cpu(noise.rows):
        return plain_uniforms(noise, dim, count)
    from lvssl.latents.noise_compiled import fill_uniforms

    out = torch.empty(count, len(noise.rows), dim, dtype=torch.float32)
    fill_uniforms(noise.key.numpy(), noise.rows.numpy(), noise.stream, out.numpy())
    return out


def on_cpu(tensor: Tensor) -> bool:
    """Whether numba's loops can draw. Plain torch is for GPUs and for tensors without contents.

    The loops are imported on use: numba takes a while to load, and no GPU needs it.
    """
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def on_gpu(tensor: Tensor) -> bool:
    """Whether the Triton kernels can draw."""
    fake = isinstance(tensor, FakeTensor)
    return tensor.is_cuda and not fake and importlib.util.find_spec("triton") is not None


def plain_uniforms(noise: Noise, dim: int, count: int) -> Tensor:
    """`uniforms` in plain torch."""
    dims = torch.arange(dim, device=noise.rows.device)
    calls = torch.arange((count + 3) // 4, device=noise.rows.device)
    words = philox(noise.rows[None, :, None], dims, calls[:, None, None], noise.stream, *noise.halves())
    return (torch.stack(words, dim=1).flatten(0, 1)[:count] >> 8).float() * UNIT


def normals(noise: Noise, dim: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from N(0, 1), [count, N, dim], by Box-Muller on pairs of each call's words; none exceeds 5.8."""
    u = uniforms(noise, dim, 4 * ((count + 3) // 4)).to(dtype).unflatten(0, (-1, 2, 2))
    radius, angle = (-2 * (1 - u[:, :, 0]).log()).sqrt(), 2 * math.pi * u[:, :, 1]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(0, 2)
    return z[:count].clone() if count % 4 else z  # a view would keep all four in memory


def log_gammas(shapes: Tensor, count: int, noise: Noise) -> Tensor:
    """Draw the logarithms of Gamma(shape, 1) variates, fp64 [count, N, D], for shapes [N, D] above 0.

    Variates are drawn by rejection (Marsaglia & Tsang 2000), which takes the first accepted one of
    GAMMA_PROPOSALS proposals; proposal p of sample k is call k of the stream + 256 p. For a shape below 1,
    the variate of shape + 1 is multiplied by u^(1 / shape).
    """
    require_rows(noise, len(shapes))
    if on_gpu(shapes):
        from lvssl.latents import noise_triton

        there, rows = shapes.detach().contiguous(), noise.rows.contiguous()
        return noise_triton.log_gammas(there, count, noise.key, rows, noise.stream, GAMMA_PROPOSALS)
    if not on_cpu(shapes):
        return plain_log_gammas(shapes, count, noise)
    from lvssl.latents.noise_compiled import fill_log_gammas

    given = shapes.detach().double().contiguous().numpy()
    out = torch.empty(count, *shapes.shape, dtype=torch.float64)
    places = noise.rows.numpy()
    fill_log_gammas(noise.key.numpy(), places, noise.stream, GAMMA_PROPOSALS, given, out.numpy())
    return out


def plain_log_gammas(shapes: Tensor, count: int, noise: Noise) -> Tensor:
    """`log_gammas` in plain torch, with every proposal: stopping early would wait for the device."""
    alpha = shapes.detach().double()
    d = torch.where(alpha < 1, alpha + 1, alpha) - 1 / 3
    dims = torch.arange(shapes.shape[1], device=shapes.device)
    samples = torch.arange(count, device=shapes.device)[:, None, None]
    scale = (9 * d).rsqrt()
    found, boost, done = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(d, dtype=torch.bool)
    for proposal in range(GAMMA_PROPOSALS):
        stream = noise.stream + 256 * proposal
        words = philox(noise.rows[None, :, None], dims, samples, stream, *noise.halves())
        u0, u1, u2, u3 = (1 - (word >> 8).double() * UNIT for word in words)  # in (0, 1]
        x = (-2 * u0.log()).sqrt() * (2 * math.pi * (1 - u1)).cos()
        v = (1 + scale * x) ** 3
        log_v = v.clamp(min=1e-300).log()
        accepted = (v > 0) & (u2.log() < 0.5 * x * x + d * (1 - v + log_v))
        found = torch.where(accepted & ~done, log_v, found)
        done = done | accepted
        if not proposal:
            boost = torch.where(alpha < 1, u3.log() / alpha, 0.0)
    return d.log() + found + boost
