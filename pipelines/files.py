"""Files that appear whole or not at all: written beside, synced, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file to write (and read back) that appears as `path` when the block ends, unless it raises.

    The name beside is the same at every attempt, so that what a kill has left is overwritten by the next.

    Raises:
        OSError: no room, no permission; what stood at `path` is still there.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "w+b", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk doesn't say which
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename too must survive a power cut
    finally:
        os.close(folder)


def write_atomically(path: Path, *parts: Any) -> None:
    """Write bytes, one after the other, as `written_aside` does."""
    with written_aside(path) as file:
        for part in parts:
            file.write(part)
