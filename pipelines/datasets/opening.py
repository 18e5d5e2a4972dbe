"""Where images come from: each kind of source is brought to one form, `Dataset`.

a folder of class folders     photos/cat/1.jpg, photos/dog/2.png ... (or photos/Train/cat/1.jpg), see `layout`
ILSVRC2012's own tars         ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, or the folder that holds them
WebDataset shards             a .tar, a folder of them, or train-{000000..000146}.tar
a tar of class folders        cat/1.jpg, dog/2.png ... in tars: read as if they had been unpacked
another beton                 to make tars of it, or smaller images
a table                       a .csv or .jsonl of paths with labels or regression targets
Hugging Face image parquet    a file, or a folder of *.parquet
idx files                     Debian's /usr/share/datasets/fashion-mnist, MNIST as it is published
torchvision:NAME              a data set that torchvision knows (FashionMNIST, CIFAR10, SVHN ...)
sklearn:digits                1,797 grey images of 8 x 8, always at hand
"""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets import tables, tars
from pipelines.datasets.beton import open_beton_source
from pipelines.datasets.dataset import Dataset, by_name, check_labels, labelled
from pipelines.datasets.folders import FolderTree, class_folders, files_of_split
from pipelines.datasets.imagenet import in_order_of, remarks
from pipelines.datasets.names import Names
from pipelines.datasets.recognise import in_short, left_by_a_system
from pipelines.errors import InputError, first_line
from pipelines.formats import jpeg

SPLITS = ("train", "validation", "test")
FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]


def open_dataset(
    source: str,
    split: str | None = None,
    root: str | Path = "data",
    *,
    classes: str | Path | None = None,
    devkit: str | Path | None = None,
) -> Dataset:
    """Open a source in any of the forms above. `split` None means train where the source has splits.

    `root` is where torchvision keeps (or puts) its files. `classes`, a manifest or a text file, sets the
    order of the classes: labels are renumbered by name. `devkit` is ImageNet's, for its validation tar.
    What looks wrong without being so for certain is said in `notes`. Raises InputError if there is nothing
    such, or if the classes aren't those of `classes`.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split '{split}'; one of {', '.join(SPLITS)}")
    opened = _open(source, split, Path(root), None if devkit is None else Path(devkit))
    if classes is not None:
        opened = in_order_of(opened, Path(classes))
    return replace(opened, notes=[*opened.notes, *remarks(opened)])


def _open(source: str, split: str | None, root: Path, devkit: Path | None) -> Dataset:
    if source.startswith("torchvision:"):
        return _torchvision(source.removeprefix("torchvision:"), split, root)
    if source.startswith("sklearn:"):
        return _sklearn(source.removeprefix("sklearn:"), split)
    path = Path(source)
    if path.is_file():
        if path.suffix == ".parquet":
            return _parquet(*files_of_split(path, [path], split))
        if path.suffix in (".csv", ".jsonl"):
            return tables.open_table(path)
        if path.suffix == ".beton":
            return open_beton_source(path)
        if path.suffix == ".tar":
            return tars.open_tars(source, [path], split, devkit)
        raise InputError(
            f"{source}: a single file must be a .tar, .parquet, .csv, .jsonl or .beton; else give a folder"
        )
    if "{" in source and (shards := tars.expanded(source)):
        return tars.open_tars(source, shards, split, devkit)
    if not path.is_dir():
        hint = "; data sets by name are torchvision:NAME and sklearn:digits" if "/" not in source else ""
        raise InputError(f"{source}: no such folder or file{hint}")
    if list(path.glob("*-images-idx3-ubyte*")):
        return _idx(path, split)
    if parquets := _files_ending(path, ".parquet") or _files_ending(path / "data", ".parquet"):
        if shards := _files_ending(path, ".tar"):  # our own tars, whose manifest has its rows beside it
            return _and_beside(path, tars.open_tars(source, shards, split, devkit))
        return _and_beside(path, _parquet(*files_of_split(path, parquets, split)))
    if shards := tars.of_imagenet(path, split) or _files_ending(path, ".tar"):
        return _and_beside(path, tars.open_tars(source, shards, split, devkit))
    return class_folders(path, split)


def _files_ending(folder: Path, end: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{end}") if not left_by_a_system(path.name))


def _and_beside(folder: Path, opened: Dataset) -> Dataset:
    """The same, and a note of the folders that lie beside its files: they aren't read."""
    beside = [name for name in FolderTree(folder).folders("") if name != "data"]
    more = [in_short("left out, folders beside these files", beside)] if beside else []
    return replace(opened, notes=[*opened.notes, *more])


# ---------------------------------------------------------------------- parquet


def _parquet(paths: list[Path], split: str | None, notes: list[str]) -> Dataset:
    """Columns `image` ({bytes, path}, or plain bytes) and `label`; class names from the schema, if there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, columns, names = paths[0], [], Names()
    groups: list[tuple[Path, int, str]] = []
    lengths: list[int] = []
    try:
        for path in paths:
            with pq.ParquetFile(path) as file:
                image, label = _parquet_columns(path, file.schema_arrow)
                columns.append(
                    _Labels(path, label, file.read([label])[label], _huggingface_classes(file, label))
                )
                for number in range(file.num_row_groups):
                    groups.append((path, number, image))
                    lengths.append(file.metadata.row_group(number).num_rows)
            for row in range(len(columns[-1].values)):
                names.append(f"{path.name}:{row}")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
    labels, classes = _one_numbering(columns)
    made = labelled(
        str(path), names, labels, classes, _row_reader(groups, lengths), split, {"pyarrow": pa.__version__}
    )
    return replace(made, notes=[*made.notes, *notes])


def _row_reader(groups: list[tuple[Path, int, str]], lengths: list[int]) -> Callable[[int], bytes]:
    """index -> the image of that row. `groups`: of each row group, its file, number and column of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    lock = threading.Lock()  # a ParquetFile is not for two threads at once

    @functools.lru_cache(maxsize=8)
    def opened(path: Path) -> Any:
        return pq.ParquetFile(path)

    @functools.lru_cache(maxsize=8)  # a row group is read once for all its images
    def images_of(group: int) -> Any:
        path, number, image = groups[group]
        return opened(path).read_row_group(number, [image])[image]

    def read(index: int) -> bytes:
        group = int(np.searchsorted(starts, index, side="right")) - 1
        with lock:
            try:
                cell = images_of(group)[index - int(starts[group])].as_py()
            except (pa.ArrowException, OSError) as error:
                raise jpeg.DamagedImage(f"the parquet is damaged: {first_line(error)}") from error
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            raise jpeg.DamagedImage("no bytes in this row")
        return data

    return read


@dataclass(frozen=True)
class _Labels:
    """The labels of one parquet."""

    path: Path
    column: str
    values: Any  # a pyarrow ChunkedArray of integers
    classes: list[str] | None  # their names, where the file has them

    def numbers(self) -> np.ndarray:
        """int64 [n]. Raises InputError, naming the row, if one isn't an integer that fits."""
        import pyarrow as pa

        if not pa.types.is_integer(self.values.type) or self.values.null_count:
            raise InputError(f"{self.path}: its column '{self.column}' must hold one integer a row")
        numbers = self.values.to_numpy()
        if len(numbers) and numbers.max() > np.iinfo(np.int64).max:
            raise InputError(f"{self.path}:{int(numbers.argmax())} has label {numbers.max()}, over 2^63")
        return numbers.astype(np.int64)


def _one_numbering(files: list[_Labels]) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 [N] of all files in the order of the first one's classes, and these. Raises InputError if
    a file names a class that the first doesn't, or if some have names and others none."""
    first, parts = files[0], []
    for file in files:
        numbers = file.numbers()
        if (file.classes is None) != (first.classes is None):
            named, unnamed = (file, first) if first.classes is None else (first, file)
            raise InputError(f"{unnamed.path}: its labels have no names, those of {named.path.name} have")
        if file.classes != first.classes and len(numbers):
            assert file.classes is not None and first.classes is not None
            rows = [f"{file.path.name}:{row}" for row in range(len(numbers))]
            check_labels(str(file.path), numbers, file.classes, rows.__getitem__)
            numbers = by_name(numbers, file.classes, first.classes, str(file.path), str(first.path))
        parts.append(numbers)
    return np.concatenate(parts), first.classes


