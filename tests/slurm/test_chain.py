"""The chain on a real Slurm: to the report, through preemption, kills, drained nodes and time limits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chains import CONVERTED, Chain, until  # type: ignore[import-not-found]

from lvssl.runs import checkpoint
from lvssl.runs.rows import by_point
from slurm.records import read_jobs
from slurm.snapshot import PACKAGES

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

HEAD = """
name = "tiny"
out = "out"
[cluster]
time = 30
warning = 20
environment = { OMP_NUM_THREADS = "1" }
"""
TRAINED = """
[pretrain]
preset = "digits"
epochs = 12
batch_size = 64
threads = 1
log_every = 1
checkpoint_minutes = 0.5
"""


def on(digits: dict[str, Path]) -> str:
    return f'[data]\ntrain = "{digits["train"]}"\ntest = "{digits["test"]}"\n'


def weights(chain: Chain) -> dict[str, torch.Tensor]:
    found = checkpoint.load_latest(chain.task("pretrain").run / "checkpoints")
    assert found is not None
    return found[1]["network"] | {"step": torch.tensor(found[1]["step"])}


def assert_same_weights(chain: Chain, reference: dict[str, torch.Tensor]) -> None:
    mine = weights(chain)
    assert mine.keys() == reference.keys()
    assert [name for name in mine if not torch.equal(mine[name], reference[name])] == []


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True)


def send(signal_name: str, job: str) -> None:
    subprocess.run(["scancel", "-s", signal_name, job], check=True)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> Chain:
    """The whole chain, from images to report, in a folder whose name is no easy one."""
    folder = tmp_path_factory.mktemp("whole") / """it's "odd"; echo foo"""
    folder.mkdir()
    (folder / "pipeline.toml").write_text(HEAD + CONVERTED + TRAINED + "[evaluate]\n")
    chain = Chain(folder / "pipeline.toml")
    first = chain.launch()
    assert [line.split()[0] for line in first.splitlines()][:5] == [
        "convert",
        "merge",
        "pretrain",
        "evaluate",
        "report",
    ]
    jobs = read_jobs(chain.out)
    again = chain.launch()  # at once, with nothing done yet or all of it under way
    assert read_jobs(chain.out) == jobs and "in progress as job" in again
    chain.wait("report", "done", "failed")
    return chain


@pytest.fixture(scope="module")
def reference(undisturbed) -> dict[str, torch.Tensor]:
    return weights(undisturbed)


def test_the_whole_chain_to_a_report(undisturbed):
    assert {undisturbed.state(stage) for stage in undisturbed.stages} == {"done"}
    run = undisturbed.task("pretrain").run
    figures = json.loads((run / "evaluation.json").read_text())
    (features,) = by_point(figures["rows"], run=figures["run"]["name"], representation="features")
    assert f"{features['linear']:.1f}" in (run / "report.html").read_text()
    table = undisturbed.status()
    assert re.search(r" (\d+)/\1 ", table) and table.count("done") == 5 and "loss" in table, table
    betons = sorted(path.name for path in undisturbed.out.glob("data-*/*"))
    assert betons == [
        "test.beton",
        "test.beton.json",
        "train.beton",
        "train.beton.json",
    ]  # the parts are gone
    jobs = read_jobs(undisturbed.out)
    again = undisturbed.launch()
    assert read_jobs(undisturbed.out) == jobs and len(re.findall(r" done$", again, re.M)) >= 4
    assert undisturbed.run("retry", "evaluate", str(undisturbed.file)).returncode == 2  # it stands


def test_preempted_at_three_random_steps_it_ends_with_the_same_weights(chain, digits, reference):
    mine = chain(HEAD + on(digits) + TRAINED)
    mine.launch()
    chosen = random.Random(0)
    for number in range(3):
        target = mine.step() + chosen.randrange(10, 60)
        until(lambda step=target: mine.step() >= step, mine.status)
        send("USR2", mine.job("pretrain"))
        until(lambda n=number: mine.record("pretrain").restarts == n + 1, mine.status)
        if number == 0:
            assert "1" in mine.status()
    mine.wait("report", "done")
    assert_same_weights(mine, reference)
    record = mine.record("pretrain")
    assert record.restarts == 3 and record.crashes == 0
    steps = [
        json.loads(line)["step"]
        for line in (mine.task("pretrain").run / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, reference["step"].item() + 1))


