"""Images in tars, read in place: ILSVRC2012's own, WebDataset shards, and plain tars of class folders.

The headers (also those of a tar of tars) are read once; then each image is one positioned read, from any
thread.
"""

from __future__ import annotations

import json
import os
import posixpath
import shlex
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.datasets import imagenet
from pipelines.datasets.columns import LABELS, NONE, USUAL, Columns, as_text, finite, numbered, unused
from pipelines.datasets.dataset import Dataset, labelled
from pipelines.datasets.folders import as_laid_out, files_of_split
from pipelines.datasets.layout import Layout, layout_of
from pipelines.datasets.names import Names
from pipelines.datasets.recognise import (
    EXTENSIONS,
    HEAD,
    LeftOut,
    by_a_system,
    has_image_name,
    is_image,
    left_by_a_system,
)
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import NO_LABEL
from pipelines.formats.manifest import content_of, manifest_path
from pipelines.formats.openfiles import OpenFiles
from pipelines.formats.webdataset import tars_of

PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
BLOCK = 512
CHUNK = 128 * BLOCK
LOOKED_AT = 1_000  # members read to tell WebDataset's pairs from class folders
ANSWERS = ("cls", "json")  # extensions of members that state a class
_REGULAR, _HARD, _SYMBOLIC, _FOLDER, _SPARSE = (b"0", b"\0", b"7"), b"1", b"2", b"5", b"S"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # of its content within the tar
    size: int


class Entry(NamedTuple):
    """One header of a tar."""

    kind: bytes
    member: Member
    link: str  # a link's target, as it is written


def open_tars(
    source: str, paths: list[Path], split: str | None, devkit: Path | None, columns: Columns
) -> Dataset:
    """Open tars of any of the kinds above, recognised by their content. Raises InputError."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such tar")
    paths, named, notes = files_of_split(source, paths, split, strict=False)
    files = OpenFiles()
    tars = [Tar(path, files) for path in paths]
    first = next((member for member in tars[0].members() if not _of_a_system(member.name)), None)
    if first is None:
        raise InputError(f"{paths[0]}: this tar contains no files")
    if first.name.lower().endswith(".tar"):
        opened = _tar_of_tars(source, tars, named or split or "train")
    elif imagenet.is_validation_name(first.name):
        opened = _validation(source, tars, devkit)
    elif _is_webdataset(tars[0], columns):
        opened = _webdataset(source, tars, split, named, columns)
    else:
        opened = _as_unpacked(source, tars, split, named)
    left = LeftOut("entries that are no files, or links to what isn't in the tar")
    for tar in tars:
        left.add(*(f"{tar.path.name}:{name}" for name in tar.left_out))
    return replace(opened, notes=[*opened.notes, *notes, *left.notes()])


def _is_webdataset(tar: Tar, columns: Columns) -> bool:
    """Whether images have members with their fields, as in WebDataset: KEY.cls, a KEY.json with a label, or
    any KEY.json outside folders. Other tars are read as if they were unpacked."""
    if columns.image is not None or columns.label not in (None, NONE):
        return True
    folders = described = False
    for member in islice(tar.members(), LOOKED_AT):
        if _of_a_system(member.name):
            continue
        folders = folders or "/" in member.name
        extension = posixpath.splitext(member.name)[1].lower()
        if extension == ".cls":
            return True
        if extension == ".json":
            described = True
            if columns.label_among(_fields(tar.content(member)), tar.name):
                return True
    return described and not folders


def _of_a_system(name: str) -> bool:
    return any(map(left_by_a_system, name.split("/")))


def _own(
    members: Iterable[Member], system: LeftOut, tree: TarTree | None = None, where: str = ""
) -> Iterator[Member]:
    """Yield members that aren't system files and enter them into `tree`; the others are added to `system`."""
    for member in members:
        own = not _of_a_system(member.name)
        if tree is not None:
            tree.add_file(member.name) if own else tree.add_folder(_above_a_systems(member.name))
        if own:
            yield member
        else:
            system.add(where + member.name)


