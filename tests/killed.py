"""Helpers for tests that stop a training midway."""

import subprocess
import time
from pathlib import Path

from lvssl.runs import checkpoint

# Seconds after which something that must happen counts as failed. Compiling the loader's kernels takes about
# a minute of one core, in a fresh checkout and before the first step; other work may leave a tenth of it.
PATIENCE = 600


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the process has written a new checkpoint."""
    before = checkpoint.paths(folder / "checkpoints")[-1:]
    deadline = time.monotonic() + PATIENCE
    while checkpoint.paths(folder / "checkpoints")[-1:] == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
