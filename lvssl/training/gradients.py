"""Gradients of a batch: at once or by GradCache, averaged over the ranks, checked and clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from lvssl.losses.distributed import ranks
from lvssl.training.batchnorm import frozen_running_statistics

Context = Callable[[], AbstractContextManager]
BUCKET = 25 * 2**20  # bytes of gradients that are sent together


def backward(
    backbone: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    autocast: Context,
    chunk: int = 0,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    averaging: GradientAllReducer | None = None,
) -> None:
    """Add the gradients of loss_of(backbone(images)) to those of all parameters.

    With `chunk` below the number of images, the backbone takes this many at once and holds the activations of
    one chunk (GradCache, Gao et al. 2021, arXiv 2101.06983). It computes the features of all chunks without a
    graph, then the loss on the whole batch and its gradient in the features, then each chunk again, with that
    gradient. Only the first pass moves running statistics. A backbone with batch normalisation sees the
    statistics of a chunk; one without gives the same gradients as without chunks.

    Args:
        images: [N, 3, R, R]. loss_of: features [N, F] -> a scalar.
        autocast: makes the context in which the backbone runs.
        scaled: scales the loss, for fp16.
        averaging: sends gradients as they become complete; the caller calls `finish`.
    """
    if not 0 < chunk < len(images):
        with autocast():
            features = backbone(images)
        scaled(loss_of(features)).backward()
        return
    parts = images.tensor_split(math.ceil(len(images) / chunk))  # as equal as possible: no part has one view
    with torch.no_grad(), autocast():
        features = torch.cat([backbone(part) for part in parts])
    features.requires_grad_()
    scaled(loss_of(features)).backward()
    assert features.grad is not None
    with frozen_running_statistics(backbone):
        for part, grad in zip(parts, features.grad.tensor_split(len(parts))):
            with autocast():
                again = backbone(part)
            if averaging:
                averaging.held = part is not parts[-1]
            again.backward(grad)


class GradientAllReducer:
    """Averages every gradient over the ranks, while the backward pass runs.

    Parameters are grouped into buckets, the last layers first, because their gradients come first. A bucket
    is sent as soon as it and those before it are complete, in the same order on every rank; `finish` sends
    the rest and waits. A parameter without a gradient on one rank counts as zeros there. DDP won't do: its
    reducer wraps the forward pass of the whole network, and GradCache runs the backbone alone, several times.
    Buckets have their own communicator, so as not to queue behind messages of the loss and SyncBatchNorm.

    timeout_minutes: how long to wait for another rank. All ranks create theirs at the same time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], timeout_minutes: float = 10.0) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.group: Any = dist.new_group(timeout=timedelta(minutes=timeout_minutes)) if ranks() > 1 else None
        self.held = False  # True: more gradients of this step will follow
        room = 0
        for parameter in reversed([p for p in parameters if p.requires_grad] if ranks() > 1 else []):
            if room <= 0:
                self.buckets.append([])
                room = BUCKET
            room -= parameter.nbytes
            self.buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, len(self.buckets) - 1))
        self._reset()

    def _reset(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, dist.Work]] = []

    def _arrived(self, number: int, _: Tensor) -> None:
        if not self.held:
            self.missing[number] -= 1
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        self.sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left and wait; call it after the step's last backward pass."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent):
            work.wait()
            means = (flat / ranks()).split([p.numel() for p in bucket])
            gradients = [p.grad for p in bucket if p.grad is not None]
            torch._foreach_copy_(gradients, [m.view(g.shape) for m, g in zip(means, gradients)])
        self._reset()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], clip: float = 0.0) -> Tensor:
    """Clip the norm of all gradients together to `clip`, if that is above 0.

    Returns:
        The norm before, a scalar on the device, without waiting for it. It isn't finite if one gradient
        isn't; the optimiser must then skip the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if clip > 0:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm
