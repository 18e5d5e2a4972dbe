"""Batch normalisation over all ranks, on a CPU too, and passes that leave the running statistics alone.

torch's SyncBatchNorm refuses CPU tensors; on a GPU it makes the host wait at every layer (a boolean mask over
the ranks' counts), and refuses a layer whose batches aren't counted, as `frozen_running_statistics` leaves
it. This one gives the statistics, the output and the gradient of one process with the whole batch on any
device that its group has a backend for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lvssl.training.distributed import gathered


def synchronised(network: nn.Module) -> nn.Module:
    """The network with each batch normalisation replaced by one over all ranks; the weights are shared."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            synced = SyncedBatchNorm(child.num_features)
            synced.__dict__.update(child.__dict__)  # the same parameters, buffers and settings
            setattr(network, name, synced)
        else:
            synchronised(child)
    return network


class SyncedBatchNorm(_BatchNorm):
    """`BatchNorm1d` and `2d` in one: [N, C] or [N, C, H, W], N may differ from rank to rank, down to none."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        plain = torch.ones(self.num_features, dtype=_wide(input[:0]).dtype, device=input.device)
        weight = plain if self.weight is None else self.weight
        bias = torch.zeros_like(plain) if self.bias is None else self.bias
        output, mean, variance, count = _Normalise.apply(input, weight, bias, self.eps)
        # Compiled, they'd have a graph, and the running statistics would carry it from step to step.
        mean, variance, count = mean.detach(), variance.detach(), count.detach()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the images of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(_wide(x), axes, correction=0)
        own = torch.stack([mean, variance, torch.full_like(mean, x.numel() / x.shape[1])])
        everyone = gathered(own.nan_to_num())  # an empty batch has no mean, and counts 0
        means, variances, counts = torch.stack(everyone).unbind(1)
        shares = counts / counts.sum(0)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.axes, ctx.count = axes, counts.sum(0)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance, ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        normalised = (_wide(x) - mean.view(shape)) * scale.view(shape)
        grad = _wide(grad)
        sums = torch.stack([grad.sum(ctx.axes), (grad * normalised).sum(ctx.axes)])
        own_bias, own_weight = sums.clone()
        dist.all_reduce(sums)  # what every rank's images make of the shared statistics
        by_mean, by_scale = (sums / ctx.count).unbind(0)
        pulled = grad - by_mean.view(shape) - normalised * by_scale.view(shape)
        x_slope = pulled * (scale * weight).view(shape)
        return x_slope.to(x.dtype), own_weight, own_bias, None


def _wide(x: Tensor) -> Tensor:
    """Sums are made in fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def frozen_running_statistics(network: nn.Module) -> Iterator[None]:
    """Forward passes inside still normalise by their batch, but leave no trace in the running statistics:
    for images that have been seen already, and are computed again for their gradient."""
    # Moved by a share of 0 rather than not tracked: checkpointing wants the same graph at the second time.
    frozen = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(module, module.momentum, module.num_batches_tracked) for module in frozen]
    for module in frozen:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, count in kept:
            module.momentum, module.num_batches_tracked = momentum, count
