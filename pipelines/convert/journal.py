"""The record of how much of an unfinished conversion is safely on disk, so that the same command can resume.

The journal is a line that identifies the conversion, followed by groups of records, one for each image in the
order of conversion. A group is written only after its images were synced, and carries a checksum. So whenever
a kill or a power failure comes, the groups that can be read are true, and whatever lies beyond them in the
outputs is cut off before the work resumes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.errors import InputError
from pipelines.lock import lock

RECORD = np.dtype(
    [
        ("storage_kind", "u1"),  # index into store.STORAGE_KINDS; 0: refused
        ("exif_rotated", "u1"),
        ("several_frames", "u1"),
        ("mode", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("size", "<u4"),
        ("digest", "u1", (32,)),
        ("file_size", "<u4"),
        ("file_digest", "u1", (32,)),
    ]
)
# Mark, number of records, bytes of the reasons, 1 if the conversion is complete, CRC-32.
_GROUP = struct.Struct("<4sIIII")
_MARK = b"grp2"


class Journal:
    """Attributes: count (images recorded), reasons {place in the order: why it was refused}, complete.

    The records stay on disk; `records` reads them.

    Raises InputError if another process has it open, or if it belongs to another conversion.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self.file = open_alone(path)
        new = os.fstat(self.file.fileno()).st_size == 0
        try:
            self._read(fingerprint)
        except BaseException:
            if new:  # full disk: not even the first line was written
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.file.close()
            raise
        self.count = self.committed
        self._last = np.zeros(0, RECORD)  # of the last commit, which may still be in progress
        self._pending: list[tuple] = []
        self._pending_reasons: dict[int, str] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: Future | None = None

    def _read(self, fingerprint: str) -> None:
        self.committed = 0
        self.reasons: dict[int, str] = {}
        self.complete = False
        self.file.seek(0)
        line = self.file.readline()
        if not line.endswith(b"\n"):  # new, or killed while its first line was written
            self.file.truncate(0)
            self.file.write(fingerprint.encode() + b"\n")
            self.file.flush()
            return
        if line != fingerprint.encode() + b"\n":
            raise InputError(
                f"{self.path}: an unfinished conversion from another source or with other settings; "
                "repeat its command to finish it, or add --restart to discard it"
            )
        good = self.file.tell()
        for records, reasons, complete in _groups(self.file):
            self.committed += len(records)
            self.reasons |= {int(place): reason for place, reason in reasons.items()}
            self.complete = self.complete or complete
            good = self.file.tell()
        self.file.truncate(good)

    def append(self, record: tuple, reason: str | None = None) -> None:
        """Add the next image's record; it is durable after the next commit."""
        if reason is not None:
            self._pending_reasons[self.count] = reason
        self._pending.append(record)
        self.count += 1

    def commit(self, files: Sequence[int], wait: bool = False, complete: bool = False) -> None:
        """Sync the outputs (file descriptors, closed here), then write the appended records.

        This runs in a thread while the conversion continues. Raises the error of an earlier commit, if any.
        """
        try:
            if self._writing is not None:
                self._writing.result()
        except BaseException:
            for file in files:
                os.close(file)
            raise
        records = np.array(self._pending, RECORD)
        reasons, self._pending, self._pending_reasons = self._pending_reasons, [], {}
        self._last, self.committed = records, self.committed + len(records)
        self.reasons |= reasons
        body = records.tobytes() + json.dumps(reasons).encode()
        length = len(body) - records.nbytes
        head = _GROUP.pack(_MARK, len(records), length, complete, 0)[:-4]
        group = head + zlib.crc32(head + body).to_bytes(4, "little") + body
        self._writing = self._worker.submit(self._write, list(files), group)
        if wait:
            self._writing.result()
            self.complete = complete

    def idle(self) -> bool:
        """Whether the last commit is on disk."""
        return self._writing is None or self._writing.done()

    def _write(self, files: list[int], group: bytes) -> None:
        try:
            for file in files:
                os.fdatasync(file)
        finally:
            for file in files:
                os.close(file)
        self.file.write(group)
        self.file.flush()
        os.fdatasync(self.file.fileno())

    def records(self, size: int) -> Iterator[np.ndarray]:
        """All committed records, in order, as arrays RECORD [size]; the last one may be shorter."""
        waiting, count, on_disk = [], 0, self.committed - len(self._last)
        with open(self.path, "rb") as file:
            file.readline()
            for records in chain((group[0] for group in _groups(file, on_disk)), [self._last]):
                waiting.append(records)
                count += len(records)
                while count >= size:
                    together = np.concatenate(waiting)
                    yield together[:size]
                    waiting, count = [together[size:]], count - size
        if count:
            yield np.concatenate(waiting)

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        with suppress(OSError):  # no space for its buffer, which isn't committed then
            self.file.close()


def open_alone(path: Path) -> IO[bytes]:
    """Open and lock the journal: until it is closed, no other process starts or resumes its conversion.

    Raises InputError if another process has it open.
    """
    while True:
        file = open(path, "a+b")  # noqa: SIM115
        try:
            lock(file, path)
        except BlockingIOError as error:
            file.close()
            raise InputError(f"{path}: another process is converting to the same file") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # its conversion ended, and removed it, between the two calls


def _groups(file: IO[bytes], most: int | None = None) -> Iterator[tuple[np.ndarray, dict[str, str], bool]]:
    """(records, reasons, whether it completes the conversion) of each valid group, up to `most` records."""
    count = 0
    while most is None or count < most:
        head = file.read(_GROUP.size)
        if len(head) < _GROUP.size:
            return
        mark, number, length, complete, checksum = _GROUP.unpack(head)
        size = number * RECORD.itemsize
        body = file.read(size + length) if mark == _MARK else b""
        if mark != _MARK or len(body) < size + length or zlib.crc32(head[:-4] + body) != checksum:
            return
        yield np.frombuffer(body, RECORD, number), json.loads(body[size:]), bool(complete)
        count += number
