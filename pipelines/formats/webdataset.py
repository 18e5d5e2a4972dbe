"""WebDataset shards with the indices that DALI reads, in the formats of WebDataset and wds2idx.

A shard is a plain tar (ustar) of pairs, key first, images in order:

    00000000.jpg  00000000.cls     the image file, and its class as a decimal number, if it has one
    00000001.png  00000001.cls     pixels that a beton holds raw are PNG here
    ...           00000001.json    {"target": value, ...}, only where there are regression targets

Next to train-000000.tar is train-000000.idx: a line "v1.2 COUNT", then for each image a line with
"extension offset size name" for each of its members; the offset is that of the member's content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.formats.beton import NO_LABEL

BLOCK = 512  # bytes; everything in a tar is padded to this
IMAGES_PER_TAR = 5_000  # some 550 MB of ImageNet
END = bytes(2 * BLOCK)


def member_header(name: str, size: int) -> bytes:
    """A ustar header that doesn't depend on machine, user or time."""
    before = (
        name.encode("ascii").ljust(100, b"\0")
        + b"0000444\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"0" * 11
        + b"\0"
    )
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(155 + 12)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def tar_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}.tar"


def tars_of(manifest: Path, head: dict[str, Any]) -> dict[Path, int] | None:
    """The tars that were written with this manifest, whose content is `head`, by number; None if the manifest
    isn't of tars."""
    try:
        count, each, prefix = head["count"], head["images_per_tar"], head["prefix"]
        return {manifest.with_name(tar_name(prefix, n)): n for n in range(-(-count // each))}
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


class TarLayout:
    """The position of each image and all bytes around it, which follow from sizes and labels alone."""

    def __init__(self, prefix: str, images_per_tar: int):
        self.prefix = prefix
        self.images_per_tar = images_per_tar
        self.count = 0  # images in total
        self.number = 0  # of the tar that is being filled
        self.position = 0  # in that tar
        self.index: list[str] = []  # of that tar, a line per image

    def full(self) -> bool:
        return len(self.index) == self.images_per_tar

    def next_tar(self) -> None:
        self.number, self.position, self.index = self.number + 1, 0, []

    def reserve(self, mode: int, size: int, label: int, targets: dict[str, float]) -> tuple[bytes, bytes]:
        """Enter one image at `position`, and return the bytes before and after it."""
        key = f"{self.count:08d}"
        extension = ("jpg", "png")[mode]
        members: list[tuple[str, int | bytes]] = [(extension, size)]
        if label != NO_LABEL:
            members.append(("cls", str(label).encode()))
        if targets:
            members.append(("json", json.dumps(targets).encode()))
        parts, line, at = [], [], self.position
        for extension, content in members:
            length = content if isinstance(content, int) else len(content)
            parts.append(member_header(f"{key}.{extension}", length))
            line.append(f"{extension} {at + BLOCK} {length} {key}.{extension}")
            at += BLOCK + length + len(padding(length))
            parts.append(padding(length) if isinstance(content, int) else content + padding(length))
        self.count += 1
        self.position = at
        self.index.append(" ".join(line))
        return parts[0], b"".join(parts[1:])

    def tar_name(self) -> str:
        return tar_name(self.prefix, self.number)

    def index_text(self) -> str:
        return "\n".join([f"v1.2 {len(self.index)}", *self.index, ""])
