"""MNIST's idx format, gzipped or not. (torchvision reads it only in folders that it has laid out itself.)"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from pipelines.datasets.dataset import Dataset, labelled
from pipelines.errors import InputError, first_line

FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]


def is_idx(folder: Path) -> bool:
    return any(folder.glob("*-images-idx3-ubyte*"))


def open_idx(folder: Path, split: str | None) -> Dataset:
    """Open the training images (also if `split` is None) or the test images. Raises InputError."""
    prefix = {"train": "train", "test": "t10k"}.get(split or "train")
    if prefix is None:
        raise InputError(f"{folder}: has no split '{split}', only train and test")
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images)} images but {len(labels)} labels for '{split or 'train'}'")
    classes = FASHION_CLASSES if "fashion" in str(folder.resolve()).lower() else None
    names = [f"{prefix}:{row}" for row in range(len(images))]
    return labelled(str(folder), names, labels, classes, images.__getitem__, split or "train")


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read a big-endian file: 0, 0, 8 (uint8), number of dimensions, u4 lengths, then the values."""
    path = next((folder / (name + end) for end in ("", ".gz") if (folder / (name + end)).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no file {name}.gz")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("it has no idx header")
        shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
