"""The latent's head at scale: mean of K samples, KL, entropy and packed bits in one pass over the parameters.

    family        what the composed form writes and reads again                      here
    bernoulli     K uniforms, K samples, p, per-bit entropies; its graph keeps them  one kernel each way
    gaussian      K normals, K samples, s                                            the same
    categorical   chances, sums of chances, K one-hot samples                        the same

Noise is a function of (key, row, dimension, sample): Philox4x32-10, four samples a call. Nothing of it is
stored; the backward pass draws it again where it needs it. `reference` is the same in plain torch.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.bits import pack
from lvssl.latents.categorical import Categorical
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.posterior import Posterior

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


class Draw(NamedTuple):
    sample: Tensor  # mean of the samples, as the projector takes them: [N, D]
    kl: Tensor  # nats, [N]
    entropy: Tensor  # nats, [N]
    packed: (
        Tensor  # the code's bits where they are the parameters' signs, uint8 [N, ceil(D / 8)]; else [N, 0]
    )


def fusible(family: type[Posterior]) -> bool:
    """Whether there is a kernel for this family's samples."""
    if issubclass(family, Gaussian):
        return True
    return issubclass(family, Bernoulli | Categorical) and not family.relaxed


def usable(family: type[Posterior], parameters: Tensor) -> bool:
    """Whether `draw` runs here: on a GPU with Triton; elsewhere the composed form is as good."""
    return parameters.is_cuda and fusible(family) and importlib.util.find_spec("triton") is not None


def draw(family: type[Posterior], parameters: Tensor, count: int, key: Tensor, rows: Tensor) -> Draw:
    """Sample, KL, entropy and bits by the kernel, differentiable (straight-through where discrete).

    Args:
        parameters: fp32 [N, parameter_count(D)], on a GPU with Triton.
        count: samples, of which the mean is wanted.
        key: int64 [1], drawn from the step's generator, on the device: the host never waits for it.
        rows: int64 [N] below 2^32, places in the whole batch: noise depends on them and not on the rank.
    """
    return Draw(*_Fused.apply(parameters, key, rows, family, count))


def reference(family: type[Posterior], parameters: Tensor, count: int, key: Tensor, rows: Tensor) -> Draw:
    """The same, composed of the posterior's own pieces and of the same noise."""
    posterior = family(parameters)
    kl, entropy = posterior.kl(), posterior.entropy()
    packed = pack(posterior.code()) if isinstance(posterior, Bernoulli) else pack(parameters[:, :0] > 0)
    if isinstance(posterior, Gaussian):
        noise = normals(key, rows, posterior.mu.shape[1], count).mean(dim=0)
        sample = posterior.mu + (0.5 * posterior.log_variance).exp() * noise
    elif isinstance(posterior, Bernoulli):
        p = posterior.logits.sigmoid()
        hard = (uniforms(key, rows, p.shape[1], count) < p).float().mean(dim=0)
        sample = 2 * (hard + p - p.detach()) - 1
    else:
        assert isinstance(posterior, Categorical)
        p = posterior.probabilities()
        drawn = uniforms(key, rows, p.shape[1], count)[..., None]
        chosen = (drawn >= p.detach().cumsum(dim=2)).sum(dim=3).clamp(max=p.shape[2] - 1)
        hard = torch.nn.functional.one_hot(chosen, p.shape[2]).float().mean(dim=0)
        sample = (hard + (p - p.detach())).flatten(1)
    return Draw(sample, kl, entropy, packed)


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


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, key: Tensor, rows: Tensor, family: type[Posterior], count: int
    ) -> tuple[Tensor, ...]:
        from lvssl.latents import fused_triton

        parameters = parameters.contiguous()
        ctx.save_for_backward(parameters, key, rows)
        ctx.family, ctx.count = family, count
        found = fused_triton.forward(family, parameters, key, rows, count)
        ctx.mark_non_differentiable(found[3])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        from lvssl.latents import fused_triton

        of_sample, of_kl, of_entropy = (slope.contiguous() for slope in slopes[:3])
        parameters, key, rows = ctx.saved_tensors
        grad = fused_triton.backward(
            ctx.family, parameters, key, rows, ctx.count, of_sample, of_kl, of_entropy
        )
        return grad, None, None, None, None
