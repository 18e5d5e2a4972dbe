"""Open image sources of every kind as a `Dataset`.

a folder of class folders     photos/cat/1.jpg, photos/dog/2.png ... (or photos/Train/cat/1.jpg), see `layout`
ILSVRC2012's own tars         ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, or the folder that holds them
WebDataset shards             a .tar, a folder of tars, or train-{000000..000146}.tar, see `parts`
images without labels         loose in a folder or in tars, or the split `unlabeled`
a tar of class folders        cat/1.jpg, dog/2.png ... in tars: read as if they were unpacked
another beton                 to make tars or smaller images from it
a table                       a .csv or .jsonl of paths, with labels and regression targets
Hugging Face's tables         a .parquet or .arrow file, or a folder of them, see `parquet`
idx files                     Debian's /usr/share/datasets/fashion-mnist, MNIST as it is published
torchvision:NAME              a data set that torchvision knows (FashionMNIST, CIFAR10, SVHN ...)
sklearn:digits                1,797 grey images of 8 x 8, included with scikit-learn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.datasets import parquet, tables, tars
from pipelines.datasets.beton import open_beton_source
from pipelines.datasets.columns import NONE, USUAL, Columns
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.folders import FolderTree, class_folders
from pipelines.datasets.idx import is_idx, open_idx
from pipelines.datasets.imagenet import in_order_of, remarks
from pipelines.datasets.named import open_sklearn, open_torchvision
from pipelines.datasets.parts import parts_of
from pipelines.datasets.recognise import UNLABELLED, ending_in, in_short
from pipelines.errors import InputError
from pipelines.formats.beton import NO_LABEL
from pipelines.formats.jpeg import LFS, LFS_HINT

SPLITS = ("train", "validation", "test", UNLABELLED)


def open_dataset(
    source: str,
    split: str | None = None,
    root: str | Path = "data",
    *,
    classes: str | Path | None = None,
    devkit: str | Path | None = None,
    columns: Columns = USUAL,
) -> Dataset:
    """Open a source in any of the forms above. `split` None means train if the source has splits.

    `root` is torchvision's download folder. `classes`, a manifest or a text file, sets the order of the
    classes: labels are renumbered by name. `devkit` is ImageNet's, for its validation tar. `columns` names
    columns of tables and fields of tars' samples. Suspicious findings that aren't certainly errors are listed
    in `notes`. Raises InputError if the source doesn't exist, if its classes aren't those of `classes`, or if
    a requested target doesn't exist.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split '{split}'; one of {', '.join(SPLITS)}")
    columns.check()
    opened = _open(source, split, Path(root), None if devkit is None else Path(devkit), columns)
    if columns.label == NONE:
        opened = replace(opened, labels=np.full_like(opened.labels, NO_LABEL), classes=[])
    if classes is not None:
        opened = in_order_of(opened, Path(classes))
    for name in columns.targets or ():
        if name not in opened.targets:
            known = ", ".join(opened.targets) or "none"
            raise InputError(f"{source}: has no target '{name}' (--targets); its targets: {known}")
    return replace(opened, notes=[*opened.notes, *remarks(opened)])


def _open(source: str, split: str | None, root: Path, devkit: Path | None, columns: Columns) -> Dataset:
    if source.startswith("torchvision:"):
        return open_torchvision(source.removeprefix("torchvision:"), split, root)
    if source.startswith("sklearn:"):
        return open_sklearn(source.removeprefix("sklearn:"), split)
    path, files = Path(source), parts_of(source)
    if files != [path] or path.is_file():
        return _open_files(source, files, split, devkit, columns)
    if not path.is_dir():
        hint = "; data sets by name are torchvision:NAME and sklearn:digits" if "/" not in source else ""
        raise InputError(f"{source}: no such folder or file{hint}")
    if is_idx(path):
        return open_idx(path, split)
    # Tars come first: ours may have a parquet file, with the rows of their manifest, next to them.
    if shards := tars.of_imagenet(path, split) or ending_in(path, ".tar"):
        return _and_beside(path, tars.open_tars(source, _fetched(shards), split, devkit, columns))
    if files := parquet.files_in(path):
        return _and_beside(path, parquet.open_tables(path, _fetched(files), split, columns, path), files)
    return class_folders(path, split)


def _open_files(
    source: str, files: list[Path], split: str | None, devkit: Path | None, columns: Columns
) -> Dataset:
    """Open one file, or several of a kind as one set."""
    ends, path = {file.suffix.lower() for file in files}, files[0]
    for file in files:
        if not file.is_file():
            what = "a folder, not a file" if file.is_dir() else "and there is no such file"
            raise InputError(f"{source}: names {file}, {what}")
    _fetched(files)
    if ends == {".beton"}:
        return _of_no_other(source, split, open_beton_source(source))
    if ends == {".tar"}:
        return tars.open_tars(source, files, split, devkit, columns)
    if len(ends) == 1 and ends <= {*parquet.ENDS}:
        return parquet.open_tables(Path(source), files, split, columns)
    if len(files) == 1 and ends <= {".csv", ".tsv", ".jsonl"}:
        return _of_no_other(source, split, tables.open_table(path, columns))
    raise InputError(
        f"{source}: must be a .tar, .parquet, .arrow or .beton, or several of one kind; a .csv or .jsonl; "
        "or a folder"
    )


def _of_no_other(source: str, asked: str | None, opened: Dataset) -> Dataset:
    """Return a set that is of one split, or none. Raises InputError if another one is asked."""
    if asked not in (None, opened.split):
        what = f"is of the split '{opened.split}'" if opened.split else "has no splits"
        raise InputError(f"{source}: {what}; leave --split out")
    return opened


def _fetched(files: list[Path]) -> list[Path]:
    """Return the files. Raises InputError for a Git LFS pointer in place of a file."""
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise InputError(f"{path}: is {LFS_HINT}")
    return files


def _and_beside(folder: Path, opened: Dataset, files: Sequence[Path] = ()) -> Dataset:
    """Add a note of the folders next to its files, which aren't read."""
    read = {path.relative_to(folder).parts[0] for path in files}
    beside = [name for name in FolderTree(folder).folders("") if name not in read]
    more = [in_short("ignored folders next to these files", beside)] if beside else []
    return replace(opened, notes=[*opened.notes, *more])
