"""How a benchmark reads its options, and writes its figures."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.files import write_json


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, in its own lines."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def new_file(text: str) -> Path:
    """The type of an option: a file whose folder is made at once, as hours may pass before it is written."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(path: Path | None, script: str, arguments: list[str], figures: dict[str, Any]) -> None:
    """Write the figures and the command that made them to the file, if one is named."""
    if path is not None:
        write_json(path, {"command": f"python -m benchmarks.{script} {' '.join(arguments)}"} | figures)


def in_turn(
    forms: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """(wall-clock, processor) seconds of each form in each round, and what it returned."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    found = {}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter(), time.process_time()
            found[name] = form()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            wall, processor = times[name][-1]
            print(f"{name:16}{wall:9.2f} s{processor:9.2f} s of processors", flush=True)
    return times, found


def timing(times: list[float]) -> dict[str, Any]:
    """The median, the quartiles and the number of the seconds that rounds took."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"seconds": middle, "quartiles": [low, high], "rounds": len(times)}
