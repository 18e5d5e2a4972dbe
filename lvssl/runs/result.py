"""Result files, which say what they were made from: the same call reuses one, a different call is refused."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvssl.runs.rows import are_rows, wrong_row
from lvssl.runs.run import RESULTS_VERSION, Run, results_version, versions
from lvssl.settings.fields import first_change, identity, runtime
from lvssl.settings.presets import command
from pipelines.errors import InputError
from pipelines.files import write_json

# What commands read of a file whose measurements are rows: what it must have, and entries that it may have.
MODEL, NAMED = {"name": str, "family": str}, {"name": str}
BITS = {"table": list, "flips": dict, "few": dict}
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "evaluation.json": ({"run": MODEL}, {"control": MODEL, "left_out": list}),
    "analysis.json": (
        {"run": NAMED, "images": {"test": int}, "reliability": dict},
        {"control": NAMED, "bits": BITS},
    ),
    "compression.json": ({"queries": int, "database": int, "top_n": int, "left_out": list}, {}),
}
KINDS: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float | int: "a number",
}


@dataclass(frozen=True)
class ResultFile:
    """The file to which a command writes what it measured of a run with these settings."""

    path: Path
    name: str  # the command's
    settings: Any  # its settings, with defaults filled in
    checkpoint: str  # digest of the run's
    beside: Mapping[str, str] = field(default_factory=dict)  # folder of each other run -> its checkpoint
    files: tuple[Path, ...] = ()  # what else belongs to the result, written before it
    in_rows: bool = False  # whether its measurements are rows

    @classmethod
    def of_run(cls, name: str, file: str, settings: Any, runs: list[Run], also: str) -> ResultFile:
        """FILE in the folder --out or the run's own, with the file `also` there: a result of the first run,
        compared with the others."""
        run, *others = runs
        beside = {str(other.folder.resolve()): other.digest for other in others}
        folder = result_folder(settings)
        return cls(folder / file, name, settings, run.digest, beside, (folder / also,), in_rows=True)

    def found(self) -> dict[str, Any] | None:
        """Return the result if it exists, complete, and --overwrite isn't given; else None. A result of an
        older version, whose measurements aren't rows, isn't complete.

        Raises:
            InputError: the file holds another result, or is damaged, and --overwrite isn't given; or nothing
                can be written there.
        """
        if not self.path.exists():
            require_writable(self.path.parent)
            return None
        try:
            content = read_result(self.path)
            if changed := self.changes(content):
                raise InputError(
                    f"{self.path} already holds a result for other settings ({changed}); "
                    "pass --overwrite to overwrite it or --out to write elsewhere"
                )
        except InputError:
            if self.settings.overwrite:
                require_writable(self.path.parent)
                return None
            raise
        of_now = not self.in_rows or are_rows(content.get("rows"))
        if self.settings.overwrite or not of_now or not all(file.exists() for file in self.files):
            return None
        print(f"note: {self.path} exists already; --overwrite measures it again", file=sys.stderr)
        return content

    def changes(self, content: dict[str, Any]) -> str:
        """Describe the first difference between a result's origin and what is wanted; "" if there is none.

        A setting that the result's version didn't have yet counts as its default, and on_error as raise.
        """
        if content.get("checkpoint") != self.checkpoint:
            return f"checkpoint: {str(content.get('checkpoint'))[:12]} -> {self.checkpoint[:12]}"
        if (version := results_version(self.path, content)) != RESULTS_VERSION:
            return f"results version: {version} -> {RESULTS_VERSION}"
        had = identity(type(self.settings)(self.settings.run, on_error="raise"))
        had |= {k: v for k, v in (content.get("settings") or {}).items() if k not in runtime(self.settings)}
        beside = [
            {f"checkpoint of {run}": str(digest)[:12] for run, digest in found.items()}
            for found in (content.get("beside") or {}, self.beside)
        ]
        return first_change(had, identity(self.settings)) or first_change(*beside)

    def complete(self, content: dict[str, Any]) -> dict[str, Any]:
        """Add to what was measured everything that says where it comes from."""
        origin: dict[str, Any] = {"checkpoint": self.checkpoint}
        if self.beside:
            origin["beside"] = dict(self.beside)
        origin["settings"] = identity(self.settings)
        origin["command"] = command(self.name, self.settings)
        return content | origin | {"versions": versions()}

    def file_beside(self) -> Path:
        """Return the path of the file that belongs to the result, and create its folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.files[0]

    def write(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write what was measured, with its origin, and return what was written."""
        content = self.complete(content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, content, indent=2)
        return content


def result_folder(settings: Any) -> Path:
    """Folder to which a command that measures a run writes: --out or, by default, the run's own."""
    return settings.out or settings.run


def require_writable(folder: Path) -> None:
    """Raise InputError, before any work, if no file can be made in a folder, or the folder can't be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there}: is not writable: choose another folder with --out")


def read_result(path: Path, **kinds: Any) -> dict[str, Any]:
    """Read a file that a command has written: an object whose entries, if present and not null, are of the
    `kinds`, see `wrong_kind`. InputError if it is damaged, holds something else, or lacks one of ENTRIES."""
    content: dict[str, Any] = read_json(path)
    require_result(path, content, **kinds)
    return content


def require_result(path: Path, content: Any, **kinds: Any) -> None:
    """Raise InputError as `read_result` does, for what was read from the file."""
    wrong = wrong_kind("", content, dict)
    if not wrong:
        needed: dict[str, Any] = {}
        kinds = {"settings": dict, "beside": dict, "versions": dict, **kinds}
        if (rows := content.get("rows")) and are_rows(rows):
            wrong = wrong_row(rows)
            needed, optional = ENTRIES.get(path.name, ({}, {}))
            kinds |= optional
        elif "stage" in content:
            needed = {"results": dict, "data": {"images": int}, "command": str}
            if isinstance(found := content.get("results"), dict):
                needed["results"] = {name: _of_figures(each) for name, each in found.items()}
        there = {name: kind for name, kind in kinds.items() if content.get(name) is not None}
        wrong = wrong or wrong_kind("", content, there | needed)
    if wrong:
        raise InputError(f"{path}: not a result ({wrong}); remove it")
    results_version(path, content)


def _of_figures(figures: Any) -> dict[str, Any]:
    """What is read of the figures of a representation: those of targets, or of classes."""
    if not isinstance(figures, dict) or "targets" not in figures:
        return {"top1": float | int, "top1_interval": list}
    targets, each = figures["targets"], dict.fromkeys(("r2", "mse", "mae"), float | int)
    return {"targets": dict.fromkeys(targets, each) if isinstance(targets, dict) else dict}


def result_path(out: Path) -> Path:
    """Return the file of a result that is to go to `out`: a .json, or else a folder for result.json."""
    return out if out.suffix.lower() == ".json" else out / "result.json"


def read_json(path: Path) -> Any:
    """Read a JSON file that a command has written. InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a result ({error}); remove it") from error


def wrong_kind(name: str, value: Any, kind: Any) -> str:
    """Describe what is wrong with a value that should be of that kind, or an object with entries of the kinds
    in `kind`; "" if nothing is."""
    entries, kind = (kind, dict) if isinstance(kind, dict) else ({}, kind)
    if not isinstance(value, kind):
        start = f"{name}: " if name else ""
        return f"{start}{KINDS[kind]} is expected, not {type(value).__name__}"
    inner = (wrong_kind(f"{name}.{key}" if name else key, value.get(key), of) for key, of in entries.items())
    return next(filter(None, inner), "")


def as_number(value: float | None) -> float:
    """Restore a figure that was read from a file, in which null stands for NaN."""
    return math.nan if value is None else value
