"""Positioned reads of any number of files, of which few are open at a time."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from pipelines.errors import InputError
from pipelines.staging import near


def most_open() -> int:
    """How many files a set may keep open: an eighth of what the system allows a process, 16 to 512."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else min(512, max(16, soft // 8))


class OpenFiles:
    """Files are opened when they are read, and the one that waited longest is closed for another.

    May be called from several threads at once.
    """

    def __init__(self) -> None:
        self._most = most_open()
        self._open: OrderedDict[Path, Descriptor] = OrderedDict()
        self._first_seen: dict[Path, tuple[int, int]] = {}  # size and time of change
        self._lock = threading.Lock()

    def read(self, path: Path, size: int, offset: int) -> bytes:
        """Bytes from `offset` on, fewer where the file ends.

        Raises OSError: it can't be read. InputError: it is another file than the one that was read before.
        """
        descriptor = self.held(path)  # held until the read is over: no other thread closes it
        return os.pread(descriptor.number, size, offset)

    def size(self, path: Path) -> int:
        """Bytes of the file. Raises as `read` does."""
        descriptor = self.held(path)
        return os.fstat(descriptor.number).st_size

    def held(self, path: Path) -> Descriptor:
        """The open file; it isn't closed while this is kept. Raises as `read` does."""
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                self._open.move_to_end(path)
                return found
            while len(self._open) >= self._most:
                self._open.popitem(last=False)  # closed when nobody reads from it any more
            opened = Descriptor(near(path))
            status = os.fstat(opened.number)
            seen = status.st_size, status.st_mtime_ns
            if self._first_seen.setdefault(path, seen) != seen:
                raise InputError(f"{path}: was changed while it was read; start again")
            self._open[path] = opened
            return opened


class Descriptor:
    """An open file, by the system's `number`; closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` goes before some objects do
        if self.number >= 0:
            close(self.number)
