"""What a run says of itself: a bar on a terminal, a line now and then elsewhere, JSONL and TensorBoard."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A bar over a run's steps; where stderr is no terminal, one line every 30 s, so that logs stay small."""

    def __init__(self, title: str, steps: int, done: int = 0, unit_scale: int = 1) -> None:
        """`unit_scale`: images a step, for the img/s."""
        self.title, self.steps, self.start_step, self.images = title, steps, done, unit_scale
        self.step = done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=steps, initial=done, desc=title, unit="step", dynamic_ncols=True, mininterval=0.3
            )

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
            left = (self.steps - step) * self.images / max(self.images_per_second(), 1e-9)
            print(
                f"{self.title}: step {step}/{self.steps} · {text} · {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


class Metrics:
    """metrics.jsonl, one JSON object a line, and the same figures for TensorBoard. Steps only ever grow:
    what a resumed run will do again is cut off first."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / "metrics.jsonl"
        keep_until(self.path, resumed_at)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
        )

    def write(self, row: dict[str, Any]) -> None:
        """A row with "step" and figures."""
        self.file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n"
        )
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    if path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
