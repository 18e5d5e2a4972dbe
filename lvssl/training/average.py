"""Exponential moving average of a network's weights and running statistics."""

import copy

import torch
from torch import Tensor

from lvssl.models.network import LVNet


class Average:
    """e <- decay e + (1 - decay) w, for everything in the state_dict; counters are the network's.

    Attributes:
        module: the average, in eval mode, which starts as a copy of the network.
    """

    def __init__(self, network: LVNet, decay: float) -> None:
        self.module = copy.deepcopy(network).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: LVNet, finite: Tensor | None = None) -> None:
        """Update the average with the network, which must be finite. If `finite`, a bool on the device, is
        False, the average stays as it is; None means True, without reading from the device."""
        own, theirs = (list(of.state_dict().values()) for of in (self.module, network))
        averages, values = ([x for x in found if x.is_floating_point()] for found in (own, theirs))
        counters, counted = ([x for x in found if not x.is_floating_point()] for found in (own, theirs))
        if finite is None:
            torch._foreach_lerp_(averages, values, weight=1 - self.decay)
        else:
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, (1 - self.decay) * finite)
            torch._foreach_add_(averages, steps)
        if counters:
            torch._foreach_copy_(counters, counted)
