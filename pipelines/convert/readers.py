"""Where images come from: each kind of source is brought to one form, `Source`.

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
import os
import stat
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert import depth, jpeg
from pipelines.convert.layout import Layout, choose_split, layout_of
from pipelines.convert.names import Names
from pipelines.convert.recognise import (
    EXTENSIONS,
    HEAD,
    UNLABELLED,
    LeftOut,
    by_a_system,
    has_image_name,
    in_short,
    is_image,
    left_by_a_system,
    split_of_file,
)
from pipelines.errors import InputError, first_line

SPLITS = ("train", "validation", "test")
FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]


@dataclass(frozen=True)
class Source:
    """Images, not yet read, with their labels. `read` may be called from several threads at once."""

    names: Sequence[str]  # where each image comes from, for messages and the manifest
    labels: np.ndarray  # int64 [N], 0 <= label < len(classes)
    classes: list[str]
    read: Callable[[int], bytes | np.ndarray]  # an image file's bytes, or uint8 [H, W] or [H, W, 3]
    split: str | None  # None where the source has none
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # float64 [N] each, to be regressed
    libraries: dict[str, str] = field(default_factory=dict)  # versions of what was needed beyond Pillow
    notes: list[str] = field(default_factory=list)  # what the user should know: an empty class folder
    size_of: Callable[[int], int] | None = (
        None  # bytes of an image file, where that is known without reading it
    )


def open_source(
    source: str,
    split: str | None = None,
    root: str | Path = "data",
    *,
    classes: str | Path | None = None,
    devkit: str | Path | None = None,
) -> Source:
    """Open a source in any of the forms above. `split` None means train where the source has splits.

    `root` is where torchvision keeps (or puts) its files. `classes`, a manifest or a text file, sets the
    order of the classes: labels are renumbered by name. `devkit` is ImageNet's, for its validation tar.
    What looks wrong without being so for certain is said in `notes`. Raises InputError if there is nothing
    such, or if the classes aren't those of `classes`.
    """
    from pipelines.convert.imagenet import in_order_of, remarks

    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split '{split}'; one of {', '.join(SPLITS)}")
    opened = _open(source, split, Path(root), None if devkit is None else Path(devkit))
    if classes is not None:
        opened = in_order_of(opened, Path(classes))
    return replace(opened, notes=[*opened.notes, *remarks(opened)])


def _open(source: str, split: str | None, root: Path, devkit: Path | None) -> Source:
    from pipelines.convert import tables, tars

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
            from pipelines.convert.merge import open_beton_source

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
    return _class_folders(path, split)


def _files_ending(folder: Path, end: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{end}") if not left_by_a_system(path.name))


def _and_beside(folder: Path, opened: Source) -> Source:
    """The same, and a note of the folders that lie beside its files: they aren't read."""
    beside = [name for name in FolderTree(folder).folders("") if name != "data"]
    more = [in_short("left out, folders beside these files", beside)] if beside else []
    return replace(opened, notes=[*opened.notes, *more])


# ---------------------------------------------------------------- images alone


def list_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """(every image file under a folder, sorted by path; a note of what is left out, if anything).

    Known by their extensions, in any case, or else by their first bytes. Raises InputError if there is no
    such folder or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    images, others, system = [], LeftOut("no images"), by_a_system()
    for name in _files_under(folder, system):
        if has_image_name(name) or _begins_as_image(folder / name):
            images.append(folder / name)
        else:
            others.add(name)
    if not images:
        raise InputError(f"{folder}: no image in it (looked for {', '.join(EXTENSIONS)})")
    return images, others.notes() + system.notes()


def _begins_as_image(path: Path) -> bool:
    try:
        return is_image(read_regular(str(path), HEAD))
    except (OSError, jpeg.DamagedImage):
        return False


def decode_rgb(image: bytes | str | Path, name: str | None = None) -> np.ndarray:
    """RGB pixels of an image file (a path, or its bytes), uint8 [H, W, 3], turned upright as EXIF says.

    Raises InputError, naming the file (or `name`), if it can't be read or is damaged.
    """
    name = name or (f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image))
    try:
        data = image if isinstance(image, bytes) else read_regular(os.fspath(image))
        if jpeg.is_jpeg(data):
            header = jpeg.read_header(data)
            return upright(jpeg.decode(data, header), header.orientation)
        return upright(*decode_other(data))
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever a decoder raises is about this image alone
        raise InputError(f"{name}: no image, or damaged ({first_line(error)})") from error


def decode_other(data: bytes, white_level: int | None = None) -> tuple[np.ndarray, int]:
    """PNG, WebP, GIF (its first frame) and what else Pillow reads: uint8 [H, W, 3] and EXIF's orientation.

    Transparency is dropped and 16 bits become 8; `white_level`: see `depth`. Raises jpeg.DamagedImage.
    """
    try:
        image = jpeg.open_with_pillow(data)
        if depth.is_deep(image, data):
            pixels = as_rgb(depth.to_8_bits(image, data, white_level))
        else:
            pixels = np.asarray(image.convert("RGB"))
        return pixels, jpeg.orientation_of(image)
    except jpeg.DamagedImage:
        raise
    except Exception as error:  # whatever a decoder raises is about this image alone
        raise jpeg.DamagedImage(first_line(error)) from error


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] -> [H, W, 3]."""
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8) of pixels [H, W, 3]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ------------------------------------------------------------ folders and files


class FolderTree:
    """A folder on disk for `layout_of`."""

    def __init__(self, top: str | Path):
        self._top = str(top)
        self._scanned: dict[str, tuple[list[str], list[str]]] = {}

    def folders(self, at: str) -> list[str]:
        return self._scan(at)[0]

    def files(self, at: str) -> list[str]:
        return self._scan(at)[1]

    def has_images(self, at: str) -> bool:
        return any(map(has_image_name, self.files(at)))

    def _scan(self, at: str) -> tuple[list[str], list[str]]:
        if at not in self._scanned:
            folders: list[str] = []
            files: list[str] = []
            try:
                with os.scandir(f"{self._top}/{at}") as entries:
                    for entry in entries:
                        if not left_by_a_system(entry.name):
                            (folders if entry.is_dir() else files).append(entry.name)
            except OSError as error:
                raise InputError(f"{self._top}/{at}: cannot be read ({error.strerror})") from error
            self._scanned[at] = sorted(folders), sorted(files)
        return self._scanned[at]


def _files_under(folder: Path, left: LeftOut) -> list[str]:
    """Paths, relative to it, of the files below a folder, sorted by their parts; links are followed, but
    never in a circle. What systems have left there is added to `left` instead."""
    dropped: list[str] = []
    found = _files_without_links(str(folder), dropped)
    if found is None:
        dropped.clear()
        found = _files_with_links(str(folder), dropped)
    left.add(*dropped)
    return found


def _files_without_links(top: str, left: list[str]) -> list[str] | None:
    """The same, without asking for more than the names of each folder; None if there is a linked folder."""
    found: list[list[str]] = []
    folders: list[list[str]] = [[]]
    while folders:
        parts = folders.pop()
        here = "/".join([top, *parts])
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if left_by_a_system(entry.name):
                        left.append("/".join([*parts, entry.name]))
                    elif entry.is_dir():
                        if entry.is_symlink():
                            return None
                        folders.append([*parts, entry.name])
                    else:
                        found.append([*parts, entry.name])
        except OSError as error:
            raise InputError(f"{here}: cannot be read ({error.strerror})") from error
    return ["/".join(parts) for parts in sorted(found)]


def _files_with_links(top: str, left: list[str]) -> list[str]:
    found: list[list[str]] = []
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for here, folders, files in os.walk(top, onerror=unreadable, followlinks=True):
        status = os.stat(here)
        known = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        parts = [part for part in here[len(top) :].split(os.sep) if part]
        if known:
            folders[:], files[:] = [], []
        left += ["/".join([*parts, name]) for name in (*folders, *files) if left_by_a_system(name)]
        folders[:] = [name for name in folders if not left_by_a_system(name)]
        found += [[*parts, name] for name in files if not left_by_a_system(name)]
    return ["/".join(parts) for parts in sorted(found)]


