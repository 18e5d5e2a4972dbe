"""Jobs on this machine that are stopped between two starts, or while others are still being submitted."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit
from chains import CONVERTED  # type: ignore[import-not-found]

from lvssl.commands.chain import chain_starts
from slurm.job import Job
from slurm.launch import run_some
from slurm.pipeline import ClusterSettings, Pipeline, read_pipeline
from slurm.records import Record, read_record
from slurm.stages import Task, build_stages
from slurm.work import Work

FILE = f"""
name = "tiny"
out = "out"
{CONVERTED}[pretrain]
preset = "digits"
"""


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    (tmp_path / "pipeline.toml").write_text(FILE)
    return read_pipeline(tmp_path / "pipeline.toml", chain_starts())


def task_of(pipeline: Pipeline, module: str) -> Task:
    """The pretraining's task, but of another module."""
    (task,) = (each for stage in build_stages(pipeline) for each in stage.tasks if each.name == "pretrain")
    return dataclasses.replace(task, module=module, arguments=(), reads=())


def test_stopped_after_a_crash_it_does_not_start_again(pipeline, tmp_path):
    (tmp_path / "crash.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # so that it ends by its crash
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "sys.exit('broken')\n"
    )
    task = task_of(pipeline, "crash")
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5, stderr_to_stdout=True)
    job = executor.submit(Job(pipeline.out, task, ClusterSettings(crashes=2), tmp_path))
    job.wait()
    record = read_record(pipeline.out, task)
    assert record is not None and (record.state, record.crashes) == ("stopped", 1)
    log = Path(record.log).read_text()
    assert log.count("pipeline: pretrain: start") == 1 and "`lvssl launch` starts it again" in log


class StoppedWhileStarting(Job):
    """A job that gets SIGTERM right before its process starts."""

    def command(self) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().command()


@pytest.mark.parametrize("kind", [Job, StoppedWhileStarting])
def test_stopped_before_or_while_its_process_starts_it_hears_of_it(pipeline, tmp_path, kind):
    (tmp_path / "long.py").write_text("import pathlib, time\ntime.sleep(20)\npathlib.Path('end').touch()\n")
    task = task_of(pipeline, "long")
    job = kind(pipeline.out, task, ClusterSettings(), tmp_path)
    job.kind = "local"
    numbers = signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        job.listen()
        if kind is Job:
            os.kill(os.getpid(), signal.SIGTERM)
        outcome = job.with_processes(Record(task.name, task.digest))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert outcome.stopped and not outcome.saved and not (tmp_path / "end").exists()


class StoppedAfterTheFirst(list):
    """Jobs whose submission is interrupted by a SIGTERM to this process."""

    def __iter__(self) -> Iterator[Job]:
        for call in super().__iter__():
            yield call
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_while_jobs_are_submitted_all_of_them_hear_of_it(pipeline, tmp_path, capsys):
    (tmp_path / "long.py").write_text("import pathlib, time\ntime.sleep(60)\npathlib.Path('end').touch()\n")
    task = task_of(pipeline, "long")
    (stage,) = (stage for stage in build_stages(pipeline) if stage.name == "pretrain")
    tasks = [dataclasses.replace(task, digest=digest) for digest in ("1" * 8, "2" * 8)]
    calls = StoppedAfterTheFirst(Job(pipeline.out, each, stage.cluster, tmp_path) for each in tasks)
    with pytest.raises(SystemExit) as stopped:
        run_some(pipeline, Work(stage, tuple(tasks)), calls, "local")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(list((pipeline.out / "jobs" / "pretrain").glob("*_submitted.pkl"))) == 1
    assert not (tmp_path / "end").exists()
    assert capsys.readouterr().err.splitlines() == ["pretrain: stopped; launch again to go on"]
