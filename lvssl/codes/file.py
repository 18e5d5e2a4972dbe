"""The code file (.lvcodes): packed codes with what a reader needs to know about them, and the images' names.

    0     8   magic b"LVCODES\\n"
    8     8   length of the JSON header, uint64 little-endian
    16        JSON header, padded with spaces up to byte 4,096
    4096      rows: uint8 [count, ceil(bits / 8)]
    ...       (up to 7 zero bytes, so that the next table is aligned)
              name offsets: uint64 [count + 1], little-endian, into the names
              names: utf-8, one after another

The header: {version, family, bits, count, checkpoint, created_by, names_bytes}. Later fields may be added; a
reader ignores those it doesn't know. What changes the layout raises the version.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from lvssl.codes.pack import packed_bytes

MAGIC = b"LVCODES\n"
VERSION = 1
ROWS_AT = 4096  # a page: rows are mapped aligned, and the header can be rewritten once the count is known


class CodeFileError(ValueError):
    """A code file that can't be used: the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class CodeFile:
    """An open code file; rows and names are memory-mapped and read on access."""

    path: Path
    family: str
    bits: int
    count: int
    checkpoint: str  # sha256 of the checkpoint that made the codes, hex
    created_by: str
    rows: np.ndarray  # uint8 [count, ceil(bits / 8)]
    names: Sequence[str]  # one a row


class CodeWriter:
    """Writes a code file as its rows come: `with CodeWriter(path, ...) as writer: writer.append(rows,
    names)`.

    The file appears under its name, complete, when the block ends; where the block raises, nothing is left.
    """

    def __init__(self, path: Path | str, *, family: str, bits: int, checkpoint: str, created_by: str) -> None:
        if bits < 1:
            raise ValueError(f"a code has at least one bit, not {bits}")
        self.path = Path(path)
        self.header: dict[str, Any] = {
            "version": VERSION,
            "family": family,
            "bits": bits,
            "count": 0,
            "checkpoint": checkpoint,
            "created_by": created_by,
            "names_bytes": 0,
        }
        self.name_offsets = array("Q", [0])

    def __enter__(self) -> CodeWriter:
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self.file = open(self.part, "wb")
        try:
            # Names follow the rows, whose number is known last: they wait in a file without a name.
            self.names_file = tempfile.TemporaryFile(dir=self.path.parent)
            self.file.write(self.header_block())
        except BaseException:
            self.discard()
            raise
        return self

    def append(self, rows: np.ndarray, names: Iterable[str]) -> None:
        """Adds packed rows uint8 [n, ceil(bits / 8)] and their n names. ValueError unless they fit."""
        names = list(names)
        width = packed_bytes(self.header["bits"])
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != width or len(rows) != len(names):
            shape = f"[{len(names)}, {width}]"
            raise ValueError(
                f"{len(names)} names need rows uint8 {shape}, not {rows.dtype} {list(rows.shape)}"
            )
        self.file.write(np.ascontiguousarray(rows).data)
        for name in names:
            self.name_offsets.append(self.name_offsets[-1] + self.names_file.write(encode_name(name)))
        self.header["count"] += len(rows)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                self.finish()
                os.replace(self.part, self.path)
        finally:
            self.discard()

    def finish(self) -> None:
        self.header["names_bytes"] = self.name_offsets[-1]
        self.file.write(b"\0" * (-self.file.tell() % 8))
        self.file.write(np.asarray(self.name_offsets, dtype="<u8").data)
        self.names_file.seek(0)
        shutil.copyfileobj(self.names_file, self.file)
        self.file.seek(0)
        self.file.write(self.header_block())
        self.file.flush()
        os.fsync(self.file.fileno())

    def discard(self) -> None:
        self.file.close()
        if hasattr(self, "names_file"):
            self.names_file.close()
        self.part.unlink(missing_ok=True)

    def header_block(self) -> bytes:
        text = json.dumps(self.header, sort_keys=True).encode()
        if len(text) > ROWS_AT - 16:
            raise ValueError(f"the header of a code file may take {ROWS_AT - 16} bytes, not {len(text)}")
        return MAGIC + len(text).to_bytes(8, "little") + text.ljust(ROWS_AT - 16)