def _above_a_systems(path: str) -> str:
    """The folders of a path, down to the first one created by a system: a/b/@eaDir/0.jpg -> a/b/"""
    folders = path.split("/")[:-1]
    return "".join(f"{name}/" for name in takewhile(lambda name: not left_by_a_system(name), folders))


def of_imagenet(folder: Path, split: str | None) -> list[Path]:
    """The tar of a split in a folder of ILSVRC2012 downloads; empty if the folder isn't one."""
    name = {None: "train", "validation": "val", "test": "val"}.get(split, split)
    path = folder / f"ILSVRC2012_img_{name}.tar"
    if not path.is_file() and split is None:
        path = folder / "ILSVRC2012_img_val.tar"
    return [path] if path.is_file() else []


class Tar:
    """A tar on disk (or within another tar), read in place.

    Attributes, both lists of names, as found by the last pass: folders, those with a header of their own;
    left_out, members that can't be read, such as devices and broken links.
    """

    def __init__(self, path: Path, files: OpenFiles, start: int = 0, end: int | None = None, name: str = ""):
        self.path, self.files, self.name = path, files, name or str(path)
        self.folders: list[str] = []
        self.left_out: list[str] = []
        self.start = start
        try:
            self.end = files.size(path) if end is None else end
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        self._files: dict[str, Member] = {}  # by name; this and the next are only built if a link needs them
        self._links: dict[str, str] = {}  # name -> path of its target

    def read(self, size: int, offset: int) -> bytes:
        return self.files.read(self.path, size, offset)

    def content(self, member: Member) -> bytes:
        return self.read(member.size, member.offset)

    def members(self) -> Iterator[Member]:
        """Yield its files, in order, without a leading "./"; links within the tar are followed.

        Raises InputError if it isn't a tar, is damaged, or is cut short.
        """
        self.left_out, self.folders = [], []
        for kind, member, link in self.entries():
            if kind in _REGULAR:
                yield member
            elif kind in (_HARD, _SYMBOLIC):
                found = self._linked(kind, member.name, link)
                yield from found
                if not found:
                    self.left_out.append(member.name)
            elif kind == _FOLDER:
                self.folders.append(member.name)
            else:
                self.left_out.append(member.name)

    def _linked(self, kind: bytes, name: str, link: str) -> list[Member]:
        """The files that a link leads to: one, or those of a linked folder; none if it is broken."""
        if not self._files:
            for other, member, target in self.entries():
                if other in _REGULAR:
                    self._files[member.name] = member
                elif other in (_HARD, _SYMBOLIC):
                    self._links[member.name] = _target(other, member.name, target)
        path = _target(kind, name, link)
        for _ in range(40):  # Linux's limit
            if path in self._files:
                return [self._files[path]._replace(name=name)]
            if path not in self._links:
                break
            path = self._links[path]
        below = [member for other, member in self._files.items() if path and other.startswith(f"{path}/")]
        return [member._replace(name=name + member.name[len(path) :]) for member in below]

    def entries(self) -> Iterator[Entry]:
        """Yield its headers, in order, also those of tars behind its end (`cat a.tar b.tar`). Raises
        InputError like `members`."""
        at, long_name, long_link, long_size = self.start, "", "", -1
        sparse, ended = False, 0
        while True:
            head = self.read(BLOCK, at) if at < self.end else b""
            if len(head) < BLOCK:  # every tar ends with blocks of zeros, also WebDataset's
                self._require_unpacked(head, at)
                raise InputError(
                    f"{self.name}: cut short after {at - self.start:,} bytes, without a tar's end"
                )
            if not head.strip(b"\0"):
                ended, at = at, self._behind_zeros(at)
                if at + BLOCK > self.end:
                    return
                continue
            kind = head[156:157]
            try:
                if int(head[148:156].strip(b"\0 "), 8) != sum(head) - sum(head[148:156]) + 8 * ord(" "):
                    raise ValueError
                size = _number(head[124:136])
                if kind not in (b"x", b"g", b"L", b"K") and long_size >= 0:
                    size = long_size
                if size < 0:
                    raise ValueError
            except ValueError as error:
                self._require_unpacked(head, at)
                where = f"damaged at byte {at - self.start:,}"
                if ended:
                    end = ended - self.start
                    where += f", behind the end of a tar at byte {end:,}: pack it again"
                    if self.start == 0:  # a tar's end is two blocks
                        file = shlex.quote(str(self.path))
                        where += f", or leave out what follows: head -c {end + 2 * BLOCK} {file} > NEW.tar"
                raise InputError(f"{self.name}: not a tar, or {where}") from error
            if kind in (_HARD, _SYMBOLIC, _FOLDER, b"3", b"4", b"6"):
                size = 0  # whatever the header states
            name = head[:100].split(b"\0")[0]
            if head[257:263] == b"ustar\0" and head[345]:
                name = head[345:500].split(b"\0")[0] + b"/" + name
            at += BLOCK
            if at + size > self.end:
                missing = at + size - self.end
                raise InputError(
                    f"{self.name}: cut short, {missing:,} bytes of {os.fsdecode(name)} are missing"
                )
            if kind == b"L":
                long_name = os.fsdecode(self.read(size, at).rstrip(b"\0"))
            elif kind == b"K":
                long_link = os.fsdecode(self.read(size, at).rstrip(b"\0"))
            elif kind == b"x":
                fields = self._pax(size, at)
                long_name = fields.get(b"GNU.sparse.name", fields.get(b"path", long_name))
                sparse = any(field.startswith(b"GNU.sparse.") for field in fields)
                long_link = fields.get(b"linkpath", long_link)
                long_size = int(fields.get(b"size", long_size))
            elif kind != b"g":
                link = long_link or os.fsdecode(head[157:257].split(b"\0")[0])
                member = Member(_plain(long_name or os.fsdecode(name)), at, size)
                if sparse or kind == _SPARSE:
                    said = f"{member.name} is stored without its holes: pack it without tar's --sparse"
                    raise InputError(f"{self.name}: {said}")
                yield Entry(kind, member, link)
                long_name, long_link, long_size, sparse = "", "", -1, False
            at += size + -size % BLOCK

    def _behind_zeros(self, at: int) -> int:
        """The position of the first block from `at` on that isn't all zeros, or the end."""
        while rest := self.read(min(CHUNK, self.end - at), at):
            if found := len(rest.lstrip(b"\0")):
                return at + (len(rest) - found) // BLOCK * BLOCK
            at += len(rest)
        return self.end

    def _require_unpacked(self, head: bytes, at: int) -> None:
        """Raise InputError if the file starts not with a header, but like a compressed file."""
        packed = next((name for start, name in PACKED.items() if head.startswith(start)), "")
        if packed and at == self.start:
            raise InputError(f"{self.name}: is compressed by {packed} despite its name: unpack it")

    def _pax(self, size: int, at: int) -> dict[bytes, str]:
        try:
            return _pax_fields(self.read(size, at))
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.name}: damaged at byte {at - self.start:,}") from error

    def inner(self, member: Member) -> Tar:
        """A tar that is a member of this tar."""
        name = f"{self.name}: {member.name}"
        return Tar(self.path, self.files, member.offset, member.offset + member.size, name)


