"""Does it learn? On digits with 100 labels, every family must beat its own random encoder by 10 points."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvssl.evaluation.embedding import calibrate_batch_statistics, embed
from lvssl.evaluation.probe import linear_probe
from lvssl.latents import FAMILIES
from lvssl.models.network import LVNet
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import load_run
from lvssl.settings.pretrain import PRESETS
from lvssl.training.pretrain import pretrain
from pipelines.decode import open_reader

LABELS_A_CLASS = 10


def accuracy(network: LVNet, digits: dict[str, Path]) -> float:
    view = PRESETS["digits"].view
    train, test = (embed(network, open_reader(digits[split]), view) for split in ("train", "test"))
    labelled = np.concatenate([np.flatnonzero(train.labels == c)[:LABELS_A_CLASS] for c in range(10)])
    return linear_probe(train.features[labelled], train.labels[labelled], test.features, test.labels).accuracy


BRIEFLY = ("bernoulli",)  # the others are slow
LATENTS = [
    *({"family": name} for name in (*FAMILIES, "gaussian+bernoulli")),
    {"family": "vmf", "site": "proj", "objective": "ceb"},
    {"family": "vmf", "site": "proj", "objective": "mcinfonce"},
    {"family": "gaussian", "objective": "hib"},
    {"family": "none", "objective": "dcl"},
    {"family": "none", "objective": "vicreg"},
    {"family": "vmf", "site": "proj", "objective": "ceb", "posterior_scale": "fixed", "init_scale": 16.0},
    {"family": "bernoulli", "estimator": "relaxed"},
]


def named(latent: dict[str, Any]) -> str:
    return "-".join(map(str, latent.values()))


@pytest.mark.parametrize("latent", LATENTS, ids=named)
def test_pretraining_runs_with_every_family_and_objective(digits, tmp_path, latent):
    """Three steps each: it runs, its figures are finite, its codes as long as they say, it loads again."""
    base = PRESETS["digits"]
    settings = dataclasses.replace(
        base, data=digits["test"], out=tmp_path / "run", epochs=1, threads=1,
        latent=dataclasses.replace(base.latent, samples=2, **latent),
    )  # fmt: skip
    pretrain(settings)
    row = read_metrics(settings.out / "metrics.jsonl")[-1]
    assert all(math.isfinite(value) for value in row.values())
    run = load_run(settings.out)
    found = embed(run.network, open_reader(digits["test"]), settings.view)
    assert found.bits == run.network.family.code_bits(run.network.dim)
    assert (
        found.codes.shape == (len(found.labels), -(-found.bits // 8)) and np.isfinite(found.uncertainty).all()
    )


@pytest.mark.parametrize(
    "latent",
    [pytest.param(l, marks=() if named(l) in BRIEFLY else pytest.mark.slow) for l in LATENTS],
    ids=named,
)
def test_pretraining_beats_the_random_encoder_by_ten_points(digits, tmp_path, latent):
    base, family = PRESETS["digits"], named(latent)
    settings = dataclasses.replace(
        base,
        data=digits["train"],
        out=tmp_path / family,
        epochs=15 if family in BRIEFLY else base.epochs,
        latent=dataclasses.replace(base.latent, **latent),
    )
    torch.manual_seed(settings.seed)
    random = LVNet(settings.model, settings.latent, settings.view.resolution)
    calibrate_batch_statistics(random, open_reader(digits["train"]), settings.view)
    floor = accuracy(random, digits)
    pretrain(settings)
    reached = accuracy(load_run(settings.out).network, digits)
    print(f"{family}: random {floor:.1f} %, pretrained {reached:.1f} %")
    assert reached >= floor + 10