def read_regular(path: str, most: int | None = None) -> bytes:
    """The bytes of a file, or the first of them; a named pipe, which might never give any, is refused."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise jpeg.DamagedImage("no regular file")
        size = status.st_size if most is None else min(most, status.st_size)
        data = os.read(number, size)
        while len(data) < size and (more := os.read(number, size - len(data))):
            data += more  # a network's file system may give less than what was asked for
        return data
    finally:
        os.close(number)


def _class_folders(folder: Path, split: str | None) -> Source:
    """torchvision's ImageFolder layout, see `layout`. Every file in a class folder counts as an image: one
    that is none is refused by name later, not skipped in silence."""
    layout = layout_of(FolderTree(folder), str(folder), split)
    top = folder / layout.base
    if not layout.classes:
        files = FolderTree(top).files("")
        if any(name.startswith("ILSVRC2012_val_") for name in files):
            raise InputError(
                f"{top}: ImageNet's validation images without their classes; convert "
                "ILSVRC2012_img_val.tar and its devkit instead, or put the images in one folder per class"
            )
        what = "its images lie in no class folder" if any(map(has_image_name, files)) else "no image in it"
        raise InputError(f"{top}: {what}; put the images in one folder per class: {top}/CLASS/1.jpg")

    paths, counts, left = Names(), [], by_a_system()
    for name in layout.classes:
        files = _files_under(top / name, left)
        counts.append(len(files))
        for file in files:
            paths.append(f"{name}/{file}")
    if not paths:
        raise InputError(f"{top}: no image in any of its {len(layout.classes)} class folders")
    opened = Source(
        names=paths,
        labels=np.repeat(np.arange(len(counts)), counts),
        classes=layout.classes,
        read=lambda index: read_regular(f"{top}/{paths[index]}"),
        split=layout.split,
        size_of=lambda index: os.stat(f"{top}/{paths[index]}").st_size,
    )
    return as_laid_out(opened, layout, counts, left.notes(), str(folder))


def as_laid_out(opened: Source, layout: Layout, counts: Sequence[int], left: list[str], where: str) -> Source:
    """A source of class folders with its notes, numbered as the training images are. `counts`: of each class;
    `left`: notes of what else is left out."""
    from pipelines.convert import imagenet

    empty = [f"class folder {name} is empty" for name, count in zip(layout.classes, counts) if not count]
    opened = replace(opened, notes=[*empty, *layout.notes, *left])
    if layout.train is None:
        return opened
    return imagenet.renumbered(opened, layout.train, f"{where}/{layout.train_base}".rstrip("/"))


def files_of_split(
    source: str | Path, files: list[Path], split: str | None, strict: bool = True
) -> tuple[list[Path], str | None, list[str]]:
    """Files of one split, by their names (train-00000-of-00002.parquet); the split, None where no name says
    one; and a note of what is left out. `strict` refuses a split that no name says."""
    of_split: dict[str, list[Path]] = {}
    for path in files:
        of_split.setdefault(split_of_file(path.name) or "", []).append(path)
    others = of_split.pop("", [])
    if not of_split:
        if strict and split is not None:
            raise InputError(f"{source}: no split '{split}' in it, only unnamed files")
        return files, None, []
    names = {each: [path.name for path in paths] for each, paths in of_split.items()}
    key, split = choose_split(str(source), names, split)
    left = [path.name for path in others + of_split.get(UNLABELLED, [])]
    return of_split[key], split, [in_short("left out, files of no split", left)] if left else []


# ---------------------------------------------------------------------- parquet


def _parquet(paths: list[Path], split: str | None, notes: list[str]) -> Source:
    """Columns `image` ({bytes, path}, or plain bytes) and `label`; class names from the schema, if there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, columns, names = paths[0], [], Names()
    groups: list[tuple[Path, int, str]] = []  # of each row group: file, number there, column of images
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

    made = labelled(str(path), names, labels, classes, read, split, {"pyarrow": pa.__version__})
    return replace(made, notes=[*made.notes, *notes])


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


def _idx(folder: Path, split: str | None) -> Source:
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


def _torchvision(name: str, split: str | None, root: Path) -> Source:
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


def _sklearn(name: str, split: str | None) -> Source:
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


def labelled(
    source: str,
    names: Sequence[str],
    labels: np.ndarray,
    classes: list[str] | None,
    read: Callable[[int], bytes | np.ndarray],
    split: str | None,
    libraries: dict[str, str] | None = None,
) -> Source:
    """A Source whose labels are checked against its classes; classes without names are numbered."""
    if len(labels) == 0:
        raise InputError(f"{source}: no image in it")
    check_labels(source, labels, classes, names.__getitem__)
    classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
    size_of = getattr(read, "size_of", None)  # a tar's reader knows it
    return Source(names, labels, classes, read, split, libraries=libraries or {}, size_of=size_of)


BELIEVED = 25_000  # classes without names, however few images: ImageNet-21k's and more


def check_labels(
    source: str, labels: np.ndarray, classes: Sequence[str] | None, name_of: Callable[[int], str]
) -> None:
    """Raise InputError, naming the image, for a negative label, one without a class name where there are
    names, or one that makes more classes than can be meant: over BELIEVED, and more than there are images."""
    if labels.min() < 0:
        where = name_of(int(labels.argmin()))
        raise InputError(f"{source}: {where} has label {labels.min()}; is this split unlabelled?")
    highest, first = int(labels.max()), int(labels.argmax())
    if classes:
        if highest >= len(classes):
            raise InputError(
                f"{source}: {name_of(first)} has label {highest}, but {len(classes)} classes are named"
            )
    elif highest >= max(BELIEVED, len(labels)):
        raise InputError(
            f"{source}: {name_of(first)} has label {highest}, which makes {highest + 1:,} classes of "
            f"{len(labels):,} images; without names, more than {BELIEVED:,} classes are only accepted if "
            "there are as many images: number them from 0, or give their names"
        )


def by_name(
    labels: np.ndarray, classes: Sequence[str], wanted: Sequence[str], source: str, where: str
) -> np.ndarray:
    """Labels int64 [N] of `classes` as numbers of the same names in `wanted`. Raises InputError, with the
    list, if a class that has images isn't among these."""
    number = {name: i for i, name in enumerate(wanted)}
    strange = [classes[label] for label in np.unique(labels) if classes[label] not in number]
    if strange:
        known = ", ".join(wanted[:10]) + (" ..." if len(wanted) > 10 else "")
        raise InputError(f"{source}: {in_short(f'classes that {where} lacks', strange)}; it has {known}")
    return np.array([number.get(name, -1) for name in classes], np.int64)[labels]