def test_preempted_by_slurm_itself_it_ends_with_the_same_weights(chain, digits, reference):
    if "urgent" not in subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True).stdout:
        pytest.skip("this cluster has no partition `urgent` that preempts the default one")
    mine = chain(HEAD + on(digits) + TRAINED)
    mine.launch()
    until(lambda: mine.step() >= 30, mine.status)
    words = [
        "sbatch",
        "--wait",
        "-p",
        "urgent",
        "-N",
        "2",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 3",
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=200)
    mine.wait("report", "done")
    assert mine.record("pretrain").restarts == 1 and mine.record("pretrain").crashes == 0
    assert_same_weights(mine, reference)


def test_killed_it_ends_with_the_same_weights(chain, digits, reference):
    mine = chain(HEAD + on(digits) + TRAINED)
    mine.launch()
    until(lambda: mine.step() >= 30, mine.status)
    send("KILL", f"{mine.job('pretrain')}.0")  # the ranks: a crash, of which some are allowed
    until(lambda: mine.record("pretrain").crashes == 1, mine.status)
    until(lambda: mine.step() >= 100, mine.status)
    send("KILL", mine.job("pretrain"))  # the job: Slurm cancels it
    mine.wait("pretrain", "cancelled")
    until(lambda: "not run" in mine.status())
    assert "cancelled" in mine.status() and "lvssl retry pretrain" in mine.status()
    done = mine.run("retry", "pretrain", str(mine.file))
    assert done.returncode == 0, done.stderr
    mine.wait("report", "done")
    assert_same_weights(mine, reference)


def test_drained_and_resumed_it_ends_with_the_same_weights(chain, digits, reference):
    mine = chain(HEAD + on(digits) + TRAINED)
    mine.launch()
    until(lambda: mine.step() >= 30, mine.status)
    nodes = subprocess.run(["sinfo", "-h", "-o", "%N"], capture_output=True, text=True).stdout.split()[0]
    scontrol("update", f"NodeName={nodes}", "State=DRAIN", "Reason=test")
    try:
        send("USR2", mine.job("pretrain"))
        mine.wait("pretrain", "stopped")
        until(lambda: "queued" in mine.status())
        time.sleep(10)
        assert mine.state("pretrain") == "stopped"
    finally:
        scontrol("update", f"NodeName={nodes}", "State=RESUME")
    mine.wait("report", "done")
    assert_same_weights(mine, reference)


def test_at_its_time_limit_it_goes_on_with_the_same_weights(chain, digits, tmp_path):
    """The limit is moved near, since the shortest that Slurm has is a minute; it looks every 30 s."""
    longer = TRAINED.replace("epochs = 12", "epochs = 60")
    mine = chain(HEAD + on(digits) + longer)
    mine.launch()
    whole = tmp_path / "whole"
    options = ["--preset", "digits", "--epochs", "60", "--batch-size", "64", "--threads", "1"]
    words = [
        sys.executable,
        "-m",
        "lvssl",
        "pretrain",
        *options,
        "--data",
        digits["train"],
        "--out",
        whole,
    ]
    undisturbed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: mine.step() >= 5, mine.status)
    scontrol("update", f"JobId={mine.job('pretrain')}", "EndTime=now+25seconds")
    until(lambda: mine.record("pretrain").restarts == 1, mine.status)
    scontrol("update", f"JobId={mine.job('pretrain')}", "TimeLimit=30")
    mine.wait("report", "done")
    assert undisturbed.wait() == 0
    found = checkpoint.load_latest(whole / "checkpoints")
    assert_same_weights(mine, found[1]["network"] | {"step": torch.tensor(found[1]["step"])})


SHORT = TRAINED.replace("epochs = 12", "epochs = 1")


def test_what_failed_stops_what_follows_and_retry_goes_on(chain, digits):
    mine = chain(HEAD + on(digits) + SHORT + 'family = "none"\n[evaluate]\ncontrol = "control"\n')
    mine.launch()
    mine.wait("evaluate", "failed")
    until(lambda: "not run" in mine.status())
    table = mine.status()
    assert "control: no such run folder" in table and "evaluate failed" in table and "retry evaluate" in table
    assert mine.record("evaluate").crashes == 1  # bad input isn't tried again
    pretrained = mine.record("pretrain")
    (mine.file.parent / "control").symlink_to(mine.task("pretrain").run)
    assert mine.run("retry", "evaluate", str(mine.file)).returncode == 0
    mine.wait("report", "done")
    assert mine.record("pretrain") == pretrained  # not done again
    assert mine.run("retry", "evalute", str(mine.file)).returncode == 2


