"""Batch normalisation over all ranks, also on a CPU, and passes that leave the running statistics alone.

torch's SyncBatchNorm refuses CPU tensors. On a GPU it makes the host wait at every layer (for a boolean mask
over the ranks' counts), and it refuses a layer whose batches aren't counted, as in
`frozen_running_statistics`. This one gives the statistics, the output and the gradient of one process with
the whole batch, on any device for which the process group has a backend.
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
    """Replace each batch normalisation of the network by one over all ranks, which shares its weights."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            synced = SyncedBatchNorm(child.num_features)
            synced.__dict__.update(child.__dict__)  # the same parameters, buffers and settings
            setattr(network, name, synced)
        else:
            synchronised(child)
    return network


class SyncedBatchNorm(_BatchNorm):
    """`BatchNorm1d` and `2d` in one: [N, C] or [N, C, H, W]. N may differ between ranks, and be 0."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        plain = torch.ones(self.num_features, dtype=wide(input.dtype), device=input.device)
        weight = plain if self.weight is None else self.weight
        bias = torch.zeros_like(plain) if self.bias is None else self.bias
        output, mean, variance, count = _Normalise.apply(input, weight, bias, self.eps)
        # If compiled, they have a graph, which the running statistics would carry from step to step.
        mean, variance, count = mean.detach(), variance.detach(), count.detach()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var over the images of all ranks.

    Sums over the images are made by torch's own batch normalisation, which reads 16-bit numbers and adds them
    in fp32. By plain operations, which first write fp32 copies, a number in bf16 costs 104 bytes of memory
    traffic instead of 36 (torch's: 16), and a ResNet-50 step would be limited by them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        own = weight.new_zeros(3, x.shape[1], dtype=wide(x.dtype))  # a batch without images counts 0
        if x.numel():
            if torch.compiler.is_compiling():  # which fuses the copy, and would return bf16 on a CPU
                axes = [axis for axis in range(x.dim()) if axis != 1]
                variance, mean = torch.var_mean(x.to(wide(x.dtype)), axes, correction=0)
            else:
                _, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
                variance = (scale.pow(-2) - eps).clamp(min=0)
            own = torch.stack([mean, variance, torch.full_like(mean, x.numel() / x.shape[1])])
        means, variances, counts = torch.stack(gathered(own)).unbind(1)
        shares = counts / counts.sum(0)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps = counts.sum(0), eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance, ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        own_weight, own_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():
            _, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, mean, scale, False, ctx.eps, [False, True, True]
            )
        sums = torch.stack([own_bias, own_weight])
        dist.all_reduce(sums)  # the shared statistics depend on every rank's images
        by_mean, by_scale = (sums / ctx.count).unbind(0)
        # scale weight (grad - by_mean - (x - mean) scale by_scale), as a sum of multiples of grad and x
        of_grad = scale * weight
        of_x = -of_grad * scale * by_scale
        constant = -of_grad * by_mean - of_x * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        slope = torch.addcmul(constant.view(shape), x, of_x.view(shape))
        slope = torch.addcmul(slope, grad, of_grad.view(shape))
        return slope.to(x.dtype), own_weight, own_bias, None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums: fp32, or fp64 for fp64."""
    return dtype if dtype == torch.float64 else torch.float32


@contextmanager
def frozen_running_statistics(network: nn.Module) -> Iterator[None]:
    """Context in which forward passes normalise by their batch, but don't move the running statistics; for
    images that have been seen already and are computed again for their gradient."""
    # A momentum of 0 rather than no tracking: checkpointing requires the same graph the second time.
    frozen = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(module, module.momentum, module.num_batches_tracked) for module in frozen]
    for module in frozen:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, count in kept:
            module.momentum, module.num_batches_tracked = momentum, count
