"""Records of tasks on disk: OUT/stages/TASK-DIGEST.json, which the job itself writes and renames into place.

Together with the jobs that `launch` records (OUT/jobs.json), they give the pipeline's state even if the
cluster has no job accounting.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.files import json_text, write_atomically
from pipelines.lock import lock
from slurm.stages import Task

SMALL = 2**20  # bytes up to which an output's fingerprint covers its content, and not only its size


@dataclass
class Record:
    task: str
    digest: str
    state: str = "new"  # running, stopped (to be resumed or started again), done, failed, cancelled
    job: str = ""
    host: str = ""
    cluster: str = ""  # slurm, local or debug; empty in older records
    log: str = ""
    command: str = ""
    code: str = ""
    started: float = 0.0  # of the latest start
    ended: float = 0.0
    seconds: float = 0.0  # total over all starts
    restarts: int = 0  # after preemptions and time limits
    crashes: int = 0
    error: str = ""
    outputs: dict[str, str] = field(default_factory=dict)  # path -> fingerprint


def record_path(out: Path, task: Task) -> Path:
    return out / "stages" / f"{task.key}.json"


def read_record(out: Path, task: Task) -> Record | None:
    """The record of a task with exactly these settings, or None."""
    try:
        content = json.loads(record_path(out, task).read_text())
        record = Record(**content)
    except (OSError, ValueError, TypeError):
        return None
    return record if record.digest == task.digest else None


def write_record(out: Path, task: Task, record: Record) -> None:
    write_json(record_path(out, task), asdict(record))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_text(content, indent=1).encode())


def stands(out: Path, task: Task) -> bool:
    """Whether a task's result exists, was made with these settings, and hasn't changed since. The record may
    be from before the pipeline's folder was moved, so the paths in it don't count."""
    record, found = read_record(out, task), fingerprints(task.outputs)
    if record is None or record.state != "done" or found is None:
        return False
    return list(record.outputs.values()) == list(found.values())


def fingerprints(outputs: tuple[Path, ...]) -> dict[str, str] | None:
    """A fingerprint of each output, or None if one is missing."""
    if not all(path.exists() for path in outputs):
        return None
    return {str(path): _fingerprint(path) for path in outputs}


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        return " ".join(f"{p.name}:{p.stat().st_size}" for p in sorted(path.iterdir()))
    size = path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL else f"{size} bytes"


def read_jobs(out: Path) -> dict[str, dict[str, str]]:
    """Task key -> {"task", "job", "log", "cluster"} of its latest submission."""
    return read_json(out / "jobs.json")


def read_json(path: Path) -> dict[str, Any]:
    """A file's content; empty if it doesn't exist."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Ensure that only one `launch`, `retry` or `cancel` at a time works on a pipeline's folder.

    Raises:
        InputError: another one is working on it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".launch", "w") as file:
        try:
            lock(file, out)
        except BlockingIOError as error:
            raise InputError(f"{out} is locked by another `lvssl launch`; wait until it has ended") from error
        yield


def last_error(log: Path) -> str:
    """The line of a log that states the error: the last "error: ...", exception, or other line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 50_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    spoken = re.compile(r"(srun|slurmstepd\S*|submitit)\b|pipeline: ")  # what isn't the command's own
    lines = [line for line in lines if line and not spoken.match(line)]
    for pattern in (r"error: ", r"(\w+\.)*\w+(Error|Exception|Interrupt|Exit)\b"):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else ""


def last_row(metrics: Path) -> dict[str, Any]:
    """The last complete line of a metrics.jsonl."""
    if not metrics.exists():
        return {}
    for line in reversed(metrics.read_text().splitlines()[-2:]):
        try:
            return {name: value for name, value in json.loads(line).items() if value is not None}
        except ValueError:  # incomplete: it is being written
            continue
    return {}


def remaining(row: dict[str, Any], settings: Any) -> tuple[int, float, float]:
    """From a row of pretraining's metrics.jsonl: total steps, img/s, and seconds left at this rate."""
    total = round(row["step"] / row["epoch"] * settings.epochs) if row.get("epoch") else 0
    speed = row.get("images_per_second", 0.0)
    return total, speed, (total - row["step"]) * settings.batch_size / speed if speed else 0.0
