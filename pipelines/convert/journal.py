"""What of an unfinished conversion is safely on the disk, so that the same command can go on from there.

The journal is a line that says which conversion it belongs to, and groups of records, one for each image in
the order of conversion. A group is written only after the images it speaks of were synced, and carries a
checksum: whatever the moment of a kill or a power failure, the groups that can be read are true, and all
that lies beyond them in the outputs is cut off before the work goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipelines.errors import InputError

RECORD = np.dtype(
    [
        ("how", "u1"),  # index into store.HOW; 0 is refused
        ("turned", "u1"),
        ("mode", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("size", "<u4"),
        ("digest", "u1", (32,)),
        ("packed_size", "<u4"),
        ("packed_digest", "u1", (32,)),
    ]
)
_GROUP = struct.Struct(
    "<4sIIII"
)  # mark, records, bytes of the reasons, 1 if the conversion is complete, CRC-32
_MARK = b"grp1"


class Journal:
    """Attributes: records RECORD [n], reasons {place in the order: why it was refused}, complete.

    Raises InputError if another process has it open, or if it belongs to another conversion.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self.file = open(path, "a+b")  # noqa: SIM115, open until close()
        try:
            self._lock()
            self._read(fingerprint)
        except BaseException:
            self.file.close()
            raise
        self.count = len(self.records)
        self._chunks = [self.records]
        self._pending: list[tuple] = []
        self._pending_reasons: dict[int, str] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: Future | None = None

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another process is converting to the same file") from error
        except OSError:
            pass  # a file system without locks

    def _read(self, fingerprint: str) -> None:
        self.records = np.zeros(0, RECORD)
        self.reasons: dict[int, str] = {}
        self.complete = False
        self.file.seek(0)
        line = self.file.readline()
        if not line.endswith(b"\n"):  # new, or killed before its first line was out
            self.file.truncate(0)
            self.file.write(fingerprint.encode() + b"\n")
            self.file.flush()
            return
        if line != fingerprint.encode() + b"\n":
            raise InputError(
                f"{self.path}: an unfinished conversion from another source or with other settings; "
                "repeat its command to finish it, or add --restart to drop it"
            )
        groups = []
        good = self.file.tell()
        while len(head := self.file.read(_GROUP.size)) == _GROUP.size:
            mark, count, length, complete, checksum = _GROUP.unpack(head)
            body = self.file.read(count * RECORD.itemsize + length) if mark == _MARK else b""
            if (
                mark != _MARK
                or len(body) != count * RECORD.itemsize + length
                or zlib.crc32(head[:-4] + body) != checksum
            ):
                break
            groups.append(np.frombuffer(body, RECORD, count))
            reasons = json.loads(body[count * RECORD.itemsize :])
            self.reasons |= {int(place): reason for place, reason in reasons.items()}
            self.complete = self.complete or bool(complete)
            good = self.file.tell()
        self.file.truncate(good)
        self.records = np.concatenate([self.records, *groups])

    def append(self, record: tuple, reason: str | None = None) -> None:
        """The next image's record; durable after the next commit."""
        if reason is not None:
            self._pending_reasons[self.count] = reason
        self._pending.append(record)
        self.count += 1

    def commit(self, files: Sequence[int], wait: bool = False, complete: bool = False) -> None:
        """Sync the outputs (file descriptors, closed here), then write down what was appended.

        It happens in a thread: the conversion goes on meanwhile. Raises what an earlier commit met with.
        """
        if self._writing is not None:
            self._writing.result()
        records = np.array(self._pending, RECORD)
        reasons, self._pending, self._pending_reasons = self._pending_reasons, [], {}
        self._chunks.append(records)
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
        """Whether the last commit is on the disk."""
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

    def all_records(self) -> np.ndarray:
        """RECORD [n] of everything committed."""
        self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0]

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        with suppress(OSError):  # no space for what is left in its buffer: it isn't committed, then
            self.file.close()
