"""A real Slurm for the tests marked `slurm`, and how they use it; for the others, commands of its names."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chains import Chain
from test_pipeline_file import write

from lvssl.commands.chain import chain_starts
from slurm import scheduler
from slurm.pipeline import read_pipeline
from slurm.records import read_jobs, write_json
from slurm.stages import build_stages


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip if no cluster answers; `make test-slurm` starts one."""
    answer = ""
    if shutil.which("sinfo"):
        answer = subprocess.run(
            ["sinfo", "-h", "-o", "%n"], capture_output=True, text=True, timeout=30
        ).stdout
    if not answer.strip():
        pytest.skip("no Slurm answers here; `make test-slurm` starts one on this machine")


@pytest.fixture
def chain(tmp_path) -> Iterator[Callable[..., Chain]]:
    """Make a pipeline in its own folder, chain(TEXT), and cancel its remaining jobs afterwards."""
    made = []

    def make(text: str, name: str = "chain") -> Chain:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.toml").write_text(text)
        made.append(Chain(tmp_path / name / "pipeline.toml"))
        return made[-1]

    yield make
    for each in made:
        jobs = {job["job"].split("_")[0] for job in read_jobs(each.out).values() if job["cluster"] == "slurm"}
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """squeue(SCRIPT) puts a command of that name first in the PATH, and a scancel that must not be called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(scheduler, "PAUSE", 0.01)

    def made(script: str, name: str = "squeue") -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    made(f"touch {tmp_path}/cancelled", "scancel")
    made("echo 'part*|1-00:00:00|x|(null)'", "sinfo")
    made(f"touch {tmp_path}/submitted", "sbatch")
    return made


@pytest.fixture
def file(tmp_path) -> Path:
    """A pipeline whose pretraining was submitted as job 7."""
    path = write(tmp_path)
    pipeline = read_pipeline(path, chain_starts())
    (task,) = (t for stage in build_stages(pipeline) for t in stage.tasks if t.name == "pretrain")
    write_json(
        pipeline.out / "jobs.json",
        {task.key: {"task": "pretrain", "job": "7", "log": "log", "cluster": "slurm"}},
    )
    return path
