"""Data that several rooms' tests share, made by the project's own converter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.convert.conversion import ConvertOptions, convert


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> dict[str, Path]:
    """scikit-learn's digits as train and test betons."""
    folder = tmp_path_factory.mktemp("digits")
    paths = {split: folder / f"{split}.beton" for split in ("train", "test")}
    for split, path in paths.items():
        convert("sklearn:digits", path, options=ConvertOptions(split=split))
    return paths


@pytest.fixture
def lvssl():
    """Runs the command in a process of its own, on one thread: lvssl("pretrain", ...) -> CompletedProcess."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lvssl.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
            **options,
        )

    return run
