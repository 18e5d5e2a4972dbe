"""Optimisers: groups by module type, LARS against its formula, the schedule and its rules."""

import dataclasses

import pytest
import torch
import torch.nn as nn

from lvssl.models.backbone import build_backbone
from lvssl.settings.pretrain import PRESETS, OptimiserSettings
from lvssl.training.optimiser import (
    build_optimiser,
    describe_groups,
    groups,
    learning_rate,
    peak_lr,
    restore_optimiser,
)
from pipelines.errors import InputError


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_weight_decay_is_for_weights_of_layers_alone(name):
    backbone, _ = build_backbone("resnet18", 32)
    settings = OptimiserSettings(optimiser=name, weight_decay=0.1)
    optimiser = build_optimiser(backbone, settings)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in backbone.named_parameters() if id(p) in decayed}
    assert "layer2.0.downsample.0.weight" in names and "layer2.0.downsample.1.weight" not in names
    assert not any(name.endswith("bias") or ".bn" in name for name in names)
    assert sum(len(g["params"]) for g in optimiser.param_groups) == len(list(backbone.parameters()))
    assert names == set(groups(backbone)[0])


def test_groups_are_told():
    backbone, _ = build_backbone("resnet18", 32)
    told = describe_groups(backbone, OptimiserSettings(optimiser="lars", weight_decay=1e-6))
    assert told.startswith("lars: weight decay 1e-06 and layer-wise adaptation on ")
    assert " in 20 weight tensors, not on " in told and told.endswith(" in 40 of biases and normalisation")


def lars(
    weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], rates: list[float], decay: float,
    momentum: float, trust: float, adapted: list[bool], nesterov: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """You et al. 2017, algorithm 1, with the rate outside of the momentum as in torch's SGD:
    g <- (g + decay w) * trust |w| / (|g| + decay |w|) where adapted; v <- m v + g; w <- w - rate v."""
    velocity = [torch.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for i, w in enumerate(weights):
            g = gradients[step][i]
            if adapted[i]:
                ratio = trust * w.norm() / (g.norm() + decay * w.norm())
                g = (g + decay * w) * (ratio if w.norm() > 0 and g.norm() > 0 else 1.0)
            velocity[i] = momentum * velocity[i] + g
            weights[i] = w - rate * (g + momentum * velocity[i] if nesterov else velocity[i])
    return weights


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [1e-2, 0.0])
def test_lars_is_its_formula(nesterov, decay):
    """Over steps of changing rate; biases and normalisation neither decayed nor adapted; zero weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).double()
    nn.init.zeros_(net[3].weight)
    parameters = list(net.parameters())
    adapted = [True, False, False, False, True, False]
    noise = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in parameters] for _ in range(5)]
    rates = [0.5, 1.0, 0.3, 0.0, 2.0]
    settings = OptimiserSettings(optimiser="lars", weight_decay=decay, trust=0.01, nesterov=nesterov)
    start = [p.detach().clone() for p in parameters]
    wanted = lars(start, gradients, rates, decay, 0.9, 0.01, adapted, nesterov)
    optimiser = build_optimiser(net, settings)
    for step, rate in enumerate(rates):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for p, gradient in zip(parameters, gradients[step]):
            p.grad = gradient.clone()
        optimiser.step()
    for found, expected in zip(parameters, wanted):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-8)  # timm's eps is 1e-8


def test_the_learning_rate_warms_up_and_falls_to_zero():
    chosen = dataclasses.replace(PRESETS["digits"].optimiser, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(step, 100, 10, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[19] == 1.0 and max(rates) == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[-1] < 0.01
    assert rates[60] == pytest.approx(0.5) and rates[40] == pytest.approx(0.5 + 0.5**1.5)  # of the rest
    assert learning_rate(9, 10, 10, chosen) == 1.0  # a warm-up longer than the run ends with it


@pytest.mark.parametrize("warmup_epochs", [0.1 * 3, 0.25, 0.05, 0.001])
def test_a_warm_up_that_ends_within_a_step_does_not_pass_the_peak(warmup_epochs):
    chosen = dataclasses.replace(PRESETS["digits"].optimiser, lr=1.0, warmup_epochs=warmup_epochs)
    assert max(learning_rate(step, 30, 10, chosen) for step in range(30)) == 1.0


def test_a_restored_optimiser_has_the_states_rate_and_its_own_options():
    net = nn.Linear(3, 2)
    first, second = (build_optimiser(net, OptimiserSettings(weight_decay=decay)) for decay in (0.1, 0.2))
    first.param_groups[0]["lr"] = 0.05
    restore_optimiser(second, first.state_dict())
    assert second.param_groups[0]["lr"] == 0.05 and second.param_groups[0]["weight_decay"] == 0.2


def test_rules_of_the_peak():
    """SimCLR, B.1: 0.3 * 4,096 / 256 = 4.8, and 0.075 * sqrt(4,096) = 4.8."""
    assert peak_lr(OptimiserSettings(lr=0.3, lr_rule="linear"), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimiserSettings(lr=0.075, lr_rule="sqrt"), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimiserSettings(lr=0.3), 4096) == 0.3
    linear = OptimiserSettings(lr=0.3, lr_rule="linear", warmup_epochs=0)
    assert learning_rate(0, 10, 5, linear, 512) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"optimiser": "adam"}, "unknown optimiser 'adam'; known: adamw, sgd, lars"),
     ({"lr_rule": "root"}, "known: given, linear, sqrt"), ({"lr": 0.0}, "--lr must be above 0"),
     ({"momentum": 1.0}, "--momentum"), ({"nesterov": True, "momentum": 0.0}, "--momentum must be above 0"),
     ({"clip": -1.0}, "--clip"), ({"trust": float("nan")}, "--trust")],
)  # fmt: skip
def test_impossible_settings_are_named(change, said):
    with pytest.raises(InputError, match=said):
        OptimiserSettings(**change).validate()