def _plain(name: str) -> str:
    """./a//b -> a/b"""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _target(kind: bytes, name: str, link: str) -> str:
    """The path in the tar that a link leads to; a symbolic link's is relative to its own folder."""
    if kind == _HARD:
        return _plain(link)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return "" if path.startswith(("/", "..")) else _plain(path)


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU's form of numbers that exceed eleven octal digits
        return int.from_bytes(text[1:], "big")
    return int(text.strip(b"\0 ") or b"0", 8)


def _pax_fields(content: bytes) -> dict[bytes, str]:
    fields = {}
    while content:
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].partition(b"=")
        fields[key] = os.fsdecode(value.removesuffix(b"\n"))
        if length < 1:
            raise ValueError("a record of no length")
        content = content[length:]
    if int(fields.get(b"size", 0)) < 0:
        raise ValueError("a negative size")
    return fields


class Reader:
    """The location of each image, stored compactly for millions; calling it with an index reads an image."""

    def __init__(self, tars: list[Tar]):
        self.tars = tars
        self.which, self.offsets, self.sizes = array("I"), array("Q"), array("Q")

    def add(self, which: int, member: Member) -> None:
        self.which.append(which)
        self.offsets.append(member.offset)
        self.sizes.append(member.size)

    def size_of(self, index: int) -> int:
        return self.sizes[index]

    def only(self, rows: Sequence[int]) -> Reader:
        """A reader of some of the images, in the order of `rows`."""
        chosen = Reader(self.tars)
        for row in rows:
            chosen.which.append(self.which[row])
            chosen.offsets.append(self.offsets[row])
            chosen.sizes.append(self.sizes[row])
        return chosen

    def __call__(self, index: int) -> bytes:
        size = self.sizes[index]
        data = self.tars[self.which[index]].read(size, self.offsets[index])
        if len(data) != size:
            raise jpeg.DamagedImage("the tar ends within it")
        return data