def open_codes(path: Path | str) -> CodeFile:
    """Opens a code file without reading its rows. Raises CodeFileError: no such file, no code file, truncated
    (naming the offset where it ends), of another version, damaged."""
    path = Path(path)
    header = read_header(path)
    count, bits = header["count"], header["bits"]
    width = packed_bytes(bits)
    names_at = ROWS_AT + count * width
    names_at += -names_at % 8
    text_at = names_at + 8 * (count + 1)
    expected, size = text_at + header["names_bytes"], path.stat().st_size
    if size < expected:
        raise CodeFileError(
            f"{path}: truncated at byte {size}; {count} codes of {bits} bits end at byte {expected}"
        )
    if size > expected:
        raise CodeFileError(f"{path}: damaged: {size - expected} bytes follow its end at byte {expected}")
    if count:
        rows: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r", offset=ROWS_AT, shape=(count, width))
    else:
        rows = np.empty((0, width), dtype=np.uint8)  # an empty range can't be mapped
    offsets = np.memmap(path, dtype="<u8", mode="r", offset=names_at, shape=(count + 1,))
    if offsets[0] != 0 or offsets[-1] != header["names_bytes"]:
        raise CodeFileError(f"{path}: damaged: the table of names at byte {names_at} doesn't fit the header")
    fields = {name: header[name] for name in ("family", "bits", "count", "checkpoint", "created_by")}
    return CodeFile(path=path, rows=rows, names=Names(path, offsets, text_at), **fields)


def require_checkpoint(codes: CodeFile, digest: str) -> None:
    """Raises CodeFileError unless `codes` were made by the checkpoint with this sha256 digest: distances
    between codes of two models are numbers without meaning."""
    if codes.checkpoint != digest:
        raise CodeFileError(
            f"{codes.path}: made by checkpoint {codes.checkpoint[:12]}, not by {digest[:12]}; "
            "encode the images again with this checkpoint"
        )


def read_header(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(ROWS_AT)
    except OSError as error:
        raise CodeFileError(f"{path}: {error.strerror}") from error
    if len(start) < len(MAGIC) and MAGIC.startswith(start) and start:
        raise CodeFileError(f"{path}: truncated at byte {len(start)}, within the header")
    if not start.startswith(MAGIC):
        raise CodeFileError(f"{path}: not a code file (.lvcodes); make one with `lvssl encode`")
    length = int.from_bytes(start[8:16], "little")
    if len(start) < ROWS_AT:
        raise CodeFileError(f"{path}: truncated at byte {len(start)}, within the header")
    try:
        if length > ROWS_AT - 16:
            raise ValueError
        header = json.loads(start[16 : 16 + length])
        version = header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CodeFileError(f"{path}: damaged: the header at byte 16 can't be read") from error
    if version != VERSION:
        raise CodeFileError(
            f"{path}: format version {version}, this release reads {VERSION}; encode the images again"
        )
    numbers = [header.get(name) for name in ("bits", "count", "names_bytes")]
    texts = [header.get(name) for name in ("family", "checkpoint", "created_by")]
    if not all(type(n) is int and n >= 0 for n in numbers) or numbers[0] == 0:
        raise CodeFileError(f"{path}: damaged: the header has no valid bits, count and names_bytes")
    if not all(isinstance(text, str) for text in texts):
        raise CodeFileError(f"{path}: damaged: the header has no valid family, checkpoint and created_by")
    return header


class Names(Sequence[str]):
    """The names of a code file, each decoded when asked for."""

    def __init__(self, path: Path, offsets: np.ndarray, text_at: int) -> None:
        self.offsets = offsets
        empty = offsets[-1] == 0
        self.text: np.ndarray = (
            np.empty(0, np.uint8) if empty else np.memmap(path, dtype=np.uint8, mode="r", offset=text_at)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        i = index % len(self)
        return decode_name(self.text[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes())


# File names on Linux are bytes; those that are no utf-8 come from os.fsdecode as lone surrogates, and go
# back.
def encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def decode_name(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
