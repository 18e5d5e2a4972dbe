"""The table of a sweep: all finished points, rewritten whenever a point ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.files import write_atomically
from slurm.records import read_json
from slurm.stages import Task


def write_table(out: Path, tasks: Sequence[Task]) -> Path:
    """Write OUT/STAGE-sweep.md: a row for each point with its figures, or a dash if it isn't done."""
    stage = tasks[0].name.rpartition("-")[0]
    figures = [_figures(task.outputs[0]) for task in tasks]
    names = list(dict.fromkeys(name for row in figures for name in row))
    rows = [["point", "settings", *names]]
    rows += [[t.name, t.label, *(_text(row.get(name)) for name in names)] for t, row in zip(tasks, figures)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    path = out / f"{stage}-sweep.md"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _figures(result: Path) -> dict[str, float]:
    """The numbers in a result, named by their path in it."""
    content = read_json(result)
    return dict(_numbers(content.get("results", content)))


def _numbers(content: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(content, int | float) and not isinstance(content, bool):
        return [(prefix, content)]
    if not isinstance(content, dict):
        return []
    return [pair for name, value in content.items() for pair in _numbers(value, f"{prefix} {name}".strip())]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
