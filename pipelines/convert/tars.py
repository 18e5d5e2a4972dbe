"""Images in tars, read in place: ILSVRC2012's own, WebDataset shards, and plain tars of class folders.

The headers are walked once (a tar of tars likewise); an image is then one positioned read, from any thread.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.convert import imagenet, jpeg
from pipelines.convert.names import Names
from pipelines.convert.readers import EXTENSIONS, Source, labelled
from pipelines.errors import InputError

BLOCK = 512


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # of its content, in the tar
    size: int


def open_tars(source: str, paths: list[Path], split: str | None, devkit: Path | None) -> Source:
    """Tars of any of the kinds above, told apart by what is in them. Raises InputError."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such tar")
    tars = [Tar(path) for path in paths]
    first = next(tars[0].members(), None)
    if first is None:
        raise InputError(f"{paths[0]}: no file in this tar")
    if first.name.endswith(".tar"):
        return _tar_of_tars(source, tars, split or "train")
    if imagenet.is_validation_name(first.name):
        return _validation(source, tars[0], devkit)
    if _stem(first.name)[1] not in EXTENSIONS or "/" not in first.name.removeprefix("./"):
        return _webdataset(source, tars, split)
    following = list(_some(tars[0].members(), 4))
    if any(_stem(member.name)[1] not in EXTENSIONS for member in following):
        return _webdataset(source, tars, split)
    return _class_folders(source, tars, split)


def expanded(pattern: str) -> list[Path]:
    """train-{000000..000146}.tar -> those paths; empty if there is no such range in it."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if found is None:
        return []
    before, first, last, after = found.groups()
    return [Path(f"{before}{n:0{len(first)}d}{after}") for n in range(int(first), int(last) + 1)]


def of_imagenet(folder: Path, split: str | None) -> list[Path]:
    """The tar of a split in a folder of ILSVRC2012's downloads; empty if this is no such folder."""
    name = {None: "train", "validation": "val", "test": "val"}.get(split, split)
    path = folder / f"ILSVRC2012_img_{name}.tar"
    if not path.is_file() and split is None:
        path = folder / "ILSVRC2012_img_val.tar"
    return [path] if path.is_file() else []


class Tar:
    """A tar on disk (or within another one), open for positioned reads as long as this object lives."""

    def __init__(
        self, path: Path, start: int = 0, end: int | None = None, file: int | None = None, name: str = ""
    ):
        self.path, self.name = path, name or str(path)
        try:
            self.file = os.open(path, os.O_RDONLY) if file is None else file
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        self.start = start
        self.end = os.fstat(self.file).st_size if end is None else end

    def members(self) -> Iterator[Member]:
        """Its regular files, in order. Raises InputError if it is no tar, damaged, or cut short."""
        at, long_name = self.start, ""
        while True:
            head = os.pread(self.file, BLOCK, at) if at < self.end else b""
            if len(head) < BLOCK:  # every tar ends with blocks of zeros; WebDataset's, too
                raise InputError(
                    f"{self.name}: cut short after {at - self.start:,} bytes, without a tar's end"
                )
            if not head.strip(b"\0"):
                return
            try:
                if int(head[148:156].strip(b"\0 "), 8) != sum(head) - sum(head[148:156]) + 8 * ord(" "):
                    raise ValueError
                size = _number(head[124:136])
            except ValueError as error:
                raise InputError(f"{self.name}: not a tar, or damaged at byte {at - self.start:,}") from error
            name = head[:100].split(b"\0")[0]
            if head[257:263] == b"ustar\0" and head[345]:
                name = head[345:500].split(b"\0")[0] + b"/" + name
            kind, at = head[156:157], at + BLOCK
            if at + size > self.end:
                missing = at + size - self.end
                raise InputError(
                    f"{self.name}: cut short, {missing:,} bytes of {os.fsdecode(name)} are missing"
                )
            if kind == b"L":
                long_name = os.fsdecode(os.pread(self.file, size, at).rstrip(b"\0"))
            elif kind == b"x":
                long_name = _pax_path(os.pread(self.file, size, at)) or long_name
            elif kind in (b"0", b"\0", b"7"):
                yield Member(long_name or os.fsdecode(name), at, size)
                long_name = ""
            elif kind != b"g":
                long_name = ""
            at += size + -size % BLOCK

    def inner(self, member: Member) -> Tar:
        """A tar that is a member of this one."""
        name = f"{self.name}: {member.name}"
        return Tar(self.path, member.offset, member.offset + member.size, self.file, name)


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU's form for what eleven octal digits can't hold
        return int.from_bytes(text[1:], "big")
    return int(text.strip(b"\0 ") or b"0", 8)


def _pax_path(content: bytes) -> str:
    while content:
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].partition(b"=")
        if key == b"path":
            return os.fsdecode(value.rstrip(b"\n"))
        content = content[length:]
    return ""


class Reader:
    """Where each image lies, as compact as it can be for millions; called with an index, it reads one."""

    def __init__(self, tars: list[Tar]):
        self.tars = tars
        self.which, self.offsets, self.sizes = array("H"), array("Q"), array("Q")

    def add(self, which: int, member: Member) -> None:
        self.which.append(which)
        self.offsets.append(member.offset)
        self.sizes.append(member.size)

    def size_of(self, index: int) -> int:
        return self.sizes[index]

    def __call__(self, index: int) -> bytes:
        size = self.sizes[index]
        data = os.pread(self.tars[self.which[index]].file, size, self.offsets[index])
        if len(data) != size:
            raise jpeg.DamagedImage("the tar ends within it")
        return data


