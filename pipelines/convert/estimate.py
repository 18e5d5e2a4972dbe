"""What a conversion will take, from a sample of its images; and whether the disk has room for it."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.convert.readers import Source
from pipelines.convert.store import Settings, Stored, attempt
from pipelines.errors import InputError

FEWEST = 200  # images; fewer are converted before they are estimated
TABLES = 48  # bytes an image in a beton's metadata and table
HEADERS = 2_600  # bytes an image in a tar: headers, label, paddings, index


@dataclass(frozen=True)
class Estimate:
    images: int
    seconds: float
    beton_bytes: int
    tar_bytes: int
    sampled: int
    refused: int  # of those that were sampled

    def __str__(self) -> str:
        bad = f", {self.refused} of them damaged" if self.refused else ""
        return (
            f"{self.images:,} images, {size_text(self.beton_bytes)}, {time_text(self.seconds)} "
            f"(from {self.sampled} of them{bad})"
        )


def measure(
    source: Source, order: np.ndarray, settings: Settings, workers: int, pack: bool
) -> Estimate | None:
    """Convert 2 % of the images, 16 to 256 of them, evenly spread, and throw the result away."""
    if len(order) < FEWEST:
        return None
    count = int(np.clip(len(order) // 50, 16, 256))
    sample = order[np.linspace(0, len(order) - 1, count).astype(int)].tolist()
    attempt(source, sample[:2], settings, pack)  # what is compiled or loaded is so once
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        chunks = [sample[start : start + 8] for start in range(0, count, 8)]
        results = list(chain(*pool.map(lambda chunk: attempt(source, chunk, settings, pack), chunks)))
    seconds = (time.perf_counter() - started) / count * len(order)
    stored = [each for each in results if isinstance(each, Stored)]
    beton = sum(len(each.data) + TABLES for each in stored) / count
    tar = sum(len(each.packed) + HEADERS for each in stored) / count
    sizes = int(beton * len(order)), int(tar * len(order))
    return Estimate(len(order), seconds, *sizes, count, count - len(stored))


def check_space(beton: Path | None, tars: Path | None, estimate: Estimate | None) -> None:
    """Raises InputError if a disk has less room than what shall be written to it."""
    if estimate is None:
        return
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for final, size in ((beton, estimate.beton_bytes), (tars, estimate.tar_bytes)):
        if final is None:
            continue
        folder = next(each for each in final.absolute().parents if each.is_dir())
        device = folder.stat().st_dev
        folders[device] = folder
        needed[device] += size
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise InputError(
                f"{folder}: about {size_text(needed[device])} are needed, {size_text(free)} are free; "
                "convert to another disk, or smaller images (--max-resolution, --subset)"
            )


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
