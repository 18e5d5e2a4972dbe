"""The code file (.lvcodes): packed codes, what a reader needs to know about them, and the images' names.

    0     8   magic b"LVCODES\\n"
    8     8   length of the JSON header, uint64 little-endian
    16        JSON header, padded with spaces up to byte 4,096
    4096      rows: uint8 [count, ceil(bits / 8)]
    ...       (up to 7 zero bytes, so that the next table is aligned)
              name offsets: uint64 [count + 1], little-endian, into the names
              names: utf-8, one after another

The header is {version, family, bits, count, checkpoint, created_by, names_bytes, rows_sha256, quantiser, of}.
`quantiser`, {code, sha256}, is there if one compares real-valued queries with the codes; `of`, a text that
identifies the images, in files of `lvssl curate`. Fields may be added; a reader ignores those it doesn't
know. A change of the layout raises the version. Every number is little-endian, and bit d of a row is bit
d % 8 of its byte d // 8, so a file opens on any machine.

Tables with a row for each code may lie beside the file: the means of the posteriors, FILE.means (magic
b"LVMEANS\\n", float16); an uncertainty, FILE.uncertainty (b"LVSCORE\\n", float32, dim 1); and, from `lvssl
curate`, square grey FILE.thumbnails (b"LVTHUMB\\n", uint8). Each has a header {version, dim, count,
rows_sha256} of the same form and, from byte 4,096 on, its numbers [count, dim], little-endian; rows_sha256
identifies the codes that it belongs to. `lvssl.codes.writer` writes all of these files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from pipelines.kernels.pack import packed_bytes

MAGIC = b"LVCODES\n"
VERSION = 1
ROWS_AT = 4096  # a page, so that rows are mapped aligned; the header is rewritten once the count is known


class CodeFileError(ValueError):
    """A code file can't be used; the message names the file and says what is wrong with it."""


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
    names: Sequence[str]  # one for each row
    rows_sha256: str = ""  # of the rows; empty in files of the first releases
    quantiser: dict[str, str] | None = None  # {code, sha256}; None: Hamming distance alone
    of: str = ""  # what identifies the images; empty if not recorded


class Table(NamedTuple):
    """A kind of table beside a code file."""

    ending: str
    magic: bytes
    dtype: str
    made_by: str


MEANS = Table("means", b"LVMEANS\n", "<f2", "`lvssl encode --means`")
THUMBNAILS = Table("thumbnails", b"LVTHUMB\n", "u1", "`lvssl curate`")
UNCERTAINTY = Table("uncertainty", b"LVSCORE\n", "<f4", "`lvssl encode` (without --no-fit)")


def open_codes(path: Path | str) -> CodeFile:
    """Open a code file without reading its rows. Raises CodeFileError if there is no such file, or it isn't a
    code file, is truncated (naming the offset where it ends), damaged, or of another version."""
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
    digest, quantiser = str(header.get("rows_sha256", "")), header.get("quantiser")
    fields |= {"names": Names(path, offsets, text_at), "of": str(header.get("of", ""))}
    return CodeFile(path=path, rows=rows, rows_sha256=digest, quantiser=quantiser, **fields)


def open_means(codes: CodeFile) -> np.ndarray:
    """Open the posteriors' means that were stored beside the codes, float16 [count, dim], as `open_table`."""
    return open_table(codes, MEANS)


def open_uncertainty(codes: CodeFile) -> np.ndarray:
    """Open the uncertainties that were stored beside the codes, float32 [count], as `open_table`."""
    return open_table(codes, UNCERTAINTY)[:, 0]


def stored_uncertainty(codes: CodeFile) -> np.ndarray | None:
    """As `open_uncertainty`; None if no uncertainties are stored beside the codes."""
    return open_uncertainty(codes) if found_beside(codes.path, UNCERTAINTY.ending).exists() else None


def open_table(codes: CodeFile, table: Table) -> np.ndarray:
    """Map a table that lies beside the codes, [count, dim]. Raises CodeFileError if it is missing, truncated,
    damaged, or belongs to other codes."""
    path, dtype = found_beside(codes.path, table.ending), np.dtype(table.dtype)
    if not path.exists():
        raise CodeFileError(f"{path}: no such file; {table.made_by} writes it next to the codes")
    header = read_block(path, table.magic, f"file of {table.ending}")
    dim, count = header.get("dim"), header.get("count")
    if not all(type(n) is int and n >= 0 for n in (dim, count)) or not dim:
        raise CodeFileError(f"{path}: damaged: the header has no valid dim and count")
    if count != codes.count or header.get("rows_sha256") != codes.rows_sha256:
        raise CodeFileError(
            f"{path}: these {table.ending} belong to other codes than {codes.path}; encode again"
        )
    size = ROWS_AT + dtype.itemsize * count * dim
    require_size(path, size, f"{count} {table.ending} of {dim} dimensions")
    if not count:
        return np.empty((0, dim), dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=ROWS_AT, shape=(count, dim))


def path_beside(codes: Path, ending: str) -> Path:
    """Where a file beside the codes is written."""
    return codes.with_name(f"{codes.name}.{ending}")


def found_beside(codes: Path, ending: str) -> Path:
    """The file to read beside the codes: next to what a link leads to, if there is none next to the link."""
    path = path_beside(codes, ending)
    return path_beside(codes.resolve(), ending) if codes.is_symlink() and not path.exists() else path


def require_checkpoint(codes: CodeFile, digest: str) -> None:
    """Raise CodeFileError unless `codes` were made by the checkpoint with this SHA-256 digest: distances
    between codes of two models are meaningless."""
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
    """Return the first ROWS_AT bytes of a file."""
    text = json.dumps(fields, sort_keys=True).encode()
    if len(text) > ROWS_AT - 16:
        raise ValueError(f"the header of a code file may take {ROWS_AT - 16} bytes, not {len(text)}")
    return magic + len(text).to_bytes(8, "little") + text.ljust(ROWS_AT - 16)


def read_block(path: Path, magic: bytes, kind: str) -> dict[str, Any]:
    """Read the fields of `header_block`. Raises CodeFileError."""
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
    if (quantiser := header.get("quantiser")) is not None:
        known = isinstance(quantiser, dict) and {"code", "sha256"} <= set(quantiser)
        if not known or not all(isinstance(text, str) for text in quantiser.values()):
            raise CodeFileError(f"{path}: damaged: the header has no valid quantiser")
    return header


class Names(Sequence[str]):
    """The names of a code file, each decoded on access."""

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


# File names on Linux are bytes. Those that aren't UTF-8 have lone surrogates, from os.fsdecode.
def encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def decode_name(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
