"""From a batch to gradients: in one piece or through a cache, averaged over ranks, checked and clipped."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from lvssl.losses.distributed import ranks
from lvssl.training.batchnorm import frozen_running_statistics

Context = Callable[[], AbstractContextManager]


def backward(
    backbone: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    autocast: Context,
    chunk: int = 0,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:
    """Gradients of loss_of(backbone(images)) in all parameters, added to what is there.

    With `chunk` below the number of images, the backbone takes so many at once and its activations are those
    of one chunk (GradCache, Gao et al. 2021, arXiv 2101.06983): features of all chunks without a graph; the
    loss on the whole batch, and its gradient in the features; each chunk again, with that gradient. Running
    statistics are moved by the first pass alone. A backbone with batch normalisation sees the statistics of a
    chunk; one without gives the gradients of one piece.

    Args:
        images: [N, 3, R, R]. loss_of: features [N, F] -> a scalar.
        autocast: makes the context that the backbone runs in.
        scaled: multiplies the loss, for fp16.
    """
    if not 0 < chunk < len(images):
        with autocast():
            features = backbone(images)
        scaled(loss_of(features)).backward()
        return
    parts = images.tensor_split(math.ceil(len(images) / chunk))  # as equal as can be: no part of one view
    with torch.no_grad(), autocast():
        features = torch.cat([backbone(part) for part in parts])
    features.requires_grad_()
    scaled(loss_of(features)).backward()
    assert features.grad is not None
    with frozen_running_statistics(backbone):
        for part, slope in zip(parts, features.grad.tensor_split(len(parts))):
            with autocast():
                again = backbone(part)
            again.backward(slope)


@torch.no_grad()
def average_over_ranks(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of every gradient over the ranks, on each of them, in one exchange.

    Not DDP: its hooks fire at each of the cache's many backward walks, and its averaging is all that is
    needed. A parameter without gradient on one rank has one of zeros there.
    """
    if ranks() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks()
    averaged = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, mean in zip(parameters, gradients, averaged):
        gradient.copy_(mean.view(gradient.shape))
        parameter.grad = gradient


@torch.no_grad()
def guard(parameters: Iterable[nn.Parameter], clip: float = 0.0) -> Tensor:
    """Clip the norm of all gradients together, and put zeros in the place of all if it isn't finite.

    Returns:
        The norm before, a scalar on the device; nothing waits for it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if clip > 0:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    if norm.device.type == "cpu":
        if not norm.isfinite():
            torch._foreach_zero_(gradients)
    else:  # the host must not look
        for gradient in gradients:
            gradient.copy_(torch.where(norm.isfinite(), gradient, 0.0))
    return norm
