"""Optimisers with parameter groups by module type, and the learning-rate schedule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from lvssl.settings.pretrain import OptimiserSettings

# Modules to whose `weight` weight decay and LARS's adaptation apply.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_optimiser(network: nn.Module, settings: OptimiserSettings, fused: bool = False) -> Optimizer:
    """Build the optimiser over `groups(network)`, with weight decay and LARS's adaptation on the first alone.

    Args:
        fused: take a step in one kernel over many tensors, which reads on the device whether to take it: if
            the attribute `found_inf`, a float32 scalar, is 1, weights, moments and counters stay.
    """
    decayed, others = groups(network)
    parameters = [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, fused=fused or None)
    momentum: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    if settings.optimiser == "sgd":
        sgd = torch.optim.SGD(parameters, lr=settings.lr, fused=fused or None, **momentum)
        return with_momentum(sgd) if fused else sgd
    if fused:
        parameters[0] |= {"weight_decay": 0.0, "adapted_decay": settings.weight_decay}
        return with_momentum(FusedLars(parameters, settings.trust, lr=settings.lr, **momentum))
    from timm.optim.lars import Lars  # slow to import

    parameters[0]["always_adapt"] = True  # without it, --weight-decay 0 would turn the adaptation off
    return Lars(parameters, lr=settings.lr, trust_coeff=settings.trust, **momentum)


S = TypeVar("S", bound=torch.optim.SGD)


def with_momentum(optimiser: S) -> S:
    """Start the optimiser's momentum at zero, which gives the same first step.

    torch's fused SGD leaves momentum uninitialised if `found_inf` forbids the first step.
    """
    for group in optimiser.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


class FusedLars(torch.optim.SGD):
    """LARS (You et al. 2017) as in timm, in two parts: adapt gradients layer by layer, in place, then take a
    step of torch's fused SGD, which reads `found_inf`. Groups with `adapted_decay` are adapted."""

    def __init__(self, parameters: list[dict[str, Any]], trust: float, **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if "adapted_decay" in group:
                weights = [p for p in group["params"] if p.grad is not None]
                adapt(weights, [p.grad for p in weights], group["adapted_decay"], self.trust)
        return super().step(closure)


def adapt(weights: list[Tensor], gradients: list[Tensor], decay: float, trust: float) -> None:
    """g <- (g + decay w) * trust |w| / (|g| + decay |w|) for each layer, in place; the factor is 1 if w or g
    is zero."""
    of_weights, of_gradients = (torch.stack(torch._foreach_norm(x)) for x in (weights, gradients))
    ratios = trust * of_weights / (of_gradients + decay * of_weights + 1e-8)
    ratios = torch.where((of_weights > 0) & (of_gradients > 0), ratios, 1.0)
    torch._foreach_add_(gradients, weights, alpha=decay)
    torch._foreach_mul_(gradients, ratios.unbind())


@contextmanager
def capturable(optimiser: Optimizer) -> Iterator[None]:
    """Context that sets the groups' `capturable`. torch's AdamW can't be recorded in a CUDA graph without it,
    and warns of it elsewhere; for a fused step it makes no difference."""
    groups = [group for group in optimiser.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def restore_optimiser(optimiser: Optimizer, state: dict[str, Any]) -> None:
    """Load a state, of a fused optimiser or not, from the same or another device. Moments, counters and the
    current rate are taken from the state, options and memory layout from the optimiser. Fused kernels require
    moments in the layout of the weights."""
    groups = [
        own | {"params": saved["params"], "lr": float(saved["lr"])}
        for own, saved in zip(optimiser.param_groups, state["param_groups"], strict=True)
    ]
    optimiser.load_state_dict({**state, "param_groups": groups})
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                moments[name] = torch.empty_like(parameter).copy_(value)


def groups(network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return (weights of linear and convolutional layers, all other trained parameters), by name.

    Groups go by module type: by name, a ResNet's `downsample.1`, which is a normalisation, would be missed.
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
    """Describe the groups in one line, for the log."""
    decayed, others = (
        f"{sum(p.numel() for p in group.values()):,} parameters in {len(group)}" for group in groups(network)
    )
    adapted = " and layer-wise adaptation" if settings.optimiser == "lars" else ""
    return (
        f"{settings.optimiser}: weight decay {settings.weight_decay:g}{adapted} on {decayed} weight tensors, "
        f"not on {others} of biases and normalisation"
    )


def peak_lr(settings: OptimiserSettings, batch_size: int) -> float:
    """Learning rate at the end of the warm-up (rules: SimCLR, Chen et al. 2020, appendix B.1)."""
    factor = {"given": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}
    return settings.lr * factor[settings.lr_rule]


def learning_rate(
    step: int, steps: int, steps_per_epoch: int, settings: OptimiserSettings, batch_size: int = 256
) -> float:
    """Linear warm-up to `peak_lr`, then half a cosine down to 0 at `steps`."""
    peak = peak_lr(settings, batch_size)
    warmup = min(settings.warmup_epochs * steps_per_epoch, steps)
    if step < warmup:
        return peak * min(step + 1, warmup) / warmup  # it may end within a step
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