class TarTree:
    """The folders of tars, as a tree for `layout_of`; system files must not be added."""

    def __init__(self, names: Callable[[], Iterable[str]]):
        """`names`: the paths of all files, used for the few folders whose files are requested."""
        self._names = names
        self._folders: dict[str, set[str]] = {"": set()}
        self._with_images: set[str] = set()

    def add_folder(self, path: str) -> None:
        """Add a folder and its parents; `path` ends with a slash."""
        if path in self._folders:
            return
        self._folders[path] = set()
        above, name = _parted(path[:-1])
        self.add_folder(above)
        self._folders[above].add(name)

    def add_file(self, path: str) -> None:
        folder, name = _parted(path)
        self.add_folder(folder)
        if has_image_name(name):
            self._with_images.add(folder)

    def folders(self, at: str) -> list[str]:
        return sorted(self._folders.get(at, ()))

    def files(self, at: str) -> list[str]:
        return sorted({name for folder, name in map(_parted, self._names()) if folder == at})

    def has_images(self, at: str) -> bool:
        return at in self._with_images


def _parted(path: str) -> tuple[str, str]:
    """a/b/c -> (a/b/, c)"""
    folder, slash, name = path.rpartition("/")
    return folder + slash, name


def _tar_of_tars(source: str, tars: list[Tar], split: str) -> Dataset:
    """ILSVRC2012_img_train.tar: nXXXXXXXX.tar members, each of nXXXXXXXX_NUMBER.JPEG; by class, then name."""
    classes, found = [], []
    system, others = by_a_system(), LeftOut("no tars")
    for which, tar in enumerate(tars):
        for member in _own(tar.members(), system):
            if member.name.lower().endswith(".tar"):
                classes.append(Path(member.name).stem)
                inner = sorted(tar.inner(member).members())
                found.append((classes[-1], which, list(_own(inner, system, where=f"{member.name}:"))))
            else:
                others.add(member.name)
    found.sort(key=lambda each: each[0])
    number = {name: i for i, name in enumerate(sorted(set(classes)))}  # a class may lie in several tars
    reader, names, counts = Reader(tars), Names(), []
    for name, which, members in found:
        counts.append(len(members))
        for member in members:
            names.append(f"{name}/{member.name}")
            reader.add(which, member)
    labels = np.repeat([number[name] for name, *_ in found], counts)
    opened = labelled(source, names, labels, list(number), reader, split)
    return replace(opened, notes=system.notes() + others.notes())


