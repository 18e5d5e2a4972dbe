"""Run the commands as a user types them, from two betons to the report page, on this device. Does each exit
with status 0, and do those that train or measure run on the device that they should?

Commands that don't depend on each other run concurrently, so their times mean little. A command that fails
because a package isn't installed becomes a row that says so. Rows of all commands are written first, so that
the stage's deadline loses none of them.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import chain
from pathlib import Path

from benchmarks.gpu_stages import images
from benchmarks.gpu_stages.case import Case, Row, Setup

AT_ONCE = max(2, min(12, os.cpu_count() or 1))
LIMIT = 150.0  # seconds for one command; five times as many in a dry run

# Each group needs the results of the one before; {train} and {test} are betons.
FIRST = (
    "pretrain --preset {preset} --data {train} --out run --epochs 2 --batch-size {batch} --workers 2",
    "pretrain --preset {preset} --data {train} --out control --family none --epochs 2 --batch-size {batch} "
    "--workers 2",
)
SECOND = (
    "encode run --train {train} --images {test}",
    "evaluate run --train {train} --test {test} --control control",
    "linear run --train {train} --test {test}",
    "knn run --train {train} --test {test}",
    "finetune run --train {train} --test {test} --label-fraction 0.5 --epochs 1 --min-steps 20 --lr 0.05 "
    "--weight-decay 0",
    "analyse run --train {train} --test {test} --control control",
    "compression run --train {train} --test {test} --control control",
    "encode run --train {train} --images {test} --bits 32 --code itq --out itq.lvcodes",
    "curate run --train {train} --test {test} --out curated",
    "export run --out exported",
    "pretrain --preset {preset} --data {train} --out compiled --compile on --epochs 1 --batch-size {batch} "
    "--workers 2",
    "pretrain --resume --out control",
    "doctor run",
    "plan --preset {preset}",
)
THIRD = (
    "search run --query {query} --page found.html",
    "report run",
    "search run --codes itq.lvcodes --query {query}",
)
WHERE = {  # files that state where the command ran
    "evaluate": "run/evaluation.json",
    "linear": "run/linear.json",
    "knn": "run/knn.json",
    "analyse": "run/analysis.json",
}
DEVICE = re.compile(r'(?:"(?:device|arithmetic)": "|^pretrain \S+ on )(\w+)', re.MULTILINE)
WAITING = "not done"
IN_A_DRY_RUN = 2  # commands of each group: the test suite runs the others on a CPU


def cases(setup: Setup) -> Iterator[Case]:
    yield Case("commands", partial(commands, setup), seconds=300)


def commands(setup: Setup) -> Iterator[Row]:
    """A row for each; their output is in the log."""
    folder = Path(setup.scratch) / "commands"
    side, count, tests = (16, 96, 64) if setup.dry else (32, 4000, 1000)
    names = {
        "train": images.beton(folder / "train", count, side),
        "test": images.beton(folder / "test", tests, side, seed=1),
        "query": next((folder / "test").rglob("*.jpg")),
        "preset": "digits" if setup.dry else "cifar10-r18",
        "batch": 16 if setup.dry else 256,
    }
    quoted = {key: shlex.quote(str(value)) for key, value in names.items()}
    groups = [
        [text.format(**quoted) for text in group[: IN_A_DRY_RUN if setup.dry else None]]
        for group in (FIRST, SECOND, THIRD)
    ]
    for text in chain(*groups):
        yield {"name": named(text), "ok": None, "failed": WAITING}
    for texts in groups:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for row in as_completed([pool.submit(one, setup, folder, text) for text in texts]):
                yield {"update": True, "failed": None, **row.result()}


def named(text: str) -> str:
    """A command with file names instead of paths."""
    words = shlex.split(text)
    return f"lvssl {' '.join(Path(word).name if word.startswith('/') else word for word in words)}"


def one(setup: Setup, folder: Path, text: str) -> Row:
    words, name = shlex.split(text), named(text)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lvssl", *words],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "2"},  # its PYTHONPATH includes the source tree
            capture_output=True,
            text=True,
            timeout=LIMIT * (5 if setup.dry else 1),
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "ok": False, "failed": f"not done after {LIMIT:.0f} s"}
    row: Row = {"name": name, "seconds": time.monotonic() - started, "status": done.returncode}
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    print(f"$ {name}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode:
        error = said[-1][:250] if said else "it said nothing"
        return row | {"ok": None if "pip install" in error else False, "failed": error}
    told = done.stderr if words[0] == "pretrain" else ""
    if where := WHERE.get(words[0]):
        told = (folder / where).read_text()
    if told:
        found = DEVICE.search(told)
        row["device"] = found.group(1) if found else "it doesn't say"
    return row | {"ok": row.get("device", setup.device) == setup.device}
