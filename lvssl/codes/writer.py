"""Write code files row by row. Their layout is described in `lvssl.codes.file`.

While `codes.lvcodes` is being written, its parts are hidden files beside it, which a killed encoder leaves
behind and the next one resumes: `.codes.lvcodes.part` (header and rows), `.codes.lvcodes.names.part` (for
each row the source's position after it, the length of its name, and its name), and a part for each table,
such as `.codes.lvcodes.means.part`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lvssl.codes.file import (
    MAGIC,
    MEANS,
    ROWS_AT,
    THUMBNAILS,
    UNCERTAINTY,
    VERSION,
    CodeFileError,
    Table,
    encode_name,
    header_block,
    path_beside,
)
from pipelines.files import sync, sync_folder, why_unwritten
from pipelines.kernels.pack import packed_bytes
from pipelines.lock import lock

RECORD = struct.Struct("<QI")  # before each name in the names' part
BLOCK = 1 << 20


class CodeWriter:
    """`with CodeWriter(path, ...) as writer: writer.append(rows, names)`.

    The file appears under its name, complete, when the block ends. `source` identifies what is encoded: with
    it, rows that were written before the same work was killed or interrupted are kept, and `position` says
    where in the source to resume. Without it, or if the block raises an error before the first row, nothing
    is left. `beside`: tables to write beside the file, and their numbers per image: MEANS of the posteriors,
    as fp16, UNCERTAINTY, 1, and THUMBNAILS. `quantiser`: {code, sha256} of what made the codes. Raises
    CodeFileError if another process is writing the same file, or the disk is full.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        family: str,
        bits: int,
        checkpoint: str,
        created_by: str,
        beside: dict[Table, int] | None = None,
        quantiser: dict[str, str] | None = None,
        source: str | None = None,
    ) -> None:
        if bits < 1:
            raise ValueError(f"a code has at least one bit, not {bits}")
        self.path, self.source, self.count, self.position = Path(path), source, 0, 0
        dims = {table: (beside or {}).get(table, 0) for table in (MEANS, UNCERTAINTY, THUMBNAILS)}
        self.tables = {table: dim for table, dim in dims.items() if dim}  # in the order of their files
        self.header: dict[str, Any] = {
            "version": VERSION,
            "family": family,
            "bits": bits,
            "checkpoint": checkpoint,
            "created_by": created_by,
        }
        if quantiser is not None:
            self.header["quantiser"] = quantiser
        self.width = packed_bytes(bits)
        kinds = ("", ".names", *(f".{table.ending}" for table in self.tables))
        self.parts = [self.path.with_name(f".{self.path.name}{kind}.part") for kind in kinds]

    def __enter__(self) -> CodeWriter:
        beside = {table.ending: dim for table, dim in self.tables.items()}
        begun = header_block(MAGIC, self.header | {"source": self.source, "beside": beside})
        self.files: list[BinaryIO] = []
        try:
            for part in self.parts:
                self.files.append(open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
            try:
                lock(self.files[0], self.path)
                if not is_at(self.files[0], self.parts[0]):  # it finished after we had opened its part
                    raise BlockingIOError
            except BlockingIOError as error:
                raise CodeFileError(
                    f"{self.path}: another process is writing it; choose another --out"
                ) from error
            if self.source is None or self.files[0].read(ROWS_AT) != begun:
                for file in self.files:
                    file.truncate(0)
                self.files[0].seek(0)
                self.files[0].write(begun)
                for file in self.files[2:]:
                    file.write(bytes(ROWS_AT))  # its header is written last
            self.go_on()
        except BaseException as failure:
            self.close(keep=isinstance(failure, CodeFileError))
            if isinstance(failure, OSError):
                raise self.unwritten(failure) from failure
            raise
        return self

    def unwritten(self, error: OSError) -> CodeFileError:
        """Return an error that says why the disk refused."""
        kept = f"{self.count:,} codes are kept" if self.source is not None and self.count else ""
        return CodeFileError(why_unwritten(self.path, error, kept))

    def go_on(self) -> None:
        """Keep the rows whose codes, names and table entries are complete, and seek to their end."""
        widths = [np.dtype(table.dtype).itemsize * dim for table, dim in self.tables.items()]
        sized = [(self.files[0], self.width), *zip(self.files[2:], widths)]
        rows = min(max(0, file.seek(0, os.SEEK_END) - ROWS_AT) // width for file, width in sized)
        end = 0
        for position, name in records(self.files[1]):
            if self.count == rows:
                break
            self.count, self.position = self.count + 1, position
            end += RECORD.size + len(name)
        ends = [ROWS_AT + self.count * self.width, end, *(ROWS_AT + self.count * width for width in widths)]
        for file, last in zip(self.files, ends):
            file.truncate(last)
            file.seek(last)

    def append(
        self,
        rows: np.ndarray,
        names: Iterable[str],
        means: np.ndarray | None = None,
        positions: Iterable[int] | None = None,
        uncertainty: np.ndarray | None = None,
        thumbnails: np.ndarray | None = None,
    ) -> None:
        """Append packed rows uint8 [n, ceil(bits / 8)], their n names and, for the tables that there are,
        means [n, D], uncertainty [n] and thumbnails [n, P].

        `positions`: those of the n rows in the source, ascending; by default they follow on from the last.
        Raises ValueError unless shapes and types fit.
        """
        names = list(names)
        n = len(names)
        check("names need rows uint8", n, rows, (n, self.width), np.uint8)
        scores = None if uncertainty is None else np.reshape(uncertainty, (-1, 1))
        given = {MEANS: means, UNCERTAINTY: scores, THUMBNAILS: thumbnails}
        for (table, dim), file in zip(self.tables.items(), self.files[2:]):
            values = np.asarray(given[table], dtype=table.dtype)
            check(f"names need {table.ending}", n, values, (n, dim), np.dtype(table.dtype))
            file.write(np.ascontiguousarray(values).data)
        self.files[0].write(np.ascontiguousarray(rows).data)
        following = range(self.position, self.position + n) if positions is None else positions
        for name, position in zip(names, following, strict=True):
            text = encode_name(name)
            self.position = int(position) + 1
            self.files[1].write(RECORD.pack(self.position, len(text)) + text)
        for file in self.files:
            file.flush()  # from here on, a kill of the process loses none of it
        self.count += n

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        done = False
        try:
            if failure is None:
                self.finish()
                done = True
        except OSError as error:
            failure = error
        finally:
            # What is done has no parts; those that are there by now are another process's.
            self.close(keep=done or (self.source is not None and self.count > 0))
        if isinstance(failure, OSError):  # the block's, too: readers of images raise errors of their own
            raise self.unwritten(failure) from failure

    def finish(self) -> None:
        """Write the names behind the rows, and the headers; sync all files and rename them."""
        digest = self.digest_of_rows()
        codes, names = self.files[:2]
        codes.seek(0, os.SEEK_END)
        codes.write(b"\0" * (-codes.tell() % 8))
        end = 0
        codes.write(struct.pack("<Q", 0))
        for _, name in records(names):
            end += len(name)
            codes.write(struct.pack("<Q", end))
        for _, name in records(names):
            codes.write(name)
        self.header |= {"count": self.count, "names_bytes": end, "rows_sha256": digest}
        codes.seek(0)
        codes.write(header_block(MAGIC, self.header))
        for (table, dim), file in zip(self.tables.items(), self.files[2:]):
            fields = {"version": VERSION, "dim": dim, "count": self.count, "rows_sha256": digest}
            file.seek(0)
            file.write(header_block(table.magic, fields))
        finals = [self.path, None, *(path_beside(self.path, table.ending) for table in self.tables)]
        for part, file, final in reversed(list(zip(self.parts, self.files, finals))):  # the codes last
            sync(file)
            if final is None:
                part.unlink()
            else:
                os.replace(part, final)
        sync_folder(self.path.parent)

    def digest_of_rows(self) -> str:
        digest, left = hashlib.sha256(), self.count * self.width
        self.files[0].seek(ROWS_AT)
        while left:
            block = self.files[0].read(min(BLOCK, left))
            digest.update(block)
            left -= len(block)
        return digest.hexdigest()

    def close(self, keep: bool) -> None:
        for part, _ in zip(self.parts, self.files):
            if not keep:
                part.unlink(missing_ok=True)
        for file in self.files:
            with suppress(OSError):  # on a full disk; what its buffer holds isn't counted
                file.close()


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one at that path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def records(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (position in the source after it, name) for every complete record."""
    file.seek(0)
    while len(head := file.read(RECORD.size)) == RECORD.size:
        position, length = RECORD.unpack(head)
        if len(name := file.read(length)) < length:
            return
        yield position, name


def check(what: str, n: int, array: np.ndarray, shape: tuple[int, int], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{n} {what} {list(shape)}, not {array.dtype} {list(array.shape)}")