def _validation(source: str, tars: list[Tar], devkit: Path | None) -> Dataset:
    """ILSVRC2012_img_val.tar, or several: flat; the devkit's ground truth gives each image's class by its
    number."""
    system = by_a_system()
    found = [(which, member) for which, tar in enumerate(tars) for member in _own(tar.members(), system)]
    found.sort(key=lambda each: Path(each[1].name).name)
    classes, truth = imagenet.ground_truth(tars[0].path, devkit)
    reader, names, labels = Reader(tars), Names(), []
    for which, member in found:
        number = imagenet.validation_number(member.name)
        if not 1 <= number <= len(truth):
            raise InputError(
                f"{tars[which].name}: {member.name} is not among the {len(truth):,} images of the ground "
                "truth"
            )
        reader.add(which, member)
        names.append(Path(member.name).name)
        labels.append(truth[number - 1])
    opened = labelled(source, names, np.array(labels, np.int64), classes, reader, "validation")
    return replace(opened, notes=system.notes())


def _as_unpacked(source: str, tars: list[Tar], asked: str | None, named: str | None) -> Dataset:
    """CLASS/IMAGE.jpg, or images without labels, in one or several tars; see `layout`."""
    found: dict[tuple[str, int], Member] = {}
    tree = TarTree(lambda: (name for name, _ in found))
    system, again = by_a_system(), LeftOut("files replaced by later ones of the same name")
    for which, tar in enumerate(tars):
        for member in _own(tar.members(), system, tree):
            if (member.name, which) in found:
                again.add(member.name)
            found[member.name, which] = member
        for folder in tar.folders:
            tree.add_folder(_above_a_systems(f"{folder}/" if folder else ""))
    layout = layout_of(tree, source, asked, named)
    number = {name: i for i, name in enumerate(layout.classes)}
    chosen = []
    for (name, which), member in found.items():
        label, slash, rest = name.removeprefix(layout.base).partition("/")
        if name.startswith(layout.base) and slash and label in number:
            chosen.append((number[label], rest.split("/"), which, member))
    if not layout.classes:
        return _unlabelled(source, tars, layout, found, system.notes() + again.notes())
    if not chosen:
        raise InputError(f"{source}: no image lies in a class folder ({layout.base}CLASS/1.jpg)")
    chosen.sort(key=lambda each: each[:3])
    reader, names = Reader(tars), Names()
    for class_number, parts, which, member in chosen:
        reader.add(which, member)
        names.append("/".join([layout.classes[class_number], *parts]))
    labels = np.array([label for label, *_ in chosen], np.int64)
    opened = labelled(source, names, labels, layout.classes, reader, layout.split)
    counts = np.bincount(labels, minlength=len(number)).tolist()
    return as_laid_out(opened, layout, counts, system.notes() + again.notes(), source)


def _unlabelled(
    source: str, tars: list[Tar], layout: Layout, found: dict[tuple[str, int], Member], notes: list[str]
) -> Dataset:
    """Every image below the layout's base, in the order of the paths."""
    reader, names, others = Reader(tars), Names(), LeftOut("files that aren't images")
    below = [(name, which) for name, which in found if name.startswith(layout.base)]
    for parts, which in sorted((name.removeprefix(layout.base).split("/"), which) for name, which in below):
        name = "/".join(parts)
        member = found[layout.base + name, which]
        if is_image_member(tars[which], member):
            reader.add(which, member)
            names.append(name)
        else:
            others.add(name)
    labels = np.full(len(names), NO_LABEL, np.int64)
    opened = labelled(source, names, labels, None, reader, layout.split)
    return replace(opened, notes=[*layout.notes, *others.notes(), *notes])


# ------------------------------------------------------------------- WebDataset


@dataclass(frozen=True)
class Sample:
    """An image with the members that state its class."""

    image: Member
    answers: dict[str, Member]  # "cls", "json" and the requested extension, if present


def samples_of(
    group: Sequence[Member], tar: Tar, columns: Columns = USUAL
) -> tuple[list[Sample], list[Member]]:
    """The samples among members whose names are equal up to the first dot, and the members of no sample.

    By WebDataset's rule they are one sample (`7.jpg`, `7.cls`, or `7.input.jpg`, `7.cls`). If names have dots
    of their own (`img.0001.jpg`, `img.0001.cls`), each image with a class is a sample.
    """
    answers = (*ANSWERS, *([columns.label.lower()] if columns.label else ()))
    by_stem: dict[str, dict[str, Member]] = {}
    images: list[Member] = []
    for member in {each.name: each for each in group}.values():
        stem, extension = posixpath.splitext(member.name)
        extension = extension[1:].lower()
        key, dotted = _stem(member.name)
        if dotted[1:] in answers:
            by_stem.setdefault(key, {})[dotted[1:]] = member
        elif extension in answers:
            by_stem.setdefault(stem, {})[extension] = member
        elif columns.image is not None:
            if columns.image.lower() in (dotted[1:], dotted[1:].rpartition(".")[0]):
                images.append(member)
        elif is_image_member(tar, member):
            images.append(member)
            by_stem.setdefault(stem, {}).setdefault("image", member)
    whole = [found for found in by_stem.values() if "image" in found and len(found) > 1]
    if whole:
        samples = [Sample(f["image"], {e: m for e, m in f.items() if e in answers}) for f in whole]
    elif images:
        shared = {e: m for found in by_stem.values() for e, m in found.items() if e in answers}
        samples = [Sample(images[0], shared)]
    else:
        samples = []
    used = {member.name for sample in samples for member in (sample.image, *sample.answers.values())}
    return samples, [member for member in group if member.name not in used]


def is_image_member(tar: Tar, member: Member) -> bool:
    """Whether a member is an image, by its name or else by its first bytes."""
    extension = posixpath.splitext(member.name)[1].lower()
    if extension in EXTENSIONS:
        return True
    return extension[1:] not in ANSWERS and is_image(tar.read(min(HEAD, member.size), member.offset))


def classes_of(manifest: Path, head: dict[str, Any], tars: Sequence[Tar]) -> list[str] | None:
    """The class names in a manifest with the content `head`; None if it has none, or is about other tars."""
    written = tars_of(manifest, head)
    here = all(tar.path.parent == manifest.parent for tar in tars)
    known = here if written is None else all(tar.path in written for tar in tars)
    return imagenet.names_among(head, "classes") if known else None


def _webdataset(
    source: str, tars: list[Tar], asked: str | None, named: str | None, columns: Columns
) -> Dataset:
    """KEY.jpg with KEY.cls, or with KEY.json, whose fields may be class and targets; or without either."""
    manifest = manifest_path(tars[0].path.parent)
    head = content_of(manifest)
    stored = imagenet.names_among(head, "targets")  # those that our own tars were made with
    if stored is not None and not columns.targets:
        columns = replace(columns, targets=tuple(stored))
    reader, paths, texts = Reader(tars), Names(), Names()
    targets = _Targets(columns)
    tree = TarTree(lambda: paths)
    system, others = by_a_system(), LeftOut("files that are neither images with a class nor classes")
    for which, tar in enumerate(tars):
        for group in _groups(tar, system, tree):
            samples, left = samples_of(group, tar, columns)
            others.add(*(member.name for member in left))
            for sample in samples:
                fields = _fields(tar.content(sample.answers["json"])) if "json" in sample.answers else {}
                reader.add(which, sample.image)
                paths.append(sample.image.name)
                texts.append(_class_of(tar, sample, fields, columns))
                targets.add(fields, f"{tar.path.name}:{sample.image.name}")
        for folder in tar.folders:
            tree.add_folder(_above_a_systems(f"{folder}/" if folder else ""))
    if not paths:
        wanted = f" by the name {columns.image} (--image-key)" if columns.image else ""
        raise InputError(f"{source}: no image{wanted} in these tars")
    if columns.label not in (None, NONE) and not any(texts):
        raise InputError(f"{source}: no sample has a class by the name {columns.label} (--label-column)")
    layout = layout_of(tree, source, asked, named)
    rows: Sequence[int] = range(len(paths))
    if layout.has_splits:
        rows = [row for row in rows if paths[row].startswith(layout.base)]
        reader = reader.only(rows)
    names = Names(f"{tars[w].path.name}:{paths[row]}" for w, row in zip(reader.which, rows))
    chosen = texts if len(rows) == len(texts) else [texts[row] for row in rows]
    numbers, classes = numbered(chosen, source, names.__getitem__, mixed=False)
    classes = classes or classes_of(manifest, head, tars)
    opened = labelled(source, names, numbers, classes, reader, layout.split)
    return replace(
        opened,
        targets=targets.of(rows),
        notes=[
            *(layout.notes if layout.has_splits else []),
            *others.notes(),
            *system.notes(),
            *targets.notes(),
        ],
    )


