"""What a run says of itself: a bar on a terminal, a line now and then elsewhere, JSONL and TensorBoard."""

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

if TYPE_CHECKING:  # whoever reads a run's figures alone does without
    import torch

    from lvssl.runs.sinks import Sink
    from pipelines.loader import TwoViewLoader

SECONDS_BETWEEN_LINES, FIRST_LINE_AFTER = 30.0, 5.0  # the first says early how long it will take
DIGITS = 8  # significant ones of a figure in metrics.jsonl: more than fp32 has
T = TypeVar("T")


class Progress:
    """A bar over a run's steps; where stderr is no terminal, one line every 30 s, so that logs stay small."""

    def __init__(
        self,
        title: str,
        steps: int,
        done: int = 0,
        unit_scale: int = 1,
        unit: str = "step",
        delay: float = 0.0,
    ) -> None:
        """`unit_scale`: images a step, for the img/s. `delay`: no bar for what takes fewer seconds."""
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
        """`note`: the figures of the moment, such as "loss 4.2 · rate 130 bits"."""
        self.step = step
        text = f"{self.images_per_second():.0f} img/s" + (f" · {note}" if note else "")
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(0)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = time_text((self.steps - step) * self.images / max(self.images_per_second(), 1e-9))
            print(
                f"{self.title}: {self.unit} {step}/{self.steps} · {text} · {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            if not self.delay:
                self.bar.refresh()
            self.bar.close()


def with_progress(parts: Iterable[T], title: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
    """The parts of `total` images, `size(part)` in each, with their progress if there is a title."""
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
    """metrics.jsonl, one JSON object a line, and the same figures for each of the `sinks`. Steps only ever
    grow: what a resumed run will do again is cut off first."""

    def __init__(self, folder: Path, resumed_at: int, sinks: Iterable[str] = ("tensorboard",)) -> None:
        from lvssl.runs.sinks import SINKS

        self.path = folder / "metrics.jsonl"
        self.sinks: list[Sink] = [SINKS[name](folder, resumed_at) for name in sinks]
        keep_until(self.path, resumed_at)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        """A row with "step" and figures; what isn't finite becomes null."""
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
    """The rows of a metrics.jsonl, none if there is no such file, less a last line cut short by a kill.

    Figures that weren't finite are left out.

    Raises:
        InputError: another line that is no row.
    """
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[dict[str, float], bytes]]:
    """The rows of a metrics.jsonl, and each one's line. Errors of `read_metrics`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield {name: value for name, value in row.items() if isinstance(value, int | float)}, line
        elif number < len(lines):
            raise InputError(f"{path}: line {number} is no JSON object with a step: remove the line")


def keep_until(path: Path, step: int) -> None:
    """Cut off the rows after `step`, and a last line that a kill cut short."""
    kept = 0
    for row, line in _rows(path):
        if row["step"] > step or not line.endswith(b"\n"):
            break
        kept += len(line)
    if path.exists():
        os.truncate(path, kept)


class ThroughputMeter:
    """Speed, wait for data and memory since they were last asked for: is loader or model the bottleneck?
    Whoever makes the steps counts them in `steps`."""

    def __init__(self, images_per_step: int, device: torch.device, loader: TwoViewLoader) -> None:
        self.images, self.device, self.loader = images_per_step, device, loader
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), self.loader.waited, 0

    def speed(self) -> dict[str, float]:
        """Images a second, percent of the time spent waiting for the loader, GiB at the peak so far."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "images_per_second": self.steps * self.images / elapsed,
            "data_percent": 100 * (self.loader.waited - self.waited) / elapsed,
            "memory_gib": self.memory() / 2**30,
        }
        self.reset()
        return figures

    def memory(self) -> int:
        """Bytes at the peak: of torch on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