SWEEP = """
[knn]
[linear]
[finetune]
epochs = 1
lr = [0.05]
weight_decay = [0.0]
threads = 1
[finetune.sweep]
grid = { label_fraction = [0.2, 1.0] }
"""


def test_measures_and_a_sweep_follow_the_pretraining(chain, digits):
    mine = chain(HEAD + on(digits) + SHORT + SWEEP)
    mine.launch()
    mine.wait("report", "done")
    table = (mine.out / "finetune-sweep.md").read_text()
    assert len(table.splitlines()) == 4 and "label_fraction=0.2" in table and " - " not in table, table
    assert all(task.outputs[0].exists() for stage in mine.stages.values() for task in stage.tasks)
    jobs = read_jobs(mine.out)
    mine.file.write_text(
        mine.file.read_text().replace("label_fraction = [0.2, 1.0]", "label_fraction = [0.2, 1.0, 0.5]")
    )
    assert "2 tasks are done" in mine.launch()  # one point more is one job more, and another report
    mine.wait("report", "done")
    again = read_jobs(mine.out)
    assert {again[key]["task"] for key in again if again[key] != jobs.get(key)} == {"finetune-03", "report"}
    assert len((mine.out / "finetune-sweep.md").read_text().splitlines()) == 5


TWO_NODES = "[pretrain.cluster]\nnodes = 2\n"


def test_two_nodes_train_as_one_and_end_together(chain, digits):
    """Undisturbed, beside a run whose ranks are told to stop once, and one of whose ranks is killed once."""
    text = HEAD + on(digits) + TRAINED.replace("epochs = 12", "epochs = 5") + TWO_NODES
    whole, mine = (chain(text, name) for name in ("whole", "disturbed"))
    whole.launch()
    mine.launch()
    until(lambda: mine.step() >= 20, mine.status)
    job = mine.job("pretrain")
    nodes = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%D"], capture_output=True, text=True
    ).stdout.strip()
    assert nodes == "2"
    send("USR2", job)
    until(lambda: mine.record("pretrain").restarts == 1, mine.status)
    until(lambda: mine.step() >= 60, mine.status)
    kill_rank(1, mine.job("pretrain"))
    until(lambda: mine.record("pretrain").crashes == 1, mine.status)
    for each in (whole, mine):
        each.wait("report", "done")
    assert_same_weights(mine, weights(whole))
    assert mine.record("pretrain").restarts == 1 and mine.record("pretrain").crashes == 1


def kill_rank(rank: int, job: str) -> None:
    """SIGKILL to one process of a job's step, which a machine's failure would be."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job}".encode()}
        if wanted <= set(variables) and b"lvssl" in words and b"slurm.rank" not in words:
            os.kill(int(process.name), signal.SIGKILL)


BOX = r"mount -t tmpfs box /mnt && touch /mnt/box && exec \"$@\""
CONTAINED = f"""
[pretrain.cluster]
container = ["unshare", "--mount", "sh", "-c", "{BOX}", "--"]
[pretrain.cluster.environment]
PATH = "{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
"""


def test_ranks_in_a_container_save_and_go_on_as_others(chain, digits, reference):
    """A mount namespace of each rank's own, which the job's supervisor is outside of."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")
    mine = chain(HEAD + on(digits) + TRAINED + CONTAINED, "contained")
    mine.launch()
    until(lambda: mine.step() >= 20, mine.status)
    inside = [p for p in Path("/proc").glob("[0-9]*") if is_rank(p, mine.job("pretrain"))]
    assert inside and all((p / "root/mnt/box").exists() for p in inside) and not Path("/mnt/box").exists()
    send("USR2", mine.job("pretrain"))
    until(lambda: mine.record("pretrain").restarts == 1, mine.status)
    mine.wait("report", "done")
    assert_same_weights(mine, reference)


def is_rank(process: Path, job: str) -> bool:
    """Whether a process of this machine is the command of a rank of a job."""
    try:
        words = (process / "cmdline").read_bytes()
        return b"lvssl" in words.split(b"\0")[:3] and f"SLURM_JOB_ID={job}".encode() in (
            process / "environ"
        ).read_bytes().split(b"\0")
    except OSError:
        return False


