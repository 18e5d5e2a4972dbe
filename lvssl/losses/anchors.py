"""What contrastive losses are made of: for each anchor, its log-sum-exp over the others and its positive.

Vectors enter as v_i = a_i x_i with factors a_i = 1 / (|x_i| sqrt(temperature)), so that a logit is v_i . v_j:

    denominator_i = log sum_{j != i} exp(v_i . v_j)        positive_i = v_i . v_i'      (i': i's other view)

The gradient of the denominators, weighted with g, needs nothing but a second pass over the logits:

    d/dv_i = sum_j (g_i exp(v_i . v_j - denominator_i) + g_j exp(v_i . v_j - denominator_j)) v_j

where each row reads the denominators of the others instead of sending gradients to them: no atomics, and with
several ranks no exchange beyond the vectors themselves. The temperature's gradient costs no pass at all: a
denominator is a function of v_i . v_j alone, so d/d(1/temperature) = sum_i v_i . d/dv_i * temperature / 2.
"""

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvssl.losses import chunked, distributed
from lvssl.losses.block import Block, Weighed

EPS = 1e-12  # a vector up to this long has no direction
LONGEST_ON_TRITON = 512  # numbers a vector; its kernels keep whole vectors on the chip


def anchors(
    projections: Tensor, temperature: float | Tensor, counts: list[int], decoupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Denominators and positives [2B], differentiable, of this rank's anchors among those of all ranks.

    Args:
        projections: [2B, d] as for `ntxent`; checked by the caller.
        temperature: above 0, a float or a tensor with one element.
        counts: vectors of each rank.
        decoupled: leave the positive out of its anchor's denominator too (Yeh et al. 2022).
    """
    if not isinstance(temperature, Tensor):
        kind = torch.float64 if projections.dtype == torch.float64 else torch.float32
        temperature = torch.full((), temperature, dtype=kind, device=projections.device)
    return _apply(projections, temperature, counts, decoupled)


@torch.compiler.disable  # a loop over tiles: traced, it would be unrolled
def _apply(
    projections: Tensor, temperature: Tensor, counts: list[int], decoupled: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(projections.device.type, enabled=False):
        return Anchors.apply(projections, temperature, counts, decoupled)


class Anchors(torch.autograd.Function):
    """(projections [2B, d], temperature) -> denominators, positives [2B]."""

    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, temperature: Tensor, counts: list[int], decoupled: bool
    ) -> tuple[Tensor, Tensor]:
        x = projections.contiguous()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = (1 / temperature.reshape(()).to(x.device, wide)).sqrt()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        factors = torch.where(norms > EPS, scale / norms.clamp(min=EPS), 0.0)

        block = Block(x, factors)
        engine = engine_of(x)
        half = len(x) // 2
        excluded = (0, half, -half) if decoupled else (0,)
        bound = logit_bound(temperature)
        remote = distributed.remote_blocks(block, counts)
        denominators = engine.log_sum_exp(block, block, excluded, bound)
        for other in remote:
            denominators = torch.logaddexp(denominators, engine.log_sum_exp(block, other, (), bound))
        v = block.vectors()
        positives = torch.linalg.vecdot(v[:half], v[half:]).repeat(2)

        ctx.save_for_backward(x, factors, denominators, temperature)
        ctx.excluded, ctx.bound, ctx.counts = excluded, bound, counts
        return denominators, positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor, positive_weights: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, denominators, temperature = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            block = Weighed(x, factors, denominators, weights.contiguous())
            engine = engine_of(x)
            remote = distributed.remote_blocks(block, ctx.counts)
            grad = engine.gradient(block, block, ctx.excluded, ctx.bound)  # d/dv, [2B, d]
            for other in remote:
                grad += engine.gradient(block, other, (), ctx.bound)

            v = block.vectors()
            half = len(x) // 2
            pairs = (positive_weights[:half] + positive_weights[half:])[:, None]
            grad[:half].addcmul_(pairs, v[half:])
            grad[half:].addcmul_(pairs, v[:half])

            # v depends on x through its direction alone: what lies along v falls away, and is temperature's.
            along = torch.linalg.vecdot(v, grad)
            of_temperature = None
            if ctx.needs_input_grad[1]:
                of_temperature = (-along.sum() / (2 * temperature)).to(temperature).reshape(temperature.shape)
            grad.addcmul_(
                v, (along * temperature.reshape(()).to(v))[:, None], value=-1
            )  # |v|^2 = 1 / temperature
            return grad.mul_(factors[:, None]).to(x.dtype), of_temperature, None, None


def engine_of(x: Tensor) -> ModuleType:
    """The module that passes over the logits: its functions `log_sum_exp` and `gradient`."""
    short = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[1] <= LONGEST_ON_TRITON
    if x.is_cuda and short and importlib.util.find_spec("triton"):
        from lvssl.losses import gpu

        return gpu
    return chunked


def logit_bound(temperature: Tensor) -> float:
    """What no logit exceeds, v_i . v_j <= 1 / temperature; infinity where asking would wait for a GPU."""
    return math.inf if temperature.is_cuda else 1 / temperature.item()
