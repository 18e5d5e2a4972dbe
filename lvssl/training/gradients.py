"""From a batch to gradients: in one piece or through a cache, averaged over ranks, checked and clipped."""

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
BUCKET = 25 * 2**20  # bytes of gradients that travel together


def backward(
    backbone: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    autocast: Context,
    chunk: int = 0,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    averaging: GradientAllReducer | None = None,
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
        averaging: sends what is complete meanwhile; the caller finishes it.
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
        for part, grad in zip(parts, features.grad.tensor_split(len(parts))):
            with autocast():
                again = backbone(part)
            if averaging:
                averaging.held = part is not parts[-1]
            again.backward(grad)


class GradientAllReducer:
    """The mean of every gradient over the ranks, on each of them, exchanged while the backward pass runs.

    Parameters lie in buckets, the last layers' first, for their gradients come first. A bucket is sent as
    soon as it and those before it are complete, in the same order on every rank; `finish` sends the rest and
    waits. A parameter without gradient on one rank has one of zeros there. Not DDP: its reducer wants to wrap
    the forward pass of the whole network, and the cache runs through the backbone alone, again and again.
    Buckets have a communicator of their own: they don't queue behind what the loss and SyncBatchNorm send.

    timeout_minutes: how long to wait for another rank. All ranks make theirs at the same time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], timeout_minutes: float = 10.0) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.group: Any = dist.new_group(timeout=timedelta(minutes=timeout_minutes)) if ranks() > 1 else None
        self.held = False  # True: the gradients that come are not the step's last
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
        """After the step's last backward pass."""
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
    """Clip the norm of all gradients together, to `clip` where that is above 0.

    Returns:
        The norm before, a scalar on the device, not finite if one gradient isn't; nothing waits for it. The
        gradients are then worth nothing: it is for the optimiser to make no step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if clip > 0:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm
