"""Embeddings computed elsewhere: read features and labels from common file formats.

    X.npy         features [N, D] of any float type, mapped; the labels in X-labels.npy beside it
    X/            features.npy and labels.npy in a folder
    X.safetensors tensors `features` and `labels`
    X.parquet     columns `features`, lists of one length, and `labels`

In the last two, `features` may also be named `embedding` or `embeddings`, and `labels` may be named `label`.
They are first converted to .npy files, in a store in the folder `features` beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lvssl.runs.features import Arrays, Compute, Store, mapped
from lvssl.runs.labels import sibling_test_set
from pipelines.datasets.dataset import evenly_spaced
from pipelines.errors import InputError, first_line

ENDS = (".npy", ".safetensors", ".parquet")
FEATURES, LABELS = ("features", "embedding", "embeddings"), ("labels", "label")
READ = 4096  # rows of a safetensors file at a time


@dataclass(frozen=True)
class Embeddings:
    """N features with labels."""

    path: Path
    features: np.ndarray  # of any float type [N, D], mapped
    labels: np.ndarray  # int64 [N]; -1: none
    arithmetic = "another model"  # what computed them

    @property
    def folder(self) -> Path:
        """Folder for what is computed from them."""
        return self.path if self.path.is_dir() else self.path.with_name(f"{self.path.stem}-lvssl")

    @property
    def digest(self) -> str:
        """SHA-256 of the shape, the labels, and up to 256 evenly spaced rows."""
        rows = self.features[evenly_spaced(len(self.labels), 256)]
        told = [str(self.features.shape).encode(), self.labels.tobytes(), rows.tobytes()]
        return hashlib.sha256(b"".join(told)).hexdigest()


def is_embeddings(path: Path) -> bool:
    """Whether a path given in place of a run is a file of embeddings, or a folder with those of training
    images."""
    return path.suffix.lower() in ENDS or (
        path.is_dir() and not (path / "config.json").exists() and bool(_train(path))
    )


def open_pair_of_embeddings(
    given: Path, train: Path | None, test: Path | None
) -> tuple[Embeddings, Embeddings]:
    """Open a training and a test set. `given` is the training file, or a folder with both (such as train.npy
    and test.npy); `train` and `test` override it. InputError: missing, damaged, or they don't match."""
    path = train or training_file(given)
    known, asked = open_embeddings(path), open_embeddings(test or sibling_test_set(path))
    require_same_width(known, asked)
    unseen = np.setdiff1d(asked.labels, known.labels)
    if len(unseen):
        raise InputError(f"{asked.path}: label {unseen[0]} doesn't occur in {known.path}")
    return known, asked


def require_same_width(known: Embeddings, asked: Embeddings) -> None:
    """Raise InputError unless both have features of the same length, as those of one model do."""
    widths = known.features.shape[1], asked.features.shape[1]
    if widths[0] != widths[1]:
        raise InputError(
            f"{asked.path}: features have {widths[1]} dimensions, those of {known.path} {widths[0]}"
        )


def training_file(given: Path) -> Path:
    """Return `given`, or the training file in that folder, such as train.npy. InputError if there is none."""
    path = given if given.suffix.lower() in ENDS else _train(given)
    if path is None:
        raise InputError(f"{given}: contains no embeddings of training images: pass them with --train")
    return path


def _train(folder: Path) -> Path | None:
    named = [folder / f"train{end}" for end in (*ENDS, *map(str.upper, ENDS), "")]
    return next((path for path in named if path.exists()), None)


def open_embeddings(path: Path, labelled: bool = True) -> Embeddings:
    """Open the embeddings of one file or folder (see above). Unless `labelled`, a .npy file or a folder needs
    no labels, which are then -1. InputError if something is missing or damaged, or the numbers of features
    and labels differ."""
    end = path.suffix if path.suffix.lower() == ".npy" else ".npy"
    beside = path / "labels.npy" if path.is_dir() else path.with_name(f"{path.stem}-labels{end}")
    try:
        if path.suffix.lower() in (".safetensors", ".parquet"):
            features, labels = _converted(path)
        else:
            features = mapped(path / "features.npy" if path.is_dir() else path)
            absent = not labelled and not beside.exists()
            labels = np.full(features.shape[:1], -1) if absent else mapped(beside)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file of embeddings or of their labels") from error
    except (OSError, ValueError, EOFError) as error:  # EOFError: of numpy, for an empty file
        raise InputError(f"{path}: can't be read as embeddings ({first_line(error)})") from error
    if features.ndim != 2 or features.dtype.kind != "f" or not features.size:
        raise InputError(
            f"{path}: features must be floats [N, D], not {features.dtype} {list(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        said = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{path}: {len(features):,} features need as many integer labels, not {said}")
    labels = labels.astype(np.int64)
    if labels.min() < (0 if labelled else -1):
        raise InputError(f"{path}: label {labels.min()} of row {labels.argmin()}: labels start at 0")
    for start in range(0, len(features), READ):
        with np.errstate(over="ignore"):  # they are computed with in fp32
            good = np.isfinite(features[start : start + READ].astype(np.float32)).all(1)
        if not good.all():
            row = start + good.argmin()
            large = np.isfinite(features[row]).all()
            what = "beyond the range of fp32" if large else "that isn't a finite number"
            raise InputError(f"{path}: row {row} has a value {what}")
    return Embeddings(path, features, labels)


