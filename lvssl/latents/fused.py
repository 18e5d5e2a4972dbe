"""The latent head at scale: mean of K samples, KL, entropy and packed bits in one pass over the parameters.

    family        what plain torch writes and reads again                            here
    bernoulli     K uniforms, K samples, p, per-bit entropies; its graph keeps them  one kernel per pass
    gaussian      K normals, K samples, s                                            the same
    categorical   probabilities, cumulative probabilities, K one-hot samples         the same

The noise is a function of (key, row, dimension, sample): Philox4x32-10, four samples per call. It isn't
stored; the backward pass draws it again where it needs it. `reference` computes the same in plain torch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvssl.latents.bits import pack
from lvssl.latents.noise import Noise, on_gpu
from lvssl.latents.posterior import Family, refuse_second_derivatives


class Draw(NamedTuple):
    sample: Tensor  # mean of the samples, as the projector takes them: [N, D]
    kl: Tensor  # nats, [N]
    entropy: Tensor  # nats, [N]
    packed: Tensor  # the code's bits where these are the parameters' signs, uint8 [N, bytes]; else [N, 0]


def usable(family: Family, parameters: Tensor) -> bool:
    """Whether `draw` can run: on a GPU with Triton. Elsewhere plain torch is as good."""
    return family.fused and on_gpu(parameters)


def draw(family: Family, parameters: Tensor, count: int, key: Tensor, rows: Tensor) -> Draw:
    """Compute sample, KL, entropy and bits in the kernel, differentiably (straight-through where discrete).

    Args:
        parameters: fp32 [N, parameter_count(D)], on a GPU with Triton.
        count: number of samples to average.
        key: int64 [1], the step's key, on the device, so that the host never waits for it.
        rows: int64 [N] below 2^32, places in the whole batch; the noise depends on them and not on the rank.
    """
    return Draw(*_Fused.apply(parameters, key, rows, family, count))


def reference(family: Family, parameters: Tensor, count: int, key: Tensor, rows: Tensor) -> Draw:
    """Compute the same with the posterior's own sampler, on the same noise."""
    posterior = family.posterior(parameters)
    sample = posterior.sample(count, Noise(key, rows)).mean(dim=0)
    packed = pack(posterior.code() if family.signs else posterior.code()[:, :0])
    return Draw(sample, posterior.kl(), posterior.entropy(), packed)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, key: Tensor, rows: Tensor, family: Family, count: int
    ) -> tuple[Tensor, ...]:
        from lvssl.latents import fused_triton

        parameters = parameters.contiguous()
        ctx.save_for_backward(parameters, key, rows)
        ctx.family, ctx.count = family, count
        found = fused_triton.forward(family, parameters, key, rows, count)
        ctx.mark_non_differentiable(found[3])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a fused sample")
        from lvssl.latents import fused_triton

        of_sample, of_kl, of_entropy = (grad.contiguous() for grad in grads[:3])
        parameters, key, rows = ctx.saved_tensors
        grad = fused_triton.backward(
            ctx.family, parameters, key, rows, ctx.count, of_sample, of_kl, of_entropy
        )
        return grad, None, None, None, None
