"""AdamW with parameter groups by module type, and the schedule of its learning rate."""

import math

import torch
import torch.nn as nn

from lvssl.config import OptimiserSettings


def build_optimiser(network: nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    """Weight decay on the weights of linear and convolutional layers alone.

    By module type, not by name: names miss a ResNet's `downsample.1`, which is a normalisation.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            (decayed if is_weight else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def learning_rate(step: int, steps: int, steps_per_epoch: int, settings: OptimiserSettings) -> float:
    """Linear warm-up, then half a cosine down to 0 at `steps`."""
    warmup = min(settings.warmup_epochs * steps_per_epoch, steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
