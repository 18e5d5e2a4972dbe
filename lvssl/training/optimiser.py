"""Optimisers with parameter groups by module type, and the schedule of the learning rate."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch.optim import Optimizer

from lvssl.config import OptimiserSettings

# Modules whose `weight` decays, and is what LARS adapts the step to.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_optimiser(network: nn.Module, settings: OptimiserSettings) -> Optimizer:
    """The optimiser over `groups(network)`: weight decay and LARS's adaptation on the first of them alone."""
    decayed, others = groups(network)
    parameters = [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr)
    momentum: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, **momentum)
    from timm.optim.lars import Lars  # slow to import

    parameters[0]["always_adapt"] = True  # without it, --weight-decay 0 would turn the adaptation off
    return Lars(parameters, lr=settings.lr, trust_coeff=settings.trust, **momentum)


def groups(network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(weights of linear and convolutional layers, all else that is trained: biases, normalisation), by name.

    By module type: names miss a ResNet's `downsample.1`, which is a normalisation.
    """
    decayed: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                chosen = decayed if name == "weight" and isinstance(module, LAYERS) else others
                chosen[f"{prefix}.{name}" if prefix else name] = parameter
    return decayed, others


def describe_groups(network: nn.Module, settings: OptimiserSettings) -> str:
    """What the groups are, for the log."""
    decayed, others = groups(network)
    lines = [f"{settings.optimiser}, weight decay {settings.weight_decay:g} on"]
    adapted = " and adapted" if settings.optimiser == "lars" else ""
    for title, group in ((f"decayed{adapted}", decayed), ("neither", others)):
        numbers = sum(parameter.numel() for parameter in group.values())
        names = list(group)
        some = ", ".join(names if len(names) < 4 else [names[0], names[1], "...", names[-1]])
        lines.append(f"  {title}: {len(group)} tensors, {numbers:,} numbers ({some})")
    return "\n".join(lines)


def peak_lr(settings: OptimiserSettings, batch_size: int) -> float:
    """The learning rate at the end of the warm-up (rules: SimCLR, Chen et al. 2020, appendix B.1)."""
    factor = {"given": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}
    return settings.lr * factor[settings.lr_rule]


def learning_rate(
    step: int, steps: int, steps_per_epoch: int, settings: OptimiserSettings, batch_size: int = 256
) -> float:
    """Linear warm-up to `peak_lr`, then half a cosine down to 0 at `steps`."""
    peak = peak_lr(settings, batch_size)
    warmup = min(settings.warmup_epochs * steps_per_epoch, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
