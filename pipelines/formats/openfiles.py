"""Positioned reads from any number of files, of which only a few are open at a time."""

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
    """How many files a set may keep open: an eighth of the limit for a process, 16 to 512."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else min(512, max(16, soft // 8))


class OpenFiles:
    """Opens files when they are read; the least recently used one is closed to make room for another.

    May be used from several threads at once.
    """

    def __init__(self) -> None:
        self._most = most_open()
        self._open: OrderedDict[Path, Descriptor] = OrderedDict()
        self._first_seen: dict[Path, tuple[int, int]] = {}  # size and modification time
        self._lock = threading.Lock()

    def read(self, path: Path, size: int, offset: int) -> bytes:
        """Read bytes from `offset` on; fewer if the file ends.

        Raises OSError if it can't be read, and InputError if the file has changed since it was first opened.
        """
        descriptor = self.held(path)  # held until the read is over, so that no other thread closes it
        return os.pread(descriptor.number, size, offset)

    def size(self, path: Path) -> int:
        """Size of the file in bytes. Raises like `read`."""
        descriptor = self.held(path)
        return os.fstat(descriptor.number).st_size

    def held(self, path: Path) -> Descriptor:
        """The open file, which stays open while this is kept. Raises like `read`."""
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
    """An open file, by the system's `number`; it is closed with the last reference."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone before
        if self.number >= 0:
            close(self.number)
