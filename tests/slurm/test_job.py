"""How a job ends: what counts as done, what is tried again, and what a launch on this machine says of it."""

import dataclasses
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from test_pipeline_file import write

from lvssl.commands.chain import chain_starts
from lvssl.commands.main import main
from slurm.job import BAD_INPUT, Job
from slurm.pipeline import ClusterSettings, read_pipeline
from slurm.records import Record, read_record, stands
from slurm.stages import Task, build_stages

RANK = """
import os, pathlib, sys
names = "RANK", "LOCAL_RANK", "WORLD_SIZE"
pathlib.Path(os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
sys.exit(3 * int(os.environ["RANK"] == "1"))
"""


@pytest.fixture
def job(tmp_path):
    """job(...) -> a job on this machine, of a task of one output, `result`."""

    def made(module: str = "", siblings: tuple[Task, ...] = (), **cluster: int) -> Job:
        part = tmp_path / "a.part-001-of-001.beton"
        task = Task("knn-01", "1" * 64, module, (), (tmp_path / "result",), removes=(part,))
        found = Job(tmp_path, task, ClusterSettings(**cluster), tmp_path, siblings)
        found.kind, found.id, found.log = "local", "8", tmp_path / "log"
        found.log.write_text("error: what is wrong\n")
        return found

    return made


@pytest.mark.parametrize("status, before, again", [(BAD_INPUT, 0, False), (3, 0, True), (3, 1, False)])
def test_a_crash_is_tried_again_as_often_as_allowed_and_bad_input_never(job, status, before, again):
    one = job(crashes=1)
    record = Record(one.task.name, one.task.digest, "running", crashes=before)
    one.signals.append(signal.SIGTERM)  # so that it doesn't wait before the next start
    with nullcontext() if again else pytest.raises(SystemExit) as ended:
        one.crashed(record, status)
    assert again or ended.value.code == 1  # otherwise jobs that depend on this one would start
    written = read_record(one.out, one.task)
    assert written is not None and written.crashes == before + 1 and written.error == "error: what is wrong"
    assert written.state == ("running" if again else "failed")


def test_each_rank_knows_its_place_and_one_that_fails_fails_all(job, tmp_path):
    (tmp_path / "place.py").write_text(RANK)
    one = job("place", tasks_per_node=2)
    outcome = one.with_processes(Record(one.task.name, one.task.digest))
    assert (outcome.status, outcome.stopped) == (3, False)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 2", "1 1 2"]


@pytest.mark.parametrize("ends, status, mark", [
    ("sys.exit(143)", 0, "saved"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 0, "not saved"),  # before it listened
    ("sys.exit(3)", 3, None),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, None),
    ("sys.exit([os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'MASTER_PORT')] != ['1', '0', '77'])", 0, None),
])  # fmt: skip
def test_a_rank_that_was_stopped_is_no_crash(tmp_path, ends, status, mark):
    place = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    command = [sys.executable, "-c", f"import os, signal, sys; {ends}"]
    rank = [sys.executable, "-m", "slurm.rank", str(tmp_path / "mark"), "host", "77", *command]
    assert subprocess.run(rank, env=os.environ | place, check=False).returncode == status
    assert [path.read_text() for path in tmp_path.glob("mark-1")] == ([mark] if mark else [])


def test_done_is_what_has_left_its_outputs(job, tmp_path):
    one = job()
    one = dataclasses.replace(one, siblings=(one.task,))
    one.kind, one.id, one.log = "local", "8", tmp_path / "log"
    (part,) = one.task.removes
    for path in (part, Path(f"{part}.json")):
        path.touch()
    with pytest.raises(SystemExit):
        one.done(Record(one.task.name, one.task.digest))
    record = read_record(one.out, one.task)
    assert record is not None and record.state == "failed" and "result is missing" in record.error
    assert part.exists() and not stands(one.out, one.task)
    one.task.outputs[0].write_text('{"results": {"features": {"top1": 61.25}}}')
    one.done(record)
    assert stands(one.out, one.task) and not list(tmp_path.glob("*.beton*"))
    assert "| knn-01 |  | 61.25 |" in (tmp_path / "knn-sweep.md").read_text()


def test_what_fails_ends_a_launch_on_this_machine(digits, tmp_path, capfd):
    data = "".join(f"{name} = '{path}'\n" for name, path in digits.items())
    text = f"out = 'out'\n[data]\n{data}[pretrain]\npreset = 'digits'\nbatch_size = 5000\n[evaluate]\n"
    path = write(tmp_path, text)
    assert main(["launch", str(path), "--cluster", "debug"]) == 1
    printed, said = capfd.readouterr()
    assert "\nerror: pretrain: " in said and "evaluate" not in printed
    (task,) = next(s for s in build_stages(read_pipeline(path, chain_starts())) if s.name == "pretrain").tasks
    record = read_record(tmp_path / "out", task)
    assert record is not None and record.state == "failed"