def _converted(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    count, read = (_safetensors if path.suffix.lower() == ".safetensors" else _parquet)(path)
    if not count:
        raise InputError(f"{path}: contains no embeddings")
    stat = path.stat()
    key = {"file": path.name, "bytes": stat.st_size, "changed": stat.st_mtime_ns}
    store = Store.beside(path.parent / "features", key, count)
    store.fill(read)
    arrays = store.open()
    return arrays["features"], arrays["labels"]


def _safetensors(path: Path) -> tuple[int, Compute]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        features, labels = (
            file.get_slice(_named(path, list(file.keys()), names)) for names in (FEATURES, LABELS)
        )
    except SafetensorError as error:
        raise InputError(f"{path}: can't be read as safetensors ({first_line(error)})") from error
    shape, of_labels = list(features.get_shape()), list(labels.get_shape())
    if len(shape) != 2 or of_labels != shape[:1]:  # the surplus would never be read
        raise InputError(f"{path}: features [N, D] and labels [N] are needed, not {shape} and {of_labels}")

    def read(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Arrays]]:
        for start in range(int(rows[0]), int(rows[-1]) + 1, READ):
            part = slice(start, min(start + READ, int(rows[-1]) + 1))
            arrays = {"features": features[part].float().numpy(), "labels": labels[part].numpy()}
            yield np.arange(part.start, part.stop), arrays

    return shape[0], read


def _parquet(path: Path) -> tuple[int, Compute]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise InputError(f"{path}: can't be read as parquet ({first_line(error)})") from error
    x, y = (_named(path, file.schema_arrow.names, names) for names in (FEATURES, LABELS))
    of_x, of_y = (file.schema_arrow.field(name).type for name in (x, y))
    lists = pa.types.is_list(of_x) or pa.types.is_large_list(of_x) or pa.types.is_fixed_size_list(of_x)
    if not lists or not pa.types.is_primitive(of_x.value_type):
        raise InputError(f"{path}: column {x} must hold lists of numbers, not {of_x}")
    if not pa.types.is_primitive(of_y):
        raise InputError(f"{path}: column {y} must hold integers, not {of_y}")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(groups)])

    @lru_cache(maxsize=1)  # a row group may span several parts
    def group(number: int) -> Arrays:
        table = file.read_row_group(number, [x, y])
        lists = table[x].combine_chunks()
        flat, count = lists.flatten().to_numpy(zero_copy_only=False), table.num_rows
        if lists.null_count or len(flat) % count or len(set(np.diff(_offsets(lists)))) > 1:
            raise InputError(f"{path}: column {x} must hold lists of equal length")
        return {"features": flat.reshape(count, -1), "labels": table[y].to_numpy()}

    @lru_cache
    def width() -> int:
        return group(int(np.flatnonzero(groups)[0]))["features"].shape[1]  # a row group may be empty

    def read(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Arrays]]:
        for number in np.unique(np.searchsorted(starts, rows, side="right") - 1):
            first = max(int(starts[number]), int(rows[0]))
            last = min(int(starts[number + 1]), int(rows[-1]) + 1)
            part = slice(first - int(starts[number]), last - int(starts[number]))
            arrays = {name: values[part] for name, values in group(int(number)).items()}
            if arrays["features"].shape[1] != width():
                raise InputError(f"{path}: column {x} must hold lists of equal length")
            yield np.arange(first, last), arrays

    return file.metadata.num_rows, read


def _offsets(lists: Any) -> np.ndarray:
    """Return where each list of a column begins and ends; lists of fixed size need no offsets."""
    return lists.offsets.to_numpy() if hasattr(lists, "offsets") else np.zeros(0)


def _named(path: Path, there: list[str], wanted: tuple[str, ...]) -> str:
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise InputError(
            f"{path}: has nothing named {' or '.join(wanted)}, only {', '.join(there) or 'nothing'}"
        )
    return found
