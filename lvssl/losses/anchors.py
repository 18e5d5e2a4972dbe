"""The parts of contrastive losses: each anchor's log-sum-exp over the other vectors, and its positive logit.

Vectors are scaled to v_i = a_i x_i, with a_i = 1 / (|x_i| sqrt(temperature)), so that a logit is v_i . v_j:

    denominator_i = log sum_{j != i} exp(v_i . v_j)        positive_i = v_i . v_i'      (i': i's other view)

The gradient of the denominators, weighted with g, takes a second pass over the logits:

    d/dv_i = sum_j (g_i exp(v_i . v_j - denominator_i) + g_j exp(v_i . v_j - denominator_j)) v_j

Each row reads the denominators of the other rows instead of sending gradients to them. There are therefore no
atomics, and several ranks exchange no gradients. The gradient of the temperature takes no pass at all: the
denominators are functions of v_i . v_j alone, so d/d(1/temperature) = sum_i v_i . d/dv_i * temperature / 2.
"""

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lvssl.losses import chunked, distributed
from lvssl.losses.block import Block, Weighed

EPS = 1e-12  # a vector no longer than this has no direction
LONGEST_ON_TRITON = 512  # numbers per vector up to which the Triton kernels are used


def anchors(
    projections: Tensor, temperature: float | Tensor, counts: list[int], decoupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return denominators and positives [2B], differentiable, of this rank's anchors among all vectors.

    Args:
        projections: [2B, d] as for `ntxent`; checked by the caller.
        temperature: above 0, a float or a tensor with one element.
        counts: number of vectors of each rank.
        decoupled: leave the positive out of its anchor's denominator, too (Yeh et al. 2022).
    """
    if not isinstance(temperature, Tensor):
        kind = torch.float64 if projections.dtype == torch.float64 else torch.float32
        temperature = torch.full((), temperature, dtype=kind, device=projections.device)
    return _apply(projections, temperature, counts, decoupled)


@torch.compiler.disable  # tracing would unroll the loop over tiles
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
    def backward(ctx: Any, weights: Tensor, positive_weights: Tensor) -> tuple[Tensor | None, ...]:
        # With `once_differentiable`, the second derivative of a loss whose weights are constant would be 0.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this form of the loss has no second derivatives (create_graph=True); "
                "`lvssl.losses.ntxent.reference` has"
            )
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

            # v depends on x through its direction alone: the part along v drops out; it is the temperature's.
            along = torch.linalg.vecdot(v, grad)
            of_temperature = None
            if ctx.needs_input_grad[1]:
                of_temperature = (-along.sum() / (2 * temperature)).to(temperature).reshape(temperature.shape)
            grad.addcmul_(
                v, (along * temperature.reshape(()).to(v))[:, None], value=-1
            )  # |v|^2 = 1 / temperature
            return grad.mul_(factors[:, None]).to(x.dtype), of_temperature, None, None


def engine_of(x: Tensor) -> ModuleType:
    """Return the module that passes over the logits, with functions `log_sum_exp` and `gradient`."""
    short = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[1] <= LONGEST_ON_TRITON
    if x.is_cuda and short and importlib.util.find_spec("triton"):
        from lvssl.losses import gpu

        return gpu
    return chunked


def logit_bound(temperature: Tensor) -> float:
    """Upper bound of the logits, 1 / temperature; infinity on a GPU, where reading it would have to wait."""
    return math.inf if temperature.is_cuda else 1 / temperature.item()
