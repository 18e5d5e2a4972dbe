"""The parent of the stages: it never uses the device itself, so that no device error can stop it.

A stage has a deadline, and each of its cases another one. If a process hangs or dies, its current case
becomes a row that says so, and a new process continues with the next case. After every row the report is
written to another file and renamed.
"""

import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.gpu_stages.case import BROKEN, Row, Setup, as_argument
from pipelines.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESTARTS = 8  # of one part of a stage; each costs the seconds of importing torch
POLL = 0.1  # seconds
LATE = "cut off by the stage's deadline"

CARD = """
import json, platform, sys
found = {"card": "", "capability": ""}
import torch
found["torch"] = torch.__version__
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = "missing"
if torch.cuda.is_available():
    found["card"] = torch.cuda.get_device_name()
    found["capability"] = "%d.%d" % torch.cuda.get_device_capability()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    weight: float  # its share of the remaining time, among the remaining stages
    parts: int = 1  # concurrent processes
    beside: bool = False  # runs concurrently with the stage before it
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def identify(device: str) -> dict[str, str]:
    """The fields of every row: card, torch, triton, driver."""
    done = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True, cwd=ROOT, timeout=180)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(f"torch can't be loaded: {lines[-1] if lines else done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    if device != "cuda":
        found |= {"card": processor(), "capability": ""}
    elif not found["card"]:
        raise OSError("no CUDA device is usable here: --dry-run goes through all stages on a CPU")
    return found | {"driver": driver() if device == "cuda" else "none"}


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def processor() -> str:
    """The name of its model, by lscpu: /proc/cpuinfo has no names on ARM."""
    english = os.environ | {"LC_ALL": "C"}
    try:
        said = subprocess.run("lscpu", capture_output=True, text=True, timeout=20, env=english).stdout
    except (OSError, subprocess.TimeoutExpired):
        return platform.machine()
    names = re.findall(r"^ *Model name: *(\w.*)", said, re.MULTILINE)
    return ", ".join(names) or platform.machine()


class Report:
    """Rows on disk and in the terminal. Rows of stages that aren't run again are kept."""

    def __init__(self, path: Path, card: dict[str, str], head: Row, keep: Callable[[Row], bool]) -> None:
        self.path, self.card, self.head = path, card, head
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows: list[Row] = [row for row in earlier if keep(row)]
        self.kept = len(self.rows)
        self.write()

    def add(self, stage: str, row: Row) -> None:
        """Add a row; one with "update" true replaces the newest row of this run with its name."""
        update = row.pop("update", False)
        full = {"stage": stage, **row, **self.card}
        with self.lock:
            same = [r for r in self.rows[self.kept :] if (r["stage"], r["name"]) == (stage, row["name"])]
            if update and same:
                same[-1].update(full)
            else:
                self.rows.append(full)
            self.write()
            print(in_words(full), flush=True)

    def new(self) -> list[Row]:
        return self.rows[self.kept :]

    def write(self) -> None:
        write_atomically(self.path, json.dumps({**self.head, "rows": self.rows}, indent=1).encode())


def in_words(row: Row) -> str:
    """One line: stage, name, verdict, figures."""
    hidden = {"stage", "name", "ok", "card", "capability", "torch", "triton", "driver"}
    hidden |= {"version", "commit", "date"}
    verdict = {True: "ok", False: "WRONG", None: "-"}[row.get("ok")]
    said = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in hidden and value is not None and not isinstance(value, dict | list)
    ]
    return f"{row['stage']:10} {row['name'][:58]:58} {verdict:5} {'  '.join(said)}"[:240]


def run_stages(stages: Iterable[Stage], setup: Setup, report: Report, seconds: float) -> None:
    """Run all stages, one group after the other; each group gets its share of the remaining time."""
    end = time.monotonic() + seconds
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.beside and groups:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    weights = [max(stage.weight for stage in group) for group in groups]
    for number, group in enumerate(groups):
        left = end - time.monotonic()
        share = left * weights[number] / sum(weights[number:])
        threads = []
        for stage in group:
            for k in range(stage.parts):
                own = dataclasses.replace(
                    setup,
                    stage=stage.name,
                    module=stage.module,
                    part=(k, stage.parts),
                    options={**setup.options, **stage.options},
                    report=str(report.path),
                )
                arguments = (stage, own, report, max(share, 0.0))
                threads.append(threading.Thread(target=run_part, args=arguments, daemon=True))
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # if interrupted, running processes must not continue
            for child in list(Child.running):
                child.kill()


def run_part(stage: Stage, setup: Setup, report: Report, seconds: float) -> None:
    """Run one part of a stage, in as many processes as necessary."""
    deadline, done = time.monotonic() + seconds, list(setup.done)
    for _ in range(RESTARTS + 1):
        if time.monotonic() >= deadline:
            report.add(stage.name, {"name": stage.name, "ok": None, "failed": "not begun: the time was over"})
            return
        with tempfile.TemporaryDirectory(prefix="lvssl-rows-") as folder:
            own = dataclasses.replace(setup, rows=str(Path(folder) / "rows"), done=tuple(done))
            child = Child(own, stage.environment)
            why = child.attend(deadline, lambda row: report.add(stage.name, row))
        done += child.finished
        if why is None:
            return
        late = why == LATE
        if child.current is not None or child.status != BROKEN:
            name = child.current or stage.name
            report.add(
                stage.name, {"name": name, "ok": None if late else False, "failed": why, "update": True}
            )
        if late or (child.current is None and child.status != BROKEN):
            return
        if child.current is not None:
            done.append(child.current)
    report.add(stage.name, {"name": stage.name, "ok": False, "failed": f"given up after {RESTARTS} restarts"})


class Child:
    """A process that works through cases, in its own process group, so that all that it starts is killed."""

    running: ClassVar[set["Child"]] = set()

    def __init__(self, setup: Setup, environment: dict[str, str]) -> None:
        self.rows = Path(setup.rows)
        self.rows.touch()
        self.output = self.rows.with_name("output")
        self.stage, self.log = setup.stage, Path(setup.report).with_suffix(".log")
        self.current: str | None = None
        self.finished: list[str] = []
        self.status: int | None = None
        self.read, self.case_end = 0, float("inf")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_stages.case", as_argument(setup)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
            )

    def attend(self, deadline: float, add: Callable[[Row], None]) -> str | None:
        """Wait until it has ended or must end; returns None if it has done all its cases, else the reason."""
        why = None
        Child.running.add(self)
        try:
            while self.process.poll() is None:
                self.take(add)
                now = time.monotonic()
                if now > min(deadline, self.case_end):
                    why = LATE if now > deadline else "killed: it took too long"
                    break
                time.sleep(POLL)
        finally:
            self.kill()
            Child.running.discard(self)
        self.take(add)
        self.status = self.process.returncode
        if said := self.output.read_text(errors="replace"):
            with open(self.log, "a") as file:
                file.write(f"--- {self.stage}, status {self.status}\n{said}\n")
        if why is None and self.status:
            why = f"the process ended with status {self.status}: {self.last_words()}"
        return why

    def take(self, add: Callable[[Row], None]) -> None:
        """Read the new complete lines."""
        with open(self.rows, "rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            said = json.loads(line)
            if "begin" in said:
                self.current, self.case_end = said["begin"], time.monotonic() + said["seconds"]
            elif "done" in said:
                self.finished.append(said["done"])
                self.current, self.case_end = None, float("inf")
            else:
                add(said["row"])

    def kill(self) -> None:
        """Kill the whole group, even if its leader has ended: a test or a loader may have left processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return lines[-1][:250] if lines else "it said nothing"
