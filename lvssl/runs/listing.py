"""The runs in a folder: the state and figures of each, the best of them, and the differences of two."""

from __future__ import annotations

import fcntl
import math
import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lvssl.runs.progress import read_metrics
from lvssl.runs.result import read_result
from lvssl.runs.rows import are_rows
from lvssl.runs.run import LOCK, image_count, read_config
from lvssl.settings.fields import relevant
from pipelines.amounts import number_text
from pipelines.errors import InputError
from pipelines.order import steps_per_epoch

ONLINE = "probe_features"  # accuracy of the online probe on features, percent; logged for labelled images
RANK = "rankme"  # the effective rank of the features, logged by any run
CURVES = ("loss", "rate_bits", ONLINE, "probe_code", "online_knn", RANK, "images_per_second")
LOWER_IS_BETTER = ("loss", "distortion", "distortion_clean", "ntxent", "dcl", "uncertainty_aurc")
POINTS = 5  # in a training at which two curves are compared


@dataclass(frozen=True)
class Listed:
    """State and figures of a run's folder."""

    folder: Path
    state: str  # training, done, or stopped
    step: int
    steps: int  # 0: unknown
    figures: dict[str, float]  # by name, from the run's own results and the last row of its log
    size: int  # bytes on the disk

    @classmethod
    def of(cls, folder: Path) -> Listed:
        settings = read_config(folder)[0]
        rows = read_metrics(folder / "metrics.jsonl")
        last = rows[-1] if rows else {}
        step, images = int(last.get("step", 0)), image_count(folder) or 0
        steps = settings.epochs * steps_per_epoch(images, settings.batch_size) if images else 0
        state = "training" if is_locked(folder) else "done" if steps and step >= steps else "stopped"
        of_epochs = {name: row[name] for row in rows for name in (RANK, "online_knn") if name in row}
        return cls(folder, state, step, steps, {**of_epochs, **last, **results(folder)}, bytes_of(folder))


def bytes_of(folder: Path) -> int:
    """Size of a folder's files, without links and files that a running process removes meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                about = os.lstat(os.path.join(place, name))
                size += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return size


def results(folder: Path) -> dict[str, float]:
    """Return test figures: those of `evaluate`, and top-1, in percent, of `knn` and `linear` on features."""
    found: dict[str, float] = {}
    for stage in ("evaluation", "knn", "linear"):
        path = folder / f"{stage}.json"
        content = read_result(path, results=dict, rows=list) if path.exists() else {}
        features = (content.get("results") or {}).get("features")
        if isinstance(features, dict) and isinstance(features.get("top1"), int | float):
            found[stage] = features["top1"]
        run, rows = content.get("run"), content.get("rows") or []
        name = run.get("name") if stage == "evaluation" and isinstance(run, dict) else None
        for row in rows if name and are_rows(rows) else ():
            if row["run"] == name and row["value"] is not None:
                before = "" if row["representation"] == "features" else f"{row['representation']}_"
                found.setdefault(before + row["metric"], row["value"])
    return found


def is_locked(folder: Path) -> bool:
    """Whether a process is training there, on this machine or another that shares the file system's locks."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def runs_in(folder: Path) -> list[Listed]:
    """List every run in or below a folder, by name; a damaged run is noted on stderr.

    Raises InputError if there is no such folder, or no undamaged run in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    configs = [folder / "config.json"] if (folder / "config.json").exists() else folder.rglob("config.json")
    places = sorted(path.parent for path in configs if (path.parent / "checkpoints").is_dir())
    found = []
    for place in places:
        try:
            found.append(Listed.of(place))
        except InputError as error:
            print(f"note: {place} is left out: {error}", file=sys.stderr)
    if not found:
        raise InputError(f"{folder}: contains no run (looked for folders with config.json and checkpoints/)")
    return found


def ranked(runs: list[Listed], metric: str) -> list[Listed]:
    """Sort the runs that have the metric, best first: lowest for losses, else highest; NaN is last.
    InputError if none has it."""
    having = [run for run in runs if metric in run.figures]
    if not having:
        known = sorted({name for run in runs for name in run.figures} - {"step", "epoch"})
        raise InputError(f"--best {metric}: none of the runs has it; known: {', '.join(known)}")
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return sorted(having, key=lambda run: (math.isnan(run.figures[metric]), sign * run.figures[metric]))


def settings_of(folder: Path) -> dict[str, str]:
    """Return what a run's result depends on; settings that were left out have the values in force."""
    settings = read_config(folder)[0]
    usual = {f"latent.{name}": value for name, value in settings.latent.in_force.items()}
    return {s.name: str(usual.get(s.name, s.value)) for s in relevant(settings)}


def compared(one: Path, other: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return (settings that differ, figures at even parts of both trainings), as name and both values."""
    folders = (one, other)
    had, has = map(settings_of, folders)
    names = dict.fromkeys([*had, *has])
    settings = [(n, had.get(n, ""), has.get(n, "")) for n in names if had.get(n) != has.get(n)]
    curves = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    figures = []
    for name in CURVES:
        points = [[row for row in rows if name in row] for rows in curves]
        for part in range(1, POINTS + 1) if all(points) else ():
            rows = [of[max(len(of) * part // POINTS - 1, 0)] for of in points]
            a, b = (f"{number_text(row[name], 4)} (step {row['step']:.0f})" for row in rows)
            figures.append((f"{name}, {100 * part // POINTS} %", a, b))
    tests = [results(folder) for folder in folders]
    both = [name for name in tests[0] if name in tests[1]]
    return settings, figures + [
        (f"test {n}", number_text(tests[0][n], 4), number_text(tests[1][n], 4)) for n in both
    ]
