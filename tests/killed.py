"""Helpers for tests that stop a training midway."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

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


def interrupt_after(monkeypatch: Any, trainer: type, steps: int, number: int = signal.SIGTERM) -> None:
    """The signal arrives in the middle of the trainer's step that is the `steps`-th from now."""
    left, step = [steps], trainer.train_step

    def counted(self, batch):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return step(self, batch)

    monkeypatch.setattr(trainer, "train_step", counted)
