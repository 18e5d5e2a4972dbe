"""The head that predicts each image's own loss: it learns, it is a score, and nothing else knows of it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lvssl.commands.main import main
from lvssl.evaluation.outputs import network_outputs
from lvssl.evaluation.scorer import UncertaintyScorer
from lvssl.latents.noise import keyed
from lvssl.models.backbone import stage_widths
from lvssl.runs.run import load_encoder, load_run
from lvssl.settings.pretrain import (
    PRESETS,
    EngineSettings,
    LatentSettings,
    OptimiserSettings,
    PretrainSettings,
)
from lvssl.training.objective import each_loss
from lvssl.training.pretrain import pretrain
from lvssl.training.trainer import Trainer
from pipelines.decode import open_reader
from pipelines.loader import LoaderSettings, TwoViewLoader, evaluation_crops

CASES: dict[str, dict[str, Any]] = {
    "none": {"latent": LatentSettings("none")},
    "bernoulli, clipped": {"optimiser": OptimiserSettings(clip=0.1), "engine": EngineSettings(ema=0.9)},
    "in chunks": {"latent": LatentSettings("gaussian"), "engine": EngineSettings(chunk=64)},
    "sgd, vicreg": {
        "latent": LatentSettings("none", objective="vicreg"),
        "optimiser": OptimiserSettings("sgd", 0.01),
    },
    "each sample": {"latent": LatentSettings("vmf", "proj", objective="ceb", clean_path_weight=0.0)},
}


def settings(data: Path, out: Path, loss_head: bool, **more: Any) -> PretrainSettings:
    base = PRESETS["digits"]
    model = dataclasses.replace(base.model, loss_head=loss_head)
    return dataclasses.replace(base, data=data, out=out, model=model, threads=1, workers=1, **more)


def stepped(chosen: PretrainSettings, host_reads: bool) -> tuple[dict[str, torch.Tensor], Trainer]:
    """Weights, average, moments and torch's generator after six steps."""
    with TwoViewLoader(open_reader(chosen.data), chosen.view, LoaderSettings(128, workers=1)) as loader:
        trainer = Trainer(chosen, 10, loader, torch.device("cpu"), host_reads=host_reads)
        trainer.network.train()
        for _, batch in zip(range(6), loader):
            trainer.train_step(batch)
            trainer.step += 1
    found = {f"network.{name}": value for name, value in trainer.network.state_dict().items()}
    if trainer.ema:
        found |= {f"average.{name}": value for name, value in trainer.ema.module.state_dict().items()}
    for name, parameter in trainer.network.named_parameters():
        found |= {f"{name}: {k}": torch.as_tensor(v) for k, v in trainer.optimiser.state[parameter].items()}
    return found | {"random": torch.get_rng_state()}, trainer


@pytest.mark.parametrize("host_reads", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_everything_else_is_the_same_to_the_bit(digits, tmp_path, name, host_reads):
    without, _ = stepped(settings(digits["train"], tmp_path, False, **CASES[name]), host_reads)
    found, trainer = stepped(settings(digits["train"], tmp_path, True, **CASES[name]), host_reads)
    assert [key for key, value in without.items() if not torch.equal(value, found[key])] == []
    assert {key for key in found.keys() - without.keys() if "loss_head" not in key} == set()
    torch.manual_seed(0)
    fresh = Trainer(trainer.settings, 10, [None], torch.device("cpu")).network.loss_head.state_dict()
    assert all(not torch.equal(found[f"network.loss_head.{key}"], value) for key, value in fresh.items())


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("loss head") / "run"
    pretrain(settings(digits["train"], out, True, latent=LatentSettings("none"), epochs=15))
    return out


def test_it_tells_which_views_have_the_larger_loss(digits, trained):
    """Of images that it wasn't trained on."""
    run = load_run(trained)
    with TwoViewLoader(
        open_reader(digits["test"]), run.settings.view, LoaderSettings(250, workers=1)
    ) as loader:
        batch = next(iter(loader))
    network = run.network.train()
    with torch.no_grad():
        features = network.backbone(batch.views.flatten(0, 1))
        outputs = network.heads(features, keyed(0, len(features)))
        predicted, losses = network.predicted_loss(features), each_loss(outputs, run.settings)
    assert spearmanr(predicted, losses).statistic > 0.3


def test_it_is_a_score_of_an_image(digits, trained, tmp_path):
    run = load_run(trained)
    sets = {
        split: evaluation_crops(open_reader(digits[split]), run.settings.view, np.arange(200))
        for split in ("train", "test")
    }
    train, test = (network_outputs(run.network, crops, run.settings.view) for crops in sets.values())
    scores = UncertaintyScorer(
        False, train, open_reader(digits["train"]).labels[:200], stage_widths("tiny")
    ).scores(test)
    with torch.no_grad():
        expected = run.network.predicted_loss(torch.from_numpy(test.features))
    assert np.array_equal(scores["predicted loss"], expected.double().numpy())
    assert np.unique(scores["predicted loss"]).size > 150

    assert main(["export", str(trained), "--out", str(tmp_path / "export"), "--no-onnx"]) == 0
    exported = load_encoder(tmp_path / "export").network
    assert exported.predicted_loss(torch.from_numpy(test.features)) is None
    again = network_outputs(exported, sets["test"], run.settings.view)
    assert again.predicted_loss is None and np.allclose(again.features, test.features, atol=1e-5)
