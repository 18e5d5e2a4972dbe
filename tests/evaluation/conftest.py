"""A run and its control as pretraining leaves them, with untrained weights but balanced bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet
from lvssl.runs import checkpoint
from lvssl.runs.run import create_run
from lvssl.settings.pretrain import preset
from pipelines.decode import open_reader
from pipelines.loader import evaluation_crops


def untrained(folder: Path, train: Path, family: str) -> Path:
    settings = preset("digits")
    latent = replace(settings.latent, family=family)
    settings = replace(settings, data=train, out=folder, latent=latent)
    create_run(settings, 10, resume=False)
    torch.manual_seed(0)
    network = LVNet(settings.model, settings.latent, settings.view.resolution, 10)
    crops = evaluation_crops(open_reader(train), settings.view, np.arange(500))
    images = torch.from_numpy(crops).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.train()(images, keyed(0, len(images)))
        network.eval()
        network.head.calibrate(network.backbone(images))
    checkpoint.save(folder / "checkpoints", 1, {"network": network.state_dict(), "step": 1})
    return folder


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("runs") / "untrained", digits["train"], "bernoulli")


@pytest.fixture(scope="module")
def control(digits, run) -> Path:
    return untrained(run.parent / "control", digits["train"], "none")
