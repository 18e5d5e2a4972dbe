"""WebDataset tars with indices (`convert-beton --webdataset`, or wds2idx), opened without reading headers.

The headers of a tar of a million images are a million reads, far apart; the index lists where each image lies
in one text file. Labels come from the manifest written with the tars, or from each image's `.cls`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets import imagenet, tars
from pipelines.datasets.columns import numbered
from pipelines.datasets.dataset import Dataset, labelled
from pipelines.datasets.folders import files_of_split
from pipelines.datasets.parts import parts_of
from pipelines.datasets.recognise import LeftOut, ending_in, left_by_a_system, split_of_folder
from pipelines.errors import InputError
from pipelines.formats.manifest import content_of, manifest_path, read_columns, require_columns, require_kinds
from pipelines.formats.openfiles import OpenFiles
from pipelines.formats.webdataset import tars_of

_MEMBER = re.compile(r"(.+?) (\d+) (\d+) ((?:.*?\.)?\1)(?: |$)", re.IGNORECASE | re.ASCII)


def open_shards(path: Path) -> Dataset | None:
    """Open a tar, a folder of tars or several (see `parts`); None unless each tar has its index, and the
    indices suffice: splits within a tar, or fields of a .json without our manifest, take its headers.

    Raises:
        InputError: an index can't be read or isn't its tar's, a tar is cut short, or an image has no class.
    """
    split, notes = None, list[str]()
    if not path.is_dir():
        shards = [shard for shard in parts_of(path) if not left_by_a_system(shard.name)]
    elif shards := ending_in(path, ".tar"):
        shards, split, notes = files_of_split(path, shards, None)
    if not shards or not all(s.suffix.lower() == ".tar" and s.with_suffix(".idx").is_file() for s in shards):
        return None
    files = OpenFiles()
    opened = [tars.Tar(shard, files) for shard in shards]
    reader, names, classes_of, described = tars.Reader(opened), [], [], False
    left = LeftOut("files that are neither images with a class nor classes")
    for which, tar in enumerate(opened):
        for group in _groups(tar, tar.path.with_suffix(".idx")):
            samples, others = tars.samples_of(group, tar)
            left.add(*(member.name for member in others))
            for sample in samples:
                if any(map(split_of_folder, sample.image.name.split("/")[:-1])):
                    return None  # several splits in one tar: only the headers tell them apart
                reader.add(which, sample.image)
                names.append(f"{tar.path.name}:{sample.image.name}")
                classes_of.append((tar, sample.answers.get("cls")))
                described = described or "json" in sample.answers
    manifest = manifest_path(shards[0].parent)
    head, targets, classes = content_of(manifest), {}, None
    if (rows := _rows(manifest, head, reader, names)) is not None:
        require_kinds(manifest, head)
        classes = imagenet.names_among(head, "classes")
        columns = read_columns(manifest, wanted := ("label", *head["targets"]))[1]
        require_columns(manifest, columns, wanted)
        labels = columns["label"].astype(np.int64)[rows]
        targets = {name: columns[name].astype(np.float64)[rows] for name in head["targets"]}
    elif described:
        return None  # fields of a .json may hold classes and targets
    else:
        labels = _classes(str(path), names, classes_of)
        classes = tars.classes_of(manifest, head, opened)
    source = labelled(str(path), names, labels, classes, reader, split)
    return replace(source, targets=targets, notes=[*notes, *left.notes()])


def _groups(tar: tars.Tar, index: Path) -> Iterator[list[tars.Member]]:
    """The members of each image, from the index; the first and last are compared with the tar."""
    try:
        head, *lines = index.read_text().splitlines()
        version, count = head.split()
        if version != "v1.2" or int(count) != len(lines):
            raise ValueError(f"it promises {count} images in {version} and has {len(lines)}")
        samples = [_members(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: not an index of DALI's version 1.2, or damaged ({error})") from error
    for member in (member for sample in samples for member in sample):
        if member.offset + member.size > tar.end:
            raise InputError(f"{tar.name}: cut short, {member.name} ends behind its end; convert it again")
    for member in (member for sample in samples[:1] + samples[-1:] for member in sample):
        _check(tar, member, index)
    return iter(samples)


def _members(line: str) -> list[tars.Member]:
    """Parse a line of an index, "extension offset size name" repeated; names may contain blanks, and
    extensions too: "b v1.0 c.jpg" has "0 c.jpg". Raises ValueError."""
    members, end = list[tars.Member](), 0
    while found := _MEMBER.match(line, end):
        members.append(tars.Member(found[4], int(found[2]), int(found[3])))
        end = found.end()
    if not members or end < len(line) or any(member.offset < tars.BLOCK for member in members):
        raise ValueError(f"a line says {line[:60]!r}")
    return members


def _check(tar: tars.Tar, member: tars.Member, index: Path) -> None:
    """Raise InputError unless the tar has this member where the index states."""
    head = tar.read(tars.BLOCK, member.offset - tars.BLOCK)
    name, known = head[:100].rstrip(b"\0"), os.fsencode(member.name)
    whole = head[345:500].rstrip(b"\0") + b"/" + name  # as bsdtar splits a name of more than 100 bytes
    if known[:100] != name and known != whole:
        raise InputError(f"{index}: isn't the index of {tar.name} ({member.name} isn't where it says)")


def _rows(
    manifest: Path, head: dict[str, Any], reader: tars.Reader, names: Sequence[str]
) -> np.ndarray | None:
    """The row of each image in a conversion's manifest, int64 [N]; None if one isn't in its tars."""
    tar_of = tars_of(manifest, head)
    if tar_of is None or "targets" not in head:
        return None
    count, each = head["count"], head["images_per_tar"]
    numbers = np.array([tar_of.get(tar.path, -1) for tar in reader.tars])
    keys = (re.search(r":0*([0-9]{1,18})\.[a-z]+$", name) for name in names)
    rows = np.fromiter((int(key[1]) if key else count for key in keys), np.int64, len(names))
    ours = (rows < count) & (rows // each == numbers[reader.which])
    return rows if ours.all() and len(np.unique(rows)) == len(rows) else None


def _classes(source: str, names: list[str], members: list[tuple[tars.Tar, tars.Member | None]]) -> np.ndarray:
    """The numbers in the .cls files, int64 [N]; all NO_LABEL if there are none."""
    texts = [
        "" if cls is None else tar.content(cls).decode("ascii", "replace").strip() for tar, cls in members
    ]
    labels, classes = numbered(texts, source, names.__getitem__, mixed=False)
    if classes is not None:
        raise InputError(f"{source}: {names[0]} has the class {texts[0]!r}, which is not a number")
    return labels
