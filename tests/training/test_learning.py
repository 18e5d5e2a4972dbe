"""Does it learn? On digits with 100 labels, every family must beat its own random encoder by 10 points."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lvssl.config import PRESETS
from lvssl.evaluation.embedding import calibrate_batch_statistics, embed
from lvssl.evaluation.probe import linear_probe
from lvssl.models.network import LVNet
from lvssl.training.pretrain import pretrain
from lvssl.training.run import load_run
from pipelines.sources import open_source

LABELS_A_CLASS = 10


def accuracy(network: LVNet, digits: dict[str, Path]) -> float:
    view = PRESETS["digits"].view
    train, test = (embed(network, open_source(digits[split]), view) for split in ("train", "test"))
    labelled = np.concatenate([np.flatnonzero(train.labels == c)[:LABELS_A_CLASS] for c in range(10)])
    return linear_probe(train.features[labelled], train.labels[labelled], test.features, test.labels).accuracy


@pytest.mark.parametrize("family", ["none", "gaussian", "bernoulli"])
def test_pretraining_beats_the_random_encoder_by_ten_points(digits, tmp_path, family):
    base = PRESETS["digits"]
    settings = dataclasses.replace(
        base,
        data=digits["train"],
        out=tmp_path / family,
        latent=dataclasses.replace(base.latent, family=family),
    )
    torch.manual_seed(settings.seed)
    random = LVNet(settings.model, settings.latent, settings.view.resolution)
    calibrate_batch_statistics(random, open_source(digits["train"]), settings.view)
    floor = accuracy(random, digits)
    pretrain(settings)
    reached = accuracy(load_run(settings.out).network, digits)
    print(f"{family}: random {floor:.1f} %, pretrained {reached:.1f} %")
    assert reached >= floor + 10
