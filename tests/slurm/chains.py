"""A pipeline as users run it: a pipeline file and the commands typed for it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lvssl.commands.chain import chain_starts
from slurm.pipeline import read_pipeline
from slurm.records import Record, read_jobs, read_record
from slurm.stages import Stage, Task, build_stages

CONVERTED = """
[convert]
shards = 2
[convert.train]
source = "sklearn:digits"
[convert.test]
source = "sklearn:digits"
split = "test"
shards = 1
"""
PATIENCE = 420.0  # seconds after which something that must happen counts as failed


@dataclass
class Chain:
    """A pipeline file and the commands that a user types."""

    file: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "lvssl", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | self.environment
        return subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=cwd
        )

    def launch(self, *options: str, **more: Path) -> str:
        done = self.run("launch", str(self.file), *options, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> str:
        done = self.run("status", str(self.file))
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def out(self) -> Path:
        return self.file.parent / "out"

    @property
    def stages(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in build_stages(read_pipeline(self.file, chain_starts()))}

    def task(self, stage: str) -> Task:
        return self.stages[stage].tasks[0]

    def job(self, stage: str) -> str:
        return read_jobs(self.out)[self.task(stage).key]["job"]

    def record(self, stage: str) -> Record:
        record = read_record(self.out, self.task(stage))
        assert record is not None, f"nothing is recorded of {stage}"
        return record

    def state(self, stage: str) -> str:
        record = read_record(self.out, self.task(stage))
        return record.state if record else "new"

    def log(self, stage: str) -> str:
        log = Path(read_jobs(self.out)[self.task(stage).key]["log"])
        return log.read_text() if log.exists() else f"{log}: not begun"

    def step(self) -> int:
        """Last step in the run's metrics.jsonl."""
        metrics = self.task("pretrain").run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines and '"step": ' in lines[-1] else 0

    def wait(self, stage: str, *states: str) -> None:
        until(
            lambda: self.state(stage) in states,
            lambda: f"{stage} is {self.state(stage)}\n{self.status()}\n{self.log(stage)}",
        )


def until(condition: Callable[[], bool], otherwise: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {otherwise()}"
        time.sleep(0.1)
