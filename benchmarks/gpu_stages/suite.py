"""The tests marked `gpu`, in up to eight processes; each test's row is written when it ends.

pytest also loads this file as a plugin, which writes each test's verdict to $LVSSL_TEST_ROWS.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.case import Case, Row, Setup

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = max(2, min(8, (os.cpu_count() or 1) // 2))
MARK = re.compile(r"mark\.gpu|^from devices import", re.MULTILINE)
VARIABLE = "LVSSL_TEST_ROWS"


def cases(setup: Setup) -> Iterator[Case]:
    yield Case("tests marked gpu", lambda: tests(setup), seconds=3600)


def tests(setup: Setup) -> Iterator[Row]:
    """Rows of the tests, followed by a summary."""
    files = setup.options.get("files") or marked(ROOT / "tests")
    if not files:
        yield {"ok": None, "failed": "missing: tests marked gpu"}
        return
    scratch = Path(setup.rows).parent
    if importlib.util.find_spec("xdist"):
        groups, options = [files], ["-n", str(PROCESSES)]
    else:
        groups, options = [files[k::PROCESSES] for k in range(min(PROCESSES, len(files)))], []
    running = [start(group, options, scratch / f"tests-{k}") for k, group in enumerate(groups)]
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    started, read = time.monotonic(), [0] * len(running)
    ended = False
    while not ended:
        ended = all(process.poll() is not None for process, _ in running)  # then read once more
        for k, (_, rows) in enumerate(running):
            lines = rows.read_text().splitlines() if rows.exists() else []
            for line in lines[read[k] :]:
                row = json.loads(line)
                counts[row.pop("outcome")] += 1
                yield row
            read[k] = len(lines)
        time.sleep(0.2)
    trouble = [said for process, rows in running if (said := complaint(process.returncode, rows))]
    right = not counts["failed"] and not trouble
    if not right:
        for _, rows in running:
            print(rows.with_suffix(".out").read_text(errors="replace"), flush=True)
    yield {
        "name": "all tests marked gpu",
        "ok": None if right and not counts["passed"] else right,
        "counts": ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
        "processes": PROCESSES,
        "seconds": time.monotonic() - started,
        "failed": "; ".join(trouble) or None,
    }


def marked(folder: Path) -> list[str]:
    """Test files that contain the mark, or something that implies it; others needn't be imported."""
    files = sorted(folder.rglob("test_*.py"))
    return [str(file) for file in files if MARK.search(file.read_text())]


def start(files: list[str], options: list[str], rows: Path) -> tuple[subprocess.Popen, Path]:
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", __name__,
        "--continue-on-collection-errors", *options, *files,
    ]  # fmt: skip
    # A suite started by a worker of another suite isn't that suite's worker.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    with open(rows.with_suffix(".out"), "wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=outside | {VARIABLE: str(rows), "OMP_NUM_THREADS": "2"},
        )
    return process, rows


def complaint(status: int, rows: Path) -> str:
    """pytest's own error message, beyond failed tests (1) and no tests (5)."""
    if status in (0, 1, 5):
        return ""
    lines = rows.with_suffix(".out").read_text(errors="replace").strip().splitlines()
    return f"pytest ended with {status}: {lines[-1][:150] if lines else ''}"


# The pytest plugin


def write(row: Row) -> None:
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(row) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or VARIABLE not in os.environ:
        return  # the process that distributes the tests receives all reports
    if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
        row: Row = {"name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        row["ok"] = {"passed": True, "failed": False}.get(report.outcome)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = (crash.message if crash else str(report.longrepr)).strip().splitlines()
            row["failed"] = said[0][:250] if said else report.when
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            row["failed"] = str(reason)[:200]
        write(row)


def pytest_collectreport(report: Any) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ and VARIABLE in os.environ:
        lines = str(report.longrepr).strip().splitlines()
        said = lines[-1][:250] if lines else ""
        write({"name": report.nodeid, "outcome": "failed", "ok": False, "failed": f"not collected: {said}"})
