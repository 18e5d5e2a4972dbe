"""The code file (.lvcodes): packed codes with what a reader needs to know about them, and the images' names.

    0     8   magic b"LVCODES\\n"
    8     8   length of the JSON header, uint64 little-endian
    16        JSON header, padded with spaces up to byte 4,096
    4096      rows: uint8 [count, ceil(bits / 8)]
    ...       (up to 7 zero bytes, so that the next table is aligned)
              name offsets: uint64 [count + 1], little-endian, into the names
              names: utf-8, one after another

The header: {version, family, bits, count, checkpoint, created_by, names_bytes, rows_sha256}. Later fields may
be added; a reader ignores those it doesn't know. What changes the layout raises the version. Every number is
little-endian and bit d of a row is bit d % 8 of its byte d // 8, so a file opens on any machine.

Beside it may lie the means of the posteriors, FILE.means: magic b"LVMEANS\\n", a header {version, dim, count,
rows_sha256} likewise, and at byte 4,096 float16 [count, dim], little-endian. Its rows_sha256 names the codes
it belongs to. `lvssl.codes.writer` writes both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pipelines.kernels.pack import packed_bytes

MAGIC = b"LVCODES\n"
MEANS_MAGIC = b"LVMEANS\n"
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
    rows_sha256: str = ""  # of the rows; empty in files of the first releases


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
    require_size(path, text_at + header["names_bytes"], f"{count} codes of {bits} bits")
    if count:
        rows: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r", offset=ROWS_AT, shape=(count, width))
    else:
        rows = np.empty((0, width), dtype=np.uint8)  # an empty range can't be mapped
    offsets = np.memmap(path, dtype="<u8", mode="r", offset=names_at, shape=(count + 1,))
    if offsets[0] != 0 or offsets[-1] != header["names_bytes"]:
        raise CodeFileError(f"{path}: damaged: the table of names at byte {names_at} doesn't fit the header")
    fields = {name: header[name] for name in ("family", "bits", "count", "checkpoint", "created_by")}
    digest = str(header.get("rows_sha256", ""))
    return CodeFile(path=path, rows=rows, names=Names(path, offsets, text_at), rows_sha256=digest, **fields)


def open_means(codes: CodeFile) -> np.ndarray:
    """The posteriors' means that were stored beside the codes, float16 [count, dim], mapped. Raises
    CodeFileError: none there, truncated, damaged, or those of other codes."""
    path = means_path(codes.path)
    if not path.exists():
        raise CodeFileError(f"{path}: no such file; `lvssl encode --means` writes it beside the codes")
    header = read_block(path, MEANS_MAGIC, "file of means")
    dim, count = header.get("dim"), header.get("count")
    if not all(type(n) is int and n >= 0 for n in (dim, count)) or not dim:
        raise CodeFileError(f"{path}: damaged: the header has no valid dim and count")
    if count != codes.count or header.get("rows_sha256") != codes.rows_sha256:
        raise CodeFileError(f"{path}: these are the means of other codes than {codes.path}; encode again")
    require_size(path, ROWS_AT + 2 * count * dim, f"{count} means of {dim} dimensions")
    if not count:
        return np.empty((0, dim), "<f2")
    return np.memmap(path, dtype="<f2", mode="r", offset=ROWS_AT, shape=(count, dim))


def means_path(codes: Path) -> Path:
    return codes.with_name(codes.name + ".means")


def require_checkpoint(codes: CodeFile, digest: str) -> None:
    """Raises CodeFileError unless `codes` were made by the checkpoint with this sha256 digest: distances
    between codes of two models are numbers without meaning."""
    if codes.checkpoint != digest:
        raise CodeFileError(
            f"{codes.path}: made by checkpoint {codes.checkpoint[:12]}, not by {digest[:12]}; "
            "encode the images again with this checkpoint"
        )


def require_size(path: Path, expected: int, content: str) -> None:
    size = path.stat().st_size
    if size < expected:
        raise CodeFileError(f"{path}: truncated at byte {size}; {content} end at byte {expected}")
    if size > expected:
        raise CodeFileError(f"{path}: damaged: {size - expected} bytes follow its end at byte {expected}")


def header_block(magic: bytes, fields: dict[str, Any]) -> bytes:
    """The first ROWS_AT bytes of a file."""
    text = json.dumps(fields, sort_keys=True).encode()
    if len(text) > ROWS_AT - 16:
        raise ValueError(f"the header of a code file may take {ROWS_AT - 16} bytes, not {len(text)}")
    return magic + len(text).to_bytes(8, "little") + text.ljust(ROWS_AT - 16)


def read_block(path: Path, magic: bytes, kind: str) -> dict[str, Any]:
    """The fields of `header_block`. Raises CodeFileError."""
    try:
        with open(path, "rb") as file:
            start = file.read(ROWS_AT)
    except OSError as error:
        hint = "; `lvssl encode` writes it" if isinstance(error, FileNotFoundError) else ""
        raise CodeFileError(f"{path}: {error.strerror}{hint}") from error
    if len(start) < len(magic) and magic.startswith(start) and start:
        raise CodeFileError(f"{path}: truncated at byte {len(start)}, within the header")
    if not start.startswith(magic):
        raise CodeFileError(f"{path}: not a {kind}; make one with `lvssl encode`")
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
    return header


def read_header(path: Path) -> dict[str, Any]:
    header = read_block(path, MAGIC, "code file (.lvcodes)")
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
