"""What `launch` submits, and after which jobs: a sbatch that keeps the scripts stands for Slurm's."""

import os
import re
from pathlib import Path

import pytest

from lvssl.commands.chain import chain_starts
from lvssl.commands.main import main
from slurm.launch import plan
from slurm.pipeline import read_pipeline
from slurm.records import read_jobs, read_json, write_json
from slurm.snapshot import snapshot
from slurm.stages import build_stages

SBATCH = """
[ "$1" = --test-only ] && exit 0
job=$((100 + $(ls {folder} | wc -l)))
{{ cat "$1"; env; }} >{folder}/$job
echo "Submitted batch job $job"
"""


@pytest.fixture
def submitted(squeue, tmp_path):
    """submitted() -> {stage: (job, the jobs that it waits for, script and environment)}."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    squeue(SBATCH.format(folder=folder), "sbatch")

    def found() -> dict[str, tuple[str, set[str], str]]:
        stages = {}
        for path in folder.iterdir():
            text = path.read_text()
            name, after = (re.search(rf"--{key}=(\S+)", text) for key in ("job-name", "dependency"))
            assert name is not None
            waits = set() if after is None else {*after[1].removeprefix("afterok:").split(":")}
            stages[name[1].removeprefix("tiny-")] = path.name, waits, text
        return stages

    return found


def test_each_stage_waits_for_those_that_it_depends_on(squeue, file, submitted, monkeypatch):
    (file.parent / "out" / "jobs.json").unlink()
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION"):  # as within a job
        monkeypatch.setenv(name, "outer")
    squeue("exit 0")
    assert main(["launch", str(file)]) == 0
    found = submitted()
    jobs = {stage: job for stage, (job, _, _) in found.items()}
    waits = {"convert": [], "merge": ["convert"], "pretrain": ["merge"], "evaluate": ["pretrain"]}
    waits |= {"report": ["evaluate"]}
    assert {stage: after for stage, (_, after, _) in found.items()} == {
        stage: {jobs[name] for name in names} for stage, names in waits.items()
    }
    assert not any("outer" in text for _, _, text in found.values()) and os.environ["SLURM_JOB_ID"] == "outer"
    tasks = [task for stage in build_stages(read_pipeline(file, chain_starts())) for task in stage.tasks]
    noted = read_jobs(file.parent / "out")
    assert [noted[task.key]["job"].split("_")[0] for task in tasks] == [
        jobs[task.name.split("-")[0]] for task in tasks
    ]


def test_what_is_in_progress_is_waited_for_and_not_submitted_again(squeue, file, submitted):
    squeue("echo '7|RUNNING|None'")
    assert main(["launch", str(file)]) == 0
    found = submitted()
    jobs = {stage: job for stage, (job, _, _) in found.items()}
    assert jobs.keys() == {"convert", "merge", "evaluate", "report"}
    assert found["evaluate"][1] == {jobs["convert"], jobs["merge"], "7"}  # it reads the images


@pytest.mark.parametrize("state, reason, shown", [
    ("PENDING", "Priority", "queued (Priority)"),
    ("PENDING", "Dependency", "waiting"),
    ("RUNNING", "None", "running"),
    ("REQUEUE_HOLD", "None", "running"),
    ("FAILED", "NonZeroExitCode", ""),
])  # fmt: skip
def test_a_job_counts_as_in_progress_while_it_is_queued_or_runs(squeue, file, capsys, state, reason, shown):
    squeue(f"echo '7|{state}|{reason}'")
    pipeline = read_pipeline(file, chain_starts())
    (work,) = (w for w in plan(pipeline.out, build_stages(pipeline)) if w.stage.name == "pretrain")
    assert (work.under_way, len(work.tasks)) == ((("7",), 0) if shown else ((), 1))
    assert main(["status", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain "))
    assert re.split(r"  +", line)[1] == (shown or "not run")


def test_a_job_with_other_settings_is_not_overtaken(squeue, file, submitted, capsys):
    jobs: Path = file.parent / "out" / "jobs.json"
    (entry,) = read_jobs(jobs.parent).values()
    write_json(jobs, {"pretrain-00000000": entry})
    squeue("echo '7|RUNNING|None'")
    assert main(["launch", str(file)]) == 2
    assert "job 7 is running pretrain with other settings" in capsys.readouterr().err and not submitted()


def test_a_stage_is_tried_again_with_the_preset_of_the_launch(squeue, file, submitted):
    squeue("exit 0")
    noted = file.parent / "out" / "launch.json"
    write_json(noted, {"preset": "fashion-mnist"})
    assert main(["retry", "pretrain", str(file)]) == 0
    assert read_json(noted) == {"preset": "fashion-mnist"} and "pretrain" in submitted()


def test_cancel_ends_what_is_queued_or_runs_and_nothing_else(squeue, file, tmp_path, capsys):
    jobs = file.parent / "out" / "jobs.json"
    (entry,) = read_jobs(jobs.parent).values()
    write_json(jobs, {f"pretrain-{job}": entry | {"job": job} for job in ("6", "7", "8_0")})
    squeue(f"[ -e {tmp_path}/cancelled ] || printf '6|COMPLETED|None\\n7|RUNNING|None\\n8_0|PENDING|None\\n'")
    squeue(f'echo "$@" >{tmp_path}/cancelled', "scancel")
    assert main(["cancel", str(file)]) == 0
    assert (tmp_path / "cancelled").read_text() == "8_0 7\n"  # what follows before what it waits for
    assert "cancelled: pretrain (7), pretrain (8_0)" in capsys.readouterr().out


def test_changed_code_is_another_copy(tmp_path, monkeypatch):
    """A job that was queued before keeps its own."""
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr("slurm.snapshot.source_files", lambda: {"lvssl/a.py": tmp_path / "a.py"})
    first = snapshot(tmp_path)
    assert snapshot(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert [(at / "lvssl/a.py").read_text() for at in (first, snapshot(tmp_path))] == ["1", "2"]
