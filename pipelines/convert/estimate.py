"""Estimate the size and time of a conversion from a sample of its images, and check the disk's free space."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.amounts import size_text, time_text
from pipelines.convert.store import Settings, store_batch
from pipelines.datasets.dataset import Dataset, evenly_spaced
from pipelines.errors import InputError

FEWEST = 200  # images; fewer are converted without an estimate
SIZES = 4_096  # files whose size is looked up: a tenth of a second
TABLES = 48  # bytes per image in a beton's metadata and table
HEADERS = 2_600  # bytes per image in a tar: headers, label, padding, index


@dataclass(frozen=True)
class Estimate:
    images: int
    seconds: float
    beton_bytes: int
    tar_bytes: int
    sampled: int
    refused: int  # images of the sample

    def __str__(self) -> str:
        bad = f", {self.refused} of them damaged" if self.refused else ""
        return (
            f"{self.images:,} images, {size_text(self.beton_bytes)}, {time_text(max(self.seconds, 1))} "
            f"(from {self.sampled} of them{bad})"
        )


def measure(
    source: Dataset, order: np.ndarray, settings: Settings, workers: int, as_png: bool
) -> Estimate | None:
    """Convert 2 % of the images, 16 to 256 of them, evenly spaced, and discard the result. None for a set of
    fewer than FEWEST images.

    A few images are a poor sample: the spread of file sizes is as large as their mean. Where the source knows
    its files' sizes, size and time are scaled from the sample's mean to that of up to 4,096 files (a ratio
    estimator).
    """
    if len(order) < FEWEST:
        return None
    count = int(np.clip(len(order) // 50, 16, 256))
    sample = order[evenly_spaced(len(order), count)].tolist()
    store_batch(source, sample[:2], settings, as_png)  # compile and load what is needed before the timing
    started = time.perf_counter()

    def sizes(chunk: list[int]) -> list[tuple[int, int] | None]:  # not images: they take much memory
        results = store_batch(source, chunk, settings, as_png)
        return [None if isinstance(each, str) else (len(each.data), len(each.file)) for each in results]

    with ThreadPoolExecutor(workers) as pool:
        found = list(chain(*pool.map(sizes, [sample[i : i + 8] for i in range(0, count, 8)])))
    images = len(order) * _share(source, order, sample) / count  # in units of the sample's images
    seconds = (time.perf_counter() - started) * images
    stored = [each for each in found if each is not None]
    beton = sum(data for data, _ in stored) * images + TABLES * len(order)
    tar = sum(file for _, file in stored) * images + HEADERS * len(order)
    return Estimate(len(order), seconds, int(beton), int(tar), count, count - len(stored))


def _share(source: Dataset, order: np.ndarray, sample: list[int]) -> float:
    """Mean file size of all images over that of the sample; 1 if it isn't known."""
    if source.size_of is None:
        return 1.0
    try:
        sampled = np.mean([source.size_of(index) for index in sample])
        many = order[evenly_spaced(len(order), SIZES)].tolist()
        return float(np.mean([source.size_of(index) for index in many]) / max(sampled, 1))
    except OSError:  # a file that can't be read is refused later, by name
        return 1.0


def check_space(beton: Path | None, tars: Path | None, estimate: Estimate | None) -> None:
    """Raise InputError if a disk has less free space than what will be written to it."""
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
