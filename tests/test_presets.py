"""Presets hold the published recipes, and can be listed, shown and compared."""

import json

import pytest
import torch
import torch.nn as nn

from lvssl.commands.main import main
from lvssl.models.backbone import feature_dim
from lvssl.models.network import LVNet
from lvssl.settings.presets import ABOUT, difference_of, settings_of
from lvssl.settings.pretrain import PRESETS
from lvssl.settings.stages import STAGE_PRESETS, FinetuneSettings, LinearSettings, start_from
from lvssl.training.optimiser import peak_lr
from lvssl.training.supervised import scaled_lr
from pipelines.errors import InputError


@pytest.mark.parametrize("name", [name for name in PRESETS if "-imagenet-" in name or "cifar10-r50" in name])
def test_a_preset_of_a_paper_has_its_projector_and_its_name_says_the_family(name):
    """2,048 -> 2,048 -> 128, both layers without bias and batch-normalised, the last without a shift."""
    preset = PRESETS[name]
    assert preset.latent.family == {"simclr": "none", "bernoulli": "bernoulli"}[name.partition("-")[0]]
    with torch.device("meta"):
        network = LVNet(preset.model, preset.latent, preset.view.resolution)
    assert feature_dim(preset.model.backbone) == 2048
    for projector in filter(None, (network.projector, network.clean_projector)):
        first, hidden, _, second, output = projector
        assert (first.in_features, first.out_features, second.out_features) == (2048, 2048, 128)
        assert first.bias is None and second.bias is None
        assert isinstance(hidden, nn.BatchNorm1d) and isinstance(output, nn.BatchNorm1d)
        assert hidden.bias is not None and output.weight is not None and output.bias is None


def test_no_preset_names_a_paper_and_trains_something_else():
    assert {name for name in PRESETS if "Chen et al." in ABOUT[name]} == {
        "simclr-cifar10-r50", "simclr-imagenet-r50-100ep",
    }  # fmt: skip
    assert all(PRESETS[name].latent.family == "none" for name in PRESETS if "Chen et al." in ABOUT[name])


@pytest.mark.parametrize("family", ["simclr", "bernoulli"])
@pytest.mark.parametrize("epochs", [100, 200, 800])
def test_imagenet_pretraining_is_simclrs(family, epochs):
    preset = PRESETS[f"{family}-imagenet-r50-{epochs}ep"]
    preset.validate()
    assert preset.epochs == epochs and preset.batch_size == 4096 and preset.temperature == 0.1
    assert peak_lr(preset.optimiser, preset.batch_size) == pytest.approx(4.8)  # 0.3 * 4096 / 256
    optimiser = preset.optimiser
    assert (optimiser.optimiser, optimiser.momentum, optimiser.weight_decay) == ("lars", 0.9, 1e-6)
    assert optimiser.warmup_epochs == 10 and not optimiser.nesterov
    model, view = preset.model, preset.view
    assert (model.backbone, model.hidden, model.projection) == ("resnet50", 2048, 128)
    assert (view.resolution, view.scale, view.flip, view.jitter) == (224, (0.08, 1.0), 0.5, 0.8)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (view.grey, view.blur, view.sigma, view.kernel_size) == (0.2, 0.5, (0.1, 2.0), 23)


def test_stages_on_imagenet_are_simclrs():
    linear = STAGE_PRESETS["imagenet-linear"]
    assert (linear.probe, linear.epochs, linear.batch_size) == ("sgd", 90, 4096)
    assert scaled_lr(linear.lr, linear.batch_size) == pytest.approx(1.6)  # 0.1 * 4096 / 256
    tuned = STAGE_PRESETS["imagenet-finetune"]
    assert (tuned.batch_size, tuned.lr, tuned.weight_decay, tuned.epochs) == (4096, (0.05,), (0.0,), 30)
    for preset in STAGE_PRESETS.values():
        preset.validate()


def test_a_stage_starts_from_its_own_presets_alone():
    assert start_from(LinearSettings, "imagenet-linear").batch_size == 4096
    assert start_from(FinetuneSettings, None).batch_size == 256
    with pytest.raises(InputError, match="unknown preset 'imagenet-linear'; known: imagenet-finetune"):
        start_from(FinetuneSettings, "imagenet-linear")


def test_every_preset_is_listed_with_a_line_and_its_name_is_its_own(capsys):
    assert set(ABOUT) == {*PRESETS, *STAGE_PRESETS}
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    for name, about in ABOUT.items():
        (line,) = [line for line in printed.splitlines() if line.split() and line.split()[0] == name]
        assert about in line and settings_of(name)["preset"] == name


def test_presets_are_compared(capsys):
    assert main(["presets", "simclr-imagenet-r50-100ep", "simclr-imagenet-r50-800ep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [["epochs", "100", "800"]]
    assert "the same" in difference_of("digits", "digits")
    assert "probe" in difference_of("imagenet-linear", "imagenet-finetune")
    assert main(["presets", "digits"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 128
    assert main(["presets", "digits", "nope"]) == 2
    assert "unknown preset 'nope'; known: digits" in capsys.readouterr().err