def _parquet_columns(path: Path, schema: Any) -> tuple[str, str]:
    image = next((name for name in ("image", "img") if name in schema.names), None)
    label = next((name for name in ("label", "fine_label") if name in schema.names), None)
    if image is None or label is None:
        missing = " and ".join([*["'image'"] * (image is None), *["'label'"] * (label is None)])
        raise InputError(f"{path}: no column {missing} (its columns: {', '.join(schema.names)})")
    return image, label


def _huggingface_classes(file: Any, label: str) -> list[str] | None:
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


# ------------------------------------------------------- idx, torchvision, sklearn


def _idx(folder: Path, split: str | None) -> Dataset:
    """MNIST's format, gzipped or not. (torchvision reads it too, but only in folders it laid out itself.)"""
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
    """Big-endian: 0, 0, 8 (uint8), number of dimensions, u4 lengths, then the values."""
    path = next((folder / (name + end) for end in ("", ".gz") if (folder / (name + end)).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no file {name}.gz")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("it does not begin as an idx file does")
        shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(int)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def _torchvision(name: str, split: str | None, root: Path) -> Dataset:
    """Any torchvision class that tells train from test by `train=` or `split=`, downloaded if need be."""
    import torchvision

    cls: Any = getattr(torchvision.datasets, name, None)
    parameters = set(inspect.signature(cls).parameters if inspect.isclass(cls) else ())
    if "download" not in parameters or not parameters & {"train", "split"}:
        raise InputError(
            f"torchvision:{name}: no data set with train and test, such as FashionMNIST, CIFAR10, SVHN"
        )
    if split == "validation":
        raise InputError(f"torchvision:{name}: splits are train and test")
    which = {"train": split != "test"} if "train" in parameters else {"split": split or "train"}
    try:
        try:
            images = cls(root, download=False, **which)
        except RuntimeError:  # torchvision's way to say that it isn't there yet
            images = cls(root, download=True, **which)
    except Exception as error:  # whatever the network, the archive or the class itself raises
        raise InputError(
            f"torchvision:{name}: could not be loaded from or downloaded to {root} ({first_line(error)})"
        ) from error
    labels = getattr(images, "targets", getattr(images, "labels", None))
    if labels is None:
        labels = [images[index][1] for index in range(len(images))]
    classes = getattr(images, "classes", None)
    names = [f"{name}:{split or 'train'}:{row}" for row in range(len(images))]
    return labelled(
        f"torchvision:{name}",
        names,
        np.asarray(labels).astype(np.int64),
        [str(each) for each in classes] if classes else None,
        lambda index: np.asarray(images[index][0].convert("RGB")),
        split or "train",
        {"torchvision": torchvision.__version__},
    )


DIGITS_TEST = 500  # of 1,797


def _sklearn(name: str, split: str | None) -> Dataset:
    """scikit-learn's digits: 0..16 -> 0..255; the split is the same everywhere and for ever."""
    if name != "digits":
        raise InputError(f"sklearn:{name}: unknown; the one that scikit-learn ships is sklearn:digits")
    if split == "validation":
        raise InputError("sklearn:digits: splits are train and test")
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState is frozen; NumPy may change what a Generator draws from one release to the next.
    order = np.random.RandomState(0).permutation(len(digits.target))
    rows = order[-DIGITS_TEST:] if split == "test" else order[:-DIGITS_TEST]
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    names = [f"digits:{row}" for row in rows]
    libraries = {"scikit-learn": version("scikit-learn")}
    labels = digits.target[rows].astype(np.int64)
    return labelled("sklearn:digits", names, labels, None, images.__getitem__, split or "train", libraries)
