"""A beton as a set of images, to be converted to another form, and the bytes in the parts of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.dataset import Dataset, labelled
from pipelines.errors import InputError
from pipelines.formats.beton import JPEG, BetonFile, open_beton
from pipelines.formats.manifest import manifest_path, read_columns
from pipelines.formats.openfiles import OpenFiles


def open_beton_source(path: Path) -> Dataset:
    """A beton's images as they came: JPEG bytes, or pixels. Names and classes as in its manifest."""
    beton = open_beton(path)
    bytes_of = reader_of([beton])
    manifest_file = manifest_path(path)
    classes, split = None, None
    names = [f"{path.name}:{index}" for index in range(beton.count)]
    if manifest_file.exists():
        manifest, columns = read_columns(manifest_file, ("name",))
        classes, split, names = manifest["classes"], manifest["split"], columns["name"].tolist()

    def read(index: int) -> bytes | np.ndarray:
        data = bytes_of(0, index)
        if beton.modes[index] == JPEG:
            return data
        return np.frombuffer(data, np.uint8).reshape(int(beton.heights[index]), int(beton.widths[index]), 3)

    return replace(labelled(str(path), names, beton.labels, classes, read, split), targets=beton.targets)


def reader_of(betons: list[BetonFile]) -> Any:
    """(part, index) -> the bytes of an image, from any thread."""
    files = OpenFiles()  # an array job can have more parts than a process may open files

    def bytes_of(part: int, index: int) -> bytes:
        beton = betons[part]
        size = int(beton.sizes[index])
        data = files.read(beton.path, size, int(beton.offsets[index]))
        if len(data) != size:
            raise InputError(f"{beton.path}: was cut short while it was read")
        return data

    return bytes_of
