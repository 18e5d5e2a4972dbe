"""Slurm that fails or doesn't answer says nothing about a job: not that there is none."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lvssl.commands.chain import chain_starts
from lvssl.commands.main import main
from slurm import scheduler
from slurm.job import Job
from slurm.launch import build_stages, plan
from slurm.pipeline import ClusterSettings, read_pipeline
from slurm.records import Record, write_json, write_record

FAILS = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
HANGS = "exec sleep 600"
EMPTY = "exit 0"
HINT = "slurm_load_jobs error: Unable to contact slurm controller"


@pytest.mark.parametrize("command", [["launch"], ["launch", "--dry-run"], ["cancel"], ["retry", "pretrain"]])
def test_nothing_is_begun_or_ended_on_what_is_unknown(squeue, file, tmp_path, capsys, command):
    squeue(FAILS)
    assert main([*command, str(file)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: it is unknown whether job 7 is queued or running: squeue: ")
        and HINT in error
    )
    assert error.count("\n") == 1 and "jobs.json" in error
    assert not (tmp_path / "cancelled").exists() and not (tmp_path / "submitted").exists()


def test_status_says_that_it_is_unknown(squeue, file, capsys):
    squeue(FAILS)
    assert main(["status", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain"))
    assert "unknown (Slurm doesn't answer)" in line


def test_no_answer_in_time_and_no_squeue_at_all_are_unknown_an_empty_queue_is_none(squeue, file, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: run(*a, **{**k, "timeout": k["timeout"] / 200}))
    squeue(HANGS)
    with pytest.raises(scheduler.UnknownQueue, match="7 is queued or running: Slurm doesn't answer"):
        scheduler.states({"7"})
    squeue(EMPTY)
    assert scheduler.states({"7"}) == {} and not scheduler.alive("7", "elsewhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(scheduler.UnknownQueue, match="no Slurm here"):
        scheduler.states({"7"})
    assert scheduler.states(set()) == {}


def test_a_chain_of_this_machine_needs_no_slurm(file, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    pipeline = read_pipeline(file, chain_starts())
    jobs = pipeline.out / "jobs.json"
    jobs.write_text(jobs.read_text().replace('"slurm"', '"local"'))
    assert all(work.tasks for work in plan(pipeline.out, build_stages(pipeline)))


@pytest.mark.parametrize("cluster", ["local", ""])
@pytest.mark.parametrize("words", [[sys.executable, "-c", "input() # submitit"], ["cat"]])
def test_slurm_is_not_asked_about_a_job_of_this_machine(squeue, file, capsys, words, cluster):
    """Its tools may be installed where no cluster answers; the process is known without them. An older
    record doesn't name the cluster."""
    squeue(FAILS)
    pipeline = read_pipeline(file, chain_starts())
    (task,) = (t for stage in build_stages(pipeline) for t in stage.tasks if t.name == "pretrain")
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        here, number = socket.gethostname(), str(process.pid)
        record = Record(task.name, task.digest, "running", number, here, cluster, log="log")
        write_record(pipeline.out, task, record)
        jobs = pipeline.out / "jobs.json"
        entry = {"task": "pretrain", "job": number, "log": "log", "cluster": "local"}
        write_json(jobs, {task.key: entry})
        runs = words != ["cat"]  # a process that has got the number of an earlier job
        assert main(["status", str(file)]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain "))
        assert line.split()[1] == ("running" if runs else "lost")
        job = Job(pipeline.out, task, ClusterSettings(), Path("/code"))
        job.kind, job.id, job.log = "local", "8", Path("log")
        if runs:
            with pytest.raises(SystemExit):
                job.begin()
            assert f"job {number} on {here} is already running this task" in capsys.readouterr().out
        else:
            assert job.begin().cluster == "local"
        process.communicate(b"\n")


@pytest.mark.parametrize("script, refused", [(FAILS, True), (EMPTY, False)])
def test_a_job_does_not_begin_beside_one_that_may_be_at_its_task(squeue, file, capsys, script, refused):
    pipeline = read_pipeline(file, chain_starts())
    (task,) = (t for stage in build_stages(pipeline) for t in stage.tasks if t.name == "pretrain")
    write_record(pipeline.out, task, Record(task.name, task.digest, "running", job="7", host="elsewhere"))
    job = Job(pipeline.out, task, ClusterSettings(), Path("/code"))
    job.kind, job.id, job.log = "slurm", "8", Path("log")
    squeue(script)
    if refused:
        with pytest.raises(SystemExit):
            job.begin()
        said = capsys.readouterr().out
        assert "it is unknown whether job 7 is queued or running" in said and "on elsewhere" in said
    else:
        assert job.begin().host == socket.gethostname()
