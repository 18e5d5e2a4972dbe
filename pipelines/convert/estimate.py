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

from pipelines.amounts import size_text, time_text
from pipelines.convert.store import Settings, store_batch
from pipelines.datasets.dataset import Dataset, evenly_spaced
from pipelines.errors import InputError

FEWEST = 200  # images; fewer are converted before they are estimated
SIZES = 4_096  # files that are asked for their size: a tenth of a second
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
            f"{self.images:,} images, {size_text(self.beton_bytes)}, {time_text(max(self.seconds, 1))} "
            f"(from {self.sampled} of them{bad})"
        )


def measure(
    source: Dataset, order: np.ndarray, settings: Settings, workers: int, as_png: bool
) -> Estimate | None:
    """Convert 2 % of the images, 16 to 256 of them, evenly spread, and throw the result away.

    A few images are a poor sample: file sizes scatter by their own mean. Where the source knows those of its
    files, size and time are scaled from the sample's to the mean of up to 4,096 files (a ratio estimator).
    """
    if len(order) < FEWEST:
        return None
    count = int(np.clip(len(order) // 50, 16, 256))
    sample = order[evenly_spaced(len(order), count)].tolist()
    store_batch(source, sample[:2], settings, as_png)  # what is compiled or loaded is so once
    started = time.perf_counter()

    def sizes(chunk: list[int]) -> list[tuple[int, int] | None]:  # not the images: 256 are much to keep
        results = store_batch(source, chunk, settings, as_png)
        return [None if isinstance(each, str) else (len(each.data), len(each.file)) for each in results]

    with ThreadPoolExecutor(workers) as pool:
        found = list(chain(*pool.map(sizes, [sample[i : i + 8] for i in range(0, count, 8)])))
    images = len(order) * _share(source, order, sample) / count  # like those of the sample
    seconds = (time.perf_counter() - started) * images
    stored = [each for each in found if each is not None]
    beton = sum(data for data, _ in stored) * images + TABLES * len(order)
    tar = sum(file for _, file in stored) * images + HEADERS * len(order)
    return Estimate(len(order), seconds, int(beton), int(tar), count, count - len(stored))


def _share(source: Dataset, order: np.ndarray, sample: list[int]) -> float:
    """How large the files are on average, over how large those of the sample are; 1 if it isn't known."""
    if source.size_of is None:
        return 1.0
    try:
        sampled = np.mean([source.size_of(index) for index in sample])
        many = order[evenly_spaced(len(order), SIZES)].tolist()
        return float(np.mean([source.size_of(index) for index in many]) / max(sampled, 1))
    except OSError:  # a file that can't be asked is refused later, by name
        return 1.0


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
