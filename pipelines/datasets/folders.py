"""Folders of image files: list them, recognise splits and classes, and read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.datasets import imagenet
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.layout import Layout, choose_split, layout_of
from pipelines.datasets.names import Names
from pipelines.datasets.recognise import (
    EXTENSIONS,
    HEAD,
    UNLABELLED,
    LeftOut,
    by_a_system,
    has_image_name,
    in_short,
    is_image,
    left_by_a_system,
    missing_shards,
    split_of_file,
)
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import NO_LABEL


def unlabelled_images(folder: Path) -> Dataset:
    """All image files under a folder, named and sorted by their paths there, with notes of what is left out.

    Images are recognised by their extensions, in any case, or by their first bytes. Raises InputError if the
    folder doesn't exist or has no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    names, others, system = Names(), LeftOut("files that aren't images"), by_a_system()
    for name in _files_under(folder, system):
        if has_image_name(name) or _begins_as_image(folder / name):
            names.append(name)
        else:
            others.add(name)
    if not names:
        stacks = any(name.lower().endswith(".npy") for name in others.first)
        arrays = "; arrays (.npy) aren't read: save them as PNG" if stacks else ""
        raise InputError(f"{folder}: contains no images (looked for {', '.join(EXTENSIONS)}){arrays}")
    folder = folder.absolute()  # the working folder may change before an image is read
    return Dataset(
        names=names,
        labels=np.full(len(names), NO_LABEL, np.int64),
        classes=[],
        read=lambda index: read_regular(f"{folder}/{names[index]}"),
        split=None,
        notes=others.notes() + system.notes(),
        size_of=lambda index: os.stat(f"{folder}/{names[index]}").st_size,
    )


def _begins_as_image(path: Path) -> bool:
    try:
        return is_image(read_regular(str(path), HEAD))
    except (OSError, jpeg.DamagedImage):
        return False


class FolderTree:
    """A folder on disk, as a tree for `layout_of`."""

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
            for entry in _scanned(f"{self._top}/{at}"):
                if not left_by_a_system(entry.name):
                    (folders if is_folder(entry) else files).append(entry.name)
            self._scanned[at] = sorted(folders), sorted(files)
        return self._scanned[at]


def _scanned(folder: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder. Raises InputError, naming the folder, if it can't be read."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link to itself is neither folder nor error."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _files_under(top: Path, left: LeftOut) -> list[str]:
    """Relative paths of the files below a folder, sorted by their parts. Links are followed, but not in a
    circle. Files left by operating systems are added to `left` instead."""
    found: list[list[str]] = []
    folders: list[tuple[list[str], bool]] = [([], False)]  # path, and whether a link led there
    seen: dict[tuple[int, int], bool] = {}
    while folders:
        above, linked = folders.pop()
        here = "/".join([str(top), *above])
        status = os.stat(here)
        number = status.st_dev, status.st_ino
        # Some file systems give several folders the same number, so a circle must include a link.
        if number in seen and (linked or seen[number]):
            continue
        seen[number] = linked
        below: list[tuple[list[str], bool]] = []
        for entry in _scanned(here):
            parts = [*above, entry.name]
            if left_by_a_system(entry.name):
                left.add("/".join(parts))
            elif is_folder(entry):
                below.append((parts, linked or entry.is_symlink()))
            else:
                found.append(parts)
        folders += reversed(below)
    return ["/".join(parts) for parts in sorted(found)]


def read_regular(path: str, most: int | None = None) -> bytes:
    """Read a file, or its first `most` bytes; refuses a named pipe, which might never return any."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise jpeg.DamagedImage("not a regular file")
        size = status.st_size if most is None else min(most, status.st_size)
        data = os.read(number, size)
        while len(data) < size and (more := os.read(number, size - len(data))):
            data += more  # network file systems may return less than was asked for
        return data
    finally:
        os.close(number)


def class_folders(folder: Path, split: str | None) -> Dataset:
    """A folder in torchvision's ImageFolder layout (see `layout`), or images without labels. Every file in a
    class folder counts as an image; one that isn't an image is reported by name later, not skipped
    silently."""
    layout = layout_of(FolderTree(folder), str(folder), split)
    top = folder / layout.base
    if not layout.classes:
        if any(name.startswith("ILSVRC2012_val_") for name in FolderTree(top).files("")):
            raise InputError(
                f"{top}: ImageNet's validation images without their classes; convert "
                "ILSVRC2012_img_val.tar and its devkit instead, or put the images in one folder per class"
            )
        loose = unlabelled_images(top)
        return replace(loose, split=layout.split, notes=[*layout.notes, *loose.notes])
    paths, counts, left = Names(), [], by_a_system()
    for name in layout.classes:
        files = _files_under(top / name, left)
        counts.append(len(files))
        for file in files:
            paths.append(f"{name}/{file}")
    if not paths:
        raise InputError(f"{top}: no image in any of its {len(layout.classes)} class folders")
    top = top.absolute()  # the working folder may change before an image is read
    opened = Dataset(
        names=paths,
        labels=np.repeat(np.arange(len(counts)), counts),
        classes=layout.classes,
        read=lambda index: read_regular(f"{top}/{paths[index]}"),
        split=layout.split,
        size_of=lambda index: os.stat(f"{top}/{paths[index]}").st_size,
    )
    return as_laid_out(opened, layout, counts, left.notes(), str(folder))


def as_laid_out(
    opened: Dataset, layout: Layout, counts: Sequence[int], left: list[str], where: str
) -> Dataset:
    """Add notes to a dataset of class folders, and number its classes like the training images'. `counts`:
    images per class; `left`: notes of what else is left out."""
    empty = [f"class folder {name} is empty" for name, count in zip(layout.classes, counts) if not count]
    opened = replace(opened, notes=[*empty, *layout.notes, *left])
    if layout.train is None:
        return opened
    return imagenet.renumbered(opened, layout.train, f"{where}/{layout.train_base}".rstrip("/"))


def files_of_split(
    source: str | Path, files: list[Path], split: str | None, strict: bool = True, top: Path | None = None
) -> tuple[list[Path], str | None, list[str]]:
    """Select the files of one split by their names (train-00000-of-00002.parquet), or by their paths below
    `top` (train/0000.parquet). Returns the files; the split, or None if no name states one; and notes of what
    is left out or missing. `strict` refuses a split that no name states."""
    name_of = {path: path.name if top is None else path.relative_to(top).as_posix() for path in files}
    of_split: dict[str, list[Path]] = {}
    for path in files:
        of_split.setdefault(split_of_file(name_of[path]) or "", []).append(path)
    others = of_split.pop("", [])
    if not of_split:
        if strict and split is not None:
            raise InputError(f"{source}: has no split '{split}', only unnamed files")
        return files, None, missing_shards([name_of[path] for path in files])
    names = {each: [name_of[path] for path in paths] for each, paths in of_split.items()}
    key, split = choose_split(str(source), names, split)
    left = [name_of[path] for path in others] + names.get(UNLABELLED, []) * (key != UNLABELLED)
    notes = [in_short("ignored files of no split", left)] if left else []
    return of_split[key], split, notes + missing_shards(names[key])
