"""A digits encoder, trained for a few epochs, for the tests of the stages."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from lvssl.settings.pretrain import PRESETS
from lvssl.training.pretrain import pretrain


@pytest.fixture(scope="session")
def pretrained(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "run"
    pretrain(dataclasses.replace(PRESETS["digits"], data=digits["train"], out=out, epochs=6, threads=1))
    return out


@pytest.fixture
def run(pretrained, tmp_path) -> Path:
    """Return a separate copy, for results."""
    return Path(shutil.copytree(pretrained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """Run every test of a stage on one thread."""
