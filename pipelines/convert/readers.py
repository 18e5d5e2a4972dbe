"""Where images come from: each kind of source is brought to one form, `Source`.

a folder of class folders     photos/cat/1.jpg, photos/dog/2.png ... (or photos/train/cat/1.jpg)
ILSVRC2012's own tars         ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, or the folder that holds them
WebDataset shards             a .tar, a folder of them, or train-{000000..000146}.tar
a tar of class folders        cat/1.jpg, dog/2.png ... in one tar
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
import re
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
from pipelines.convert.names import Names
from pipelines.errors import InputError

SPLITS = ("train", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
_VALIDATION = ("validation", "valid", "val")  # names under which that split is found; serves as "test", too
_SPLIT_NAMES = ("train", "test", *_VALIDATION)


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
    if parquets := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        if shards := sorted(path.glob("*.tar")):  # our own tars, whose manifest has its rows beside it
            return tars.open_tars(source, *files_of_split(path, shards, split), devkit)
        return _parquet(*files_of_split(path, parquets, split))
    if shards := tars.of_imagenet(path, split) or sorted(path.glob("*.tar")):
        return tars.open_tars(source, *files_of_split(path, shards, split), devkit)
    return _class_folders(path, split)


# ---------------------------------------------------------------- images alone


def list_images(folder: str | Path) -> list[Path]:
    """Every image file under a folder, by extension (in any case), sorted; hidden ones are left out.

    Raises InputError if there is no such folder or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    images = [folder / name for name in _files_under(folder) if name.lower().endswith(EXTENSIONS)]
    if not images:
        raise InputError(f"{folder}: no image in it (looked for {', '.join(EXTENSIONS)})")
    return images


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
        raise InputError(f"{name}: no image, or damaged ({jpeg.reason(error)})") from error


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
        raise jpeg.DamagedImage(jpeg.reason(error)) from error


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


def _files_under(folder: Path) -> list[str]:
    """Paths, relative to it, of the files below a folder, sorted by their parts; links are followed, but
    never in a circle."""
    found = _files_without_links(str(folder))
    return _files_with_links(str(folder)) if found is None else found


def _files_without_links(top: str) -> list[str] | None:
    """The same, without asking for more than the names of each folder; None if there is a linked folder."""
    found: list[list[str]] = []
    folders: list[list[str]] = [[]]
    while folders:
        parts = folders.pop()
        here = "/".join([top, *parts])
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if entry.is_symlink():
                            return None
                        folders.append([*parts, entry.name])
                    else:
                        found.append([*parts, entry.name])
        except OSError as error:
            raise InputError(f"{here}: cannot be read ({error.strerror})") from error
    return ["/".join(parts) for parts in sorted(found)]


def _files_with_links(top: str) -> list[str]:
    found: list[list[str]] = []
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for here, folders, files in os.walk(top, onerror=unreadable, followlinks=True):
        status = os.stat(here)
        known = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [] if known else [name for name in folders if not name.startswith(".")]
        parts = [part for part in here[len(top) :].split(os.sep) if part]
        found += [[*parts, name] for name in files if not known and not name.startswith(".")]
    return ["/".join(parts) for parts in sorted(found)]


