"""Fixtures shared by all tests; data is made by the project's own converter."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipelines.convert.conversion import ConvertOptions, convert


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> dict[str, Path]:
    """Return scikit-learn's digits as train and test betons."""
    folder = tmp_path_factory.mktemp("digits")
    paths = {split: folder / f"{split}.beton" for split in ("train", "test")}
    for split, path in paths.items():
        convert("sklearn:digits", path, options=ConvertOptions(split=split))
    return paths


@pytest.fixture
def lvssl():
    """Run a command in its own process, on one thread: lvssl("pretrain", ...) -> CompletedProcess."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lvssl", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
            **options,
        )

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, so that sums have a fixed order."""

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path, request) -> Iterator[Path]:
    """Mount a file system of 8 MiB, or of the size in MiB given by an indirect parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 8)}m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"mounting isn't permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def fill(small_disk) -> Callable[[], Path]:
    """Fill the small disk to the last byte with a file, and return the file."""

    def to_the_last_byte() -> Path:
        ballast = small_disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return ballast

    return to_the_last_byte
