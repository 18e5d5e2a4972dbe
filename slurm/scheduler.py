"""Queries and commands to Slurm, through its command-line tools."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from pipelines.errors import InputError
from slurm.pipeline import ClusterSettings, minutes_of

ALIVE = (
    "PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
    "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
)  # fmt: skip
ELSEWHERE = "submit from the cluster's login node, or use --cluster local"
TRIES, PAUSE = 5, 10.0  # attempts of a job to query another job; seconds between them


class UnknownQueue(InputError):
    """Slurm didn't report its queue, so it is unknown whether a job is in it."""


def ask(*command: str) -> str:
    """Run a command and return its output. Raises InputError with Slurm's message if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise InputError(f"no Slurm here ({command[0]} not found): {ELSEWHERE}") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"Slurm doesn't answer: {command[0]} took more than 60 s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(f"{command[0]}: {lines[-1]}")
    return done.stdout


def check_cluster(table: str, cluster: ClusterSettings) -> None:
    """Raise InputError if Slurm is missing, or lacks the partition, its GPUs, or so long a time limit."""
    if shutil.which("sbatch") is None:
        raise InputError(f"no Slurm here (sbatch not found): {ELSEWHERE}")
    rows = [line.split("|") for line in ask("sinfo", "-h", "-o", "%P|%l|%f|%G").splitlines()]
    partitions = sorted({row[0].rstrip("*") for row in rows})
    default = next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), "")
    name = cluster.partition or default
    if not name:
        raise InputError(
            f"[{table}] partition: the cluster has no default; name one of {', '.join(partitions)}"
        )
    if name not in partitions:
        raise InputError(f"[{table}] partition: the cluster has no {name!r}; known: {', '.join(partitions)}")
    mine = [row for row in rows if row[0].rstrip("*") == name]
    limit = mine[0][1]
    if limit[:1].isdigit() and cluster.minutes > minutes_of(limit):
        raise InputError(f"[{table}] time: {cluster.time} is longer than partition {name} allows ({limit})")
    if cluster.gpus and not any("gpu" in row[3] for row in mine):
        raise InputError(f"[{table}] gpus: partition {name} has none")


def test_submission(table: str, script: str, folder: Path) -> None:
    """Have sbatch check a script (account, nodes, memory) without submitting it. Raises InputError."""
    path = folder / ".test-only.sh"
    path.write_text(script)
    try:
        ask("sbatch", "--test-only", str(path))
    except InputError as error:
        raise InputError(f"[{table}] {error}") from error
    finally:
        path.unlink()


def states(jobs: set[str]) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of the jobs that are in Slurm's queue; all from one call.

    Raises:
        UnknownQueue: Slurm isn't installed, fails, or doesn't answer in time.
    """
    if not jobs:
        return {}
    some = ", ".join(sorted(jobs)[:3]) + (" ..." if len(jobs) > 3 else "")
    unknown = f"it is unknown whether job {some} is queued or running"
    if shutil.which("squeue") is None:
        raise UnknownQueue(f"{unknown}: no Slurm here (squeue not found)")
    try:
        lines = ask(
            "squeue", "-h", "-r", "-a", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T|%r"
        ).splitlines()
    except InputError as error:
        raise UnknownQueue(f"{unknown}: {error}") from error
    found = {}
    for line in lines:
        job, state, reason = line.split("|")
        if job in jobs:
            found[job] = (state, reason)
    return found


def accounted(jobs: set[str]) -> dict[str, str]:
    """{job: final state} from sacct; empty if the cluster has no job accounting."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    try:
        text = ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(sorted(jobs)))
    except InputError:
        return {}
    rows = [line.split("|") for line in text.splitlines() if "|" in line]
    return {job: state.split()[0] for job, state in rows if state}


def alive(job: str, host: str = "", cluster: str = "") -> bool:
    """Whether a job is queued or running, in Slurm if it is installed, or as submitit's process on this
    machine. Slurm isn't asked about a job whose `cluster` is local or debug.

    Raises:
        UnknownQueue: Slurm repeatedly didn't answer.
    """
    if job.startswith("DEBUG") or not job:
        return False
    asked = cluster not in ("local", "debug") and shutil.which("squeue")
    state = _persistently({job}).get(job) if asked else None
    if state is not None:
        return state[0] in ALIVE
    if host == socket.gethostname() and Path(f"/proc/{job}/cmdline").exists():
        return b"submitit" in Path(f"/proc/{job}/cmdline").read_bytes()
    return False


def _persistently(jobs: set[str]) -> dict[str, tuple[str, str]]:
    """`states`, with several attempts."""
    for _ in range(TRIES - 1):
        try:
            return states(jobs)
        except UnknownQueue:
            time.sleep(PAUSE)
    return states(jobs)


def job_state(job: str) -> str:
    """The state that scontrol shows, such as RUNNING; empty if it doesn't answer."""
    for _ in range(3):
        try:
            found = re.search(r"\bJobState=(\w+)", ask("scontrol", "show", "job", "-o", job))
            return found.group(1) if found else ""
        except InputError:
            time.sleep(2)
    return ""


def ended_by(log: Path) -> str:
    """Why Slurm ends this job, from its daemon's message in the log: "time limit", "preemption", "job
    requeue", "node failure"; empty for a cancellation, or if there is no such message."""
    time.sleep(0.5)
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 5_000))
        lines = re.findall(
            r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*",
            file.read().decode(errors="replace"),
        )
    return lines[-1].lower() if lines else ""


def requeue(job: str) -> None:
    """Put this job back into the queue. If Slurm does so itself (preemption), it rightly refuses."""
    try:
        ask("scontrol", "requeue", job)
    except InputError as error:
        print(f"pipeline: {error}", flush=True)


def cancel(jobs: list[str]) -> None:
    if jobs:
        ask("scancel", *jobs)


def meeting_point(attempt: int) -> tuple[str, int]:
    """(address of the job's first node, port for this start of the job) at which the ranks connect.

    The address is the one by which Slurm reaches the node. The port is below the ephemeral ones, and differs
    between jobs that share a machine and between the starts of one job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "127.0.0.1", 10_000 + (os.getpid() * 7 + attempt) % 20_000
    first = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    address = re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "show", "node", "-o", first))
    return address.group(1) if address else first, 10_000 + (int(job) * 7 + attempt) % 20_000