class _Targets:
    """Numbers in the .json files: the requested fields, or else those that every file has."""

    def __init__(self, columns: Columns):
        self._wanted, self._label = columns.targets, columns.label
        self._values: dict[str, array] | None = None
        self._seen: list[str] = []  # fields of the first file

    def add(self, fields: dict[str, Any], name: str) -> None:
        numbers = {
            field: number
            for field, value in fields.items()
            if (self._wanted is None or field in self._wanted)
            and type(value) in (int, float)
            and (number := finite(value)) is not None
        }
        for field in self._wanted or ():
            if field not in numbers:
                raise InputError(f"{name}: its .json has no number '{field}' (--targets)")
        if self._values is None:
            labels = {field for field in fields if field == self._label or field.strip().lower() in LABELS}
            self._seen = [field for field in fields if field not in labels]
            usual = labels if self._wanted is None else set()
            self._values = {field: array("d") for field in numbers if field not in usual}
        for field in list(self._values):
            if field in numbers:
                self._values[field].append(numbers[field])
            else:
                del self._values[field]

    def notes(self) -> list[str]:
        return [] if self._wanted is None else unused(name for name in self._seen if name not in self._wanted)

    def of(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """{name: float64 [len(rows)]}"""
        return {name: np.array(values, np.float64)[rows] for name, values in (self._values or {}).items()}


def _groups(tar: Tar, system: LeftOut, tree: TarTree) -> Iterator[list[Member]]:
    """Yield runs of adjacent members whose names are equal up to the first dot of the file name."""
    own = _own(tar.members(), system, tree)
    return (list(members) for _, members in groupby(own, lambda member: _stem(member.name)[0]))


def _class_of(tar: Tar, sample: Sample, fields: dict[str, Any], columns: Columns) -> str:
    """The class of a sample in the form in which it is written, "" for none."""
    try:
        if columns.label is not None and columns.label.lower() in sample.answers:
            return as_text(tar.content(sample.answers[columns.label.lower()]).decode())
        if columns.label is None and "cls" in sample.answers:
            return as_text(tar.content(sample.answers["cls"]).decode())
        if columns.label is not None:
            return as_text(fields.get(columns.label))
        single = [name for name, value in fields.items() if not isinstance(value, (list, dict))]
        name = columns.label_among(single, tar.name)
        return "" if name is None else as_text(fields[name])
    except ValueError as error:
        raise InputError(f"{tar.name}: {sample.image.name}: its class can't be read ({error})") from error


def _fields(content: bytes) -> dict[str, Any]:
    """The fields of a .json; empty if it holds no object."""
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _stem(name: str) -> tuple[str, str]:
    """a/b.c.JPG -> (a/b, .c.jpg), by WebDataset's rule."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()
