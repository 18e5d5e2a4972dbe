"""Progress and metrics of a run: a bar on a terminal, lines elsewhere, metrics.jsonl and other sinks."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from pipelines.amounts import time_text
from pipelines.errors import InputError
from pipelines.files import json_text, naming

if TYPE_CHECKING:  # reading a run's figures doesn't need them
    import torch

    from lvssl.runs.sinks import Sink
    from pipelines.loader import TwoViewLoader

SECONDS_BETWEEN_LINES, FIRST_LINE_AFTER = 30.0, 5.0  # the first line tells early how long it will take
DIGITS = 8  # significant digits in metrics.jsonl: more than fp32 has
T = TypeVar("T")


class Progress:
    """A bar over a run's steps or, if stderr is no terminal, a line every 30 s, which keeps logs small."""

    def __init__(
        self,
        title: str,
        steps: int,
        done: int = 0,
        unit_scale: int = 1,
        unit: str = "step",
        delay: float = 0.0,
    ) -> None:
        """`unit_scale`: images per step, for img/s. `delay`: seconds before the bar is shown."""
        self.title, self.steps, self.start_step, self.images = title, steps, done, unit_scale
        self.unit, self.delay = unit, delay
        self.step = done
        self.started = time.monotonic()
        self.last_line = self.started + FIRST_LINE_AFTER - SECONDS_BETWEEN_LINES
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=steps, initial=done, desc=title, unit=unit, dynamic_ncols=True, mininterval=0.3,
                delay=delay,
            )  # fmt: skip

    def images_per_second(self) -> float:
        elapsed = time.monotonic() - self.started
        return (self.step - self.start_step) * self.images / max(elapsed, 1e-9)

    def update(self, step: int, note: str = "") -> None:
        """Show this step. `note`: current figures, such as "loss 4.2 · rate 130 bits"."""
        self.step = step
        text = f"{self.images_per_second():.0f} img/s" + (f" · {note}" if note else "")
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(0)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = time_text((self.steps - step) * self.images / max(self.images_per_second(), 1e-9))
            said = f"{self.title}: {self.unit} {step}/{self.steps} · {text} · {left} left"
            print(said, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            if not self.delay:
                self.bar.refresh()
            self.bar.close()


def with_progress(parts: Iterable[T], title: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
    """Yield the parts of `total` images, `size(part)` in each, with a progress bar if there is a title."""
    if not title:
        yield from parts
        return
    progress, done = Progress(title, total, unit="image", delay=2.0), 0
    try:
        for part in parts:
            yield part
            done += size(part)
            progress.update(done)
    finally:
        progress.close()


class Metrics:
    """Writes metrics.jsonl, one JSON object per line, and the same figures to each of the `sinks`. Steps only
    increase: rows that a resumed run will write again are cut off first."""

    def __init__(self, folder: Path, resumed_at: int, sinks: Iterable[str] = ("tensorboard",)) -> None:
        from lvssl.runs.sinks import SINKS

        self.path = folder / "metrics.jsonl"
        self.sinks: list[Sink] = [SINKS[name](folder, resumed_at) for name in sinks]
        keep_until(self.path, resumed_at)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        """Write a row with "step" and figures; values that aren't finite become null."""
        short = {k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in row.items()}
        with naming(self.path):
            self.file.write(json_text(short) + "\n")
        figures = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        for sink in self.sinks:
            sink.add(row["step"], figures)

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
        for sink in self.sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, none if there is no such file; a last line cut short is left out.

    Figures that weren't finite are left out.

    Raises:
        InputError: another line isn't a row.
    """
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[dict[str, float], bytes]]:
    """Yield the rows of a metrics.jsonl, each with its line. Errors as for `read_metrics`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield {name: value for name, value in row.items() if isinstance(value, int | float)}, line
        elif number < len(lines):
            raise InputError(f"{path}: line {number} is not a JSON object with a step: remove the line")


def keep_until(path: Path, step: int) -> None:
    """Cut off the rows after `step`, and an incomplete last line."""
    kept = 0
    for row, line in _rows(path):
        if row["step"] > step or not line.endswith(b"\n"):
            break
        kept += len(line)
    if path.exists():
        os.truncate(path, kept)


class ThroughputMeter:
    """Measures speed, wait for data, and memory since the last query, to tell whether loader or model is the
    bottleneck. The caller counts the steps in `steps`."""

    def __init__(self, images_per_step: int, device: torch.device, loader: TwoViewLoader) -> None:
        self.images, self.device, self.loader = images_per_step, device, loader
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), self.loader.waited, 0

    def speed(self) -> dict[str, float]:
        """Return images per second, percentage of time spent waiting for the loader, and peak GiB so far."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "images_per_second": self.steps * self.images / elapsed,
            "data_percent": 100 * (self.loader.waited - self.waited) / elapsed,
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        self.reset()
        return figures


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