def _tar_of_tars(source: str, tars: list[Tar], split: str) -> Source:
    """ILSVRC2012_img_train.tar: nXXXXXXXX.tar, in each of them nXXXXXXXX_NUMBER.JPEG. By class, then name."""
    classes, found = [], []
    for which, tar in enumerate(tars):
        for member in tar.members():
            if member.name.endswith(".tar"):
                classes.append(Path(member.name).stem)
                found.append((classes[-1], which, sorted(tar.inner(member).members())))
    found.sort(key=lambda each: each[0])
    reader, names, counts = Reader(tars), Names(), []
    for name, which, members in found:
        counts.append(len(members))
        for member in members:
            names.append(f"{name}/{member.name.removeprefix('./')}")
            reader.add(which, member)
    labels = np.repeat(np.arange(len(found)), counts)
    return labelled(source, names, labels, sorted(classes), reader, split)


def _validation(source: str, tar: Tar, devkit: Path | None) -> Source:
    """ILSVRC2012_img_val.tar: flat; the devkit's ground truth says the class of each image by its number."""
    members = sorted(tar.members(), key=lambda member: Path(member.name).name)
    classes, truth = imagenet.ground_truth(tar.path, devkit)
    reader, names, labels = Reader([tar]), Names(), []
    for member in members:
        number = imagenet.validation_number(member.name)
        if not 1 <= number <= len(truth):
            raise InputError(
                f"{tar.name}: {member.name} is not among the {len(truth):,} images of the ground truth"
            )
        reader.add(0, member)
        names.append(Path(member.name).name)
        labels.append(truth[number - 1])
    return labelled(source, names, np.array(labels, np.int64), classes, reader, "validation")


def _class_folders(source: str, tars: list[Tar], split: str | None) -> Source:
    """CLASS/IMAGE.jpg in a tar, or FOLDER/CLASS/IMAGE.jpg: the folder right above an image is its class."""
    found = []
    for which, tar in enumerate(tars):
        for member in tar.members():
            parts = member.name.removeprefix("./").split("/")
            if len(parts) < 2:
                raise InputError(f"{tar.name}: {member.name} lies in no class folder")
            if not parts[-1].startswith("."):
                found.append((parts[-2], "/".join(parts[-2:]), which, member))
    found.sort(key=lambda each: each[:2])
    classes = sorted({name for name, *_ in found})
    number = {name: i for i, name in enumerate(classes)}
    reader = Reader(tars)
    for _, _, which, member in found:
        reader.add(which, member)
    labels = np.array([number[name] for name, *_ in found], np.int64)
    return labelled(source, Names(path for _, path, *_ in found), labels, classes, reader, split)


def _webdataset(source: str, tars: list[Tar], split: str | None) -> Source:
    """KEY.jpg with KEY.cls, or KEY.json with "label" (and numbers as regression targets), side by side."""
    reader, names, labels, targets = Reader(tars), Names(), [], []
    for which, tar in enumerate(tars):
        for key, members in _samples(tar):
            image = next((members[end] for end in members if f".{end}" in EXTENSIONS), None)
            if image is None:
                continue  # a sample of something else
            label, values = _label_of(tar, key, members)
            reader.add(which, image)
            names.append(f"{tar.path.name}:{image.name}")
            labels.append(label)
            targets.append(values)
    if not names:
        raise InputError(f"{source}: no image in these tars")
    columns = list(targets[0])
    for name, values in zip(names, targets):
        if list(values) != columns:
            raise InputError(f"{source}: {name} has the targets {list(values)}, those before it {columns}")
    classes = imagenet.class_names(tars[0].path.parent / "manifest.json")
    opened = labelled(source, names, np.array(labels, np.int64), classes, reader, split)
    return replace(
        opened, targets={c: np.array([values[c] for values in targets], np.float64) for c in columns}
    )


def _samples(tar: Tar) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {extension: member}): members whose names are the same up to the first dot of the file's name."""
    key = ""
    members: dict[str, Member] = {}
    for member in tar.members():
        stem, extension = _stem(member.name)
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        members[extension.removeprefix(".")] = member
    if members:
        yield key, members


def _label_of(tar: Tar, key: str, members: dict[str, Member]) -> tuple[int, dict[str, float]]:
    def content(extension: str) -> bytes:
        return os.pread(tar.file, members[extension].size, members[extension].offset)

    values: dict[str, float] = {}
    label: object = None
    try:
        if "json" in members:
            fields = json.loads(content("json"))
            label = next((fields[name] for name in ("label", "cls", "class_id") if name in fields), None)
            numbers = {name: value for name, value in fields.items() if type(value) in (int, float)}
            values = {
                name: float(v) for name, v in numbers.items() if name not in ("label", "cls", "class_id")
            }
        if "cls" in members:
            label = int(content("cls"))
        if label is None and values:
            label = 0
        if type(label) is not int:
            raise ValueError("no class number")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{tar.name}: {key} has no .cls, and no .json with an integer 'label' ({error})"
        ) from error
    return label, values


def _stem(name: str) -> tuple[str, str]:
    """a/b.c.jpg -> (a/b, .c.jpg), in lower case: WebDataset's rule."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _some(members: Iterator[Member], count: int) -> Iterator[Member]:
    for _, member in zip(range(count), members):
        yield member