def read_regular(path: str) -> bytes:
    """The bytes of a file; a named pipe, which would be waited for, for ever, is refused."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise jpeg.DamagedImage("no regular file")
        data = os.read(number, status.st_size)
        while len(data) < status.st_size and (more := os.read(number, status.st_size - len(data))):
            data += more  # a network's file system may give less than what was asked for
        return data
    finally:
        os.close(number)


def _class_folders(folder: Path, split: str | None) -> Source:
    """torchvision's ImageFolder layout. Every file in a class folder counts as an image: one that is none
    is refused by name later, not skipped in silence."""
    from pipelines.convert import imagenet

    with os.scandir(folder) as entries:
        names = sorted(each.name for each in entries if not each.name.startswith(".") and each.is_dir())
    if names and set(names) <= set(_SPLIT_NAMES):
        chosen, split = _choose_split(folder, names, split)
        opened = replace(_class_folders(folder / chosen, None), split=split)
        if chosen == "train" or "train" not in names:
            return opened
        of_train = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        return imagenet.renumbered(opened, of_train, folder / "train") if of_train else opened
    if split is not None:
        raise InputError(f"{folder}: has no splits; leave --split out")
    if not names:
        loose = any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())
        if any(path.name.startswith("ILSVRC2012_val_") for path in folder.iterdir()):
            raise InputError(
                f"{folder}: ImageNet's validation images without their classes; convert "
                "ILSVRC2012_img_val.tar and its devkit instead, or put the images in one folder per class"
            )
        what = "its images lie in no class folder" if loose else "no image in it"
        raise InputError(f"{folder}: {what}; put the images in one folder per class: {folder}/CLASS/1.jpg")

    paths, counts = Names(), []
    for name in names:
        files = _files_under(folder / name)
        counts.append(len(files))
        for file in files:
            paths.append(f"{name}/{file}")
    if not paths:
        raise InputError(f"{folder}: no image in any of its {len(names)} class folders")
    top = str(folder)
    return Source(
        names=paths,
        labels=np.repeat(np.arange(len(names)), counts),
        classes=names,
        read=lambda index: read_regular(f"{top}/{paths[index]}"),
        split=None,
        notes=[f"class folder {name} is empty" for name, count in zip(names, counts) if not count],
        size_of=lambda index: os.stat(f"{top}/{paths[index]}").st_size,
    )


def files_of_split(source: Path, files: list[Path], split: str | None) -> tuple[list[Path], str | None]:
    """Parquets of one split, by their names (train-00000-of-00002.parquet), and the split."""
    of_split = {
        name: [
            path for path in files if re.match(rf"{name}([-_.]|$)", path.name.removeprefix("ILSVRC2012_img_"))
        ]
        for name in _SPLIT_NAMES
    }
    present = [name for name, paths in of_split.items() if paths]
    if not present and split is None:
        return files, None
    chosen, split = _choose_split(source, present, split)
    return of_split[chosen], split


def _choose_split(source: Path, present: list[str], split: str | None) -> tuple[str, str]:
    """The name under which a split lies in a source, and the split; left out, it is train or the only one."""
    if split is None:
        only = present[0] if len(present) == 1 else "train"
        split = "validation" if only in _VALIDATION else only
    for name in _VALIDATION if split == "validation" else (split, *_VALIDATION * (split == "test")):
        if name in present:
            return name, split
    raise InputError(f"{source}: no split '{split}' in it, only {', '.join(present) or 'unnamed files'}")


# ---------------------------------------------------------------------- parquet


def _parquet(paths: list[Path], split: str | None) -> Source:
    """Columns `image` ({bytes, path}, or plain bytes) and `label`; class names from the schema, if there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = paths[0]
    try:
        files, tables = [], []
        for path in paths:
            files.append(pq.ParquetFile(path))
            image, label = _parquet_columns(path, files[-1].schema_arrow)
            tables.append(files[-1].read([label])[label])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
    if any(not pa.types.is_integer(table.type) or table.null_count for table in tables):
        raise InputError(f"{path}: its column '{label}' must hold one integer a row")
    labels = np.concatenate([table.to_numpy() for table in tables]).astype(np.int64)
    names = [f"{path.name}:{row}" for path, table in zip(paths, tables) for row in range(len(table))]

    groups = [(file, number) for file in files for number in range(file.num_row_groups)]
    lengths = [file.metadata.row_group(number).num_rows for file, number in groups]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    lock = threading.Lock()  # a ParquetFile is not for two threads at once

    @functools.lru_cache(maxsize=8)  # a row group is read once for all its images
    def images_of(group: int) -> Any:
        file, number = groups[group]
        return file.read_row_group(number, [image])[image]

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

    classes = _huggingface_classes(files[0].schema_arrow, label)
    return labelled(str(path), names, labels, classes, read, split, {"pyarrow": pa.__version__})


def _parquet_columns(path: Path, schema: Any) -> tuple[str, str]:
    image = next((name for name in ("image", "img") if name in schema.names), None)
    label = next((name for name in ("label", "fine_label") if name in schema.names), None)
    if image is None or label is None:
        missing = " and ".join([*["'image'"] * (image is None), *["'label'"] * (label is None)])
        raise InputError(f"{path}: no column {missing} (its columns: {', '.join(schema.names)})")
    return image, label


def _huggingface_classes(schema: Any, label: str) -> list[str] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
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
        raise InputError(f"torchvision:{name}: cannot be had in {root} ({first_line(error)})") from error
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
    if labels.min() < 0:
        where = names[int(labels.argmin())]
        raise InputError(f"{source}: {where} has label {labels.min()}; is this split unlabelled?")
    classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
    if labels.max() >= len(classes):
        where = names[int(labels.argmax())]
        raise InputError(f"{source}: {where} has label {labels.max()}, but {len(classes)} classes are named")
    size_of = getattr(read, "size_of", None)  # a tar's reader knows it
    return Source(names, labels, classes, read, split, libraries=libraries or {}, size_of=size_of)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
