"""The moving average of a network's weights and running statistics."""

import copy

import torch
import torch.nn as nn
from torch import Tensor


class Average:
    """e <- decay e + (1 - decay) w, of everything in the state_dict; counters are those of the network.

    Attributes:
        module: the average, in eval mode, from the network's state on.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, finite: Tensor | None = None) -> None:
        """Take in the network as it is, which must be finite; where `finite`, a bool on the device, is
        False, the average stays as it is. None: True, without a look at the device."""
        pairs = list(zip(self.module.state_dict().values(), network.state_dict().values()))
        averages, values = map(list, zip(*[pair for pair in pairs if pair[0].is_floating_point()]))
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        if finite is None:
            torch._foreach_lerp_(averages, values, weight=1 - self.decay)
        else:
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, (1 - self.decay) * finite)
            torch._foreach_add_(averages, steps)
        if counters:
            torch._foreach_copy_(*map(list, zip(*counters)))