def test_a_queued_job_has_the_code_of_its_submission(chain, digits, tmp_path):
    tree = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(
            Path(__file__).parents[2] / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    mine = chain(HEAD + on(digits) + SHORT)
    mine.environment = {"PYTHONPATH": str(tree)}
    scontrol("update", "PartitionName=" + default_partition(), "State=DOWN")
    try:
        mine.launch(cwd=tree)
        for package in PACKAGES:
            for file in (tree / package).rglob("*.py"):
                file.write_text("raise SystemExit('edited since')\n")
    finally:
        scontrol("update", "PartitionName=" + default_partition(), "State=UP")
    mine.environment = {}
    mine.wait("report", "done")


def default_partition() -> str:
    names = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True).stdout.split()
    return next(name.rstrip("*") for name in names if name.endswith("*"))


def test_mistakes_that_only_the_cluster_knows(chain, digits):
    mine = chain(HEAD + on(digits) + SHORT)
    text = mine.file.read_text()
    for old, new, named in [
        (
            "[cluster]",
            '[cluster]\npartition = "gpus"',
            "[pretrain.cluster] partition: the cluster has no 'gpus'; known: ",
        ),
        ("time = 30", 'time = "30-00"', "is longer than partition"),
        ("[cluster]", "[cluster]\ngpus = 1", "gpus: partition"),
        ("[cluster]", '[cluster]\nmemory = "9000G"', "[pretrain.cluster] sbatch: "),
        ("[cluster]", '[cluster]\nconstraint = "nosuch"', "[pretrain.cluster] sbatch: "),
    ]:
        mine.file.write_text(text.replace(old, new, 1))
        done = mine.run("launch", str(mine.file))
        assert done.returncode == 2 and named in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and read_jobs(mine.out) == {}


def test_two_launches_at_once_and_a_changed_setting_under_way(chain, digits):
    mine = chain(HEAD + on(digits) + TRAINED)
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "lvssl", "launch", str(mine.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [each.communicate(timeout=120) for each in both]
    assert any(each.returncode == 0 for each in both), said
    queue = subprocess.run(["squeue", "-h", "-o", "%Z %j"], capture_output=True, text=True).stdout
    assert len([line for line in queue.splitlines() if str(mine.out) in line]) == 2, (
        queue
    )  # pretrain and report
    mine.file.write_text(mine.file.read_text().replace("epochs = 12", "epochs = 13"))
    done = mine.run("launch", str(mine.file))
    assert (
        done.returncode == 2 and "is running pretrain with other settings: `lvssl cancel` it" in done.stderr
    )
    mine.file.write_text(mine.file.read_text().replace("epochs = 13", "epochs = 12"))
    done = mine.run("cancel", str(mine.file))
    assert done.returncode == 0 and "pretrain (" in done.stdout
    assert "no job of this pipeline" in mine.run("cancel", str(mine.file)).stdout


def test_without_slurm_the_same_files_and_the_same_weights(chain, digits, tmp_path):
    """submitit's local executor, and one process; it resumes after a stop in between."""
    local, debug = (
        chain(HEAD + on(digits) + SHORT.replace("epochs = 1", "epochs = 6") + "[evaluate]\n", name)
        for name in ("local", "debug")
    )
    words = [sys.executable, "-m", "lvssl", "launch", str(local.file), "--cluster", "local"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    until(lambda: local.step() >= 10, lambda: str(running.poll()))
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "stopped; launch again to go on" in said
    assert local.state("pretrain") == "stopped"
    local.launch("--cluster", "local")
    debug.launch("--cluster", "debug")
    assert_same_weights(local, weights(debug))
    names = [
        {str(p.relative_to(c.task("pretrain").run)) for p in c.task("pretrain").run.iterdir()}
        for c in (local, debug)
    ]
    assert names[0] == names[1] and "report.html" in names[0]
    assert {local.state(stage) for stage in local.stages} == {"done"} and "0  " in local.status()


def test_a_second_cluster_for_tests_waits_for_the_first():
    """It would share the first one's folder, and stop its daemons."""
    folder = Path(f"/tmp/lvssl-slurm-{os.getuid()}")
    if os.environ.get("SLURM_CONF") != str(folder / "slurm.conf") or not folder.with_suffix(".lock").exists():
        pytest.skip("needs the cluster that `make test-slurm` starts")
    command = [Path(__file__).parents[2] / "tools/slurm_cluster.sh", "run", "true"]
    elsewhere = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    options = {"stderr": subprocess.PIPE, "text": True, "env": elsewhere, "start_new_session": True}
    with subprocess.Popen(command, **options) as second:
        assert "waiting for another" in second.stderr.readline()
        os.killpg(second.pid, signal.SIGTERM)
