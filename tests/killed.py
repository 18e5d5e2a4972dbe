"""For tests that stop a training in its midst."""

import subprocess
import time
from pathlib import Path

from lvssl.runs import checkpoint


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Until the process has written a checkpoint that wasn't there."""
    before = checkpoint.paths(folder / "checkpoints")[-1:]
    deadline = time.monotonic() + 120
    while checkpoint.paths(folder / "checkpoints")[-1:] == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
