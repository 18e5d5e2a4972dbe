"""Files that appear whole or not at all: written under another name, synced and then renamed."""

import csv
import errno
import io
import itertools
import json
import math
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

A_DAY = 24 * 60 * 60.0  # seconds
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # errno of an OSError: the disk or the quota is full
_attempts = itertools.count()


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write (and read back) that appears as `path` when the block ends, unless it raises.

    The temporary name is unique to this call. If two threads or processes write the same file at the same
    time, the one that ends last determines its content, and the file is whole.

    Raises:
        OSError: no space or no permission; an earlier file at `path` remains.
    """
    if not may_replace(path):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    _tidy(path.parent)
    aside = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{next(_attempts)}.partial")
    try:
        with naming(path):
            with open(aside, "w+b", buffering=1 << 20) as file:
                yield file
                sync(file)
            os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(aside):  # the user knows the file's own name
            error.filename, error.filename2 = str(path), None
        raise
    sync_folder(path.parent)


def may_replace(path: Path) -> bool:
    """Whether a file may be renamed to `path`. Root would replace a pipe or /dev/stdout itself."""
    devices = Path("/dev")
    return path.parent != devices and (not path.exists() or path.is_file() or path.is_dir())


def begins_with(path: Path, starts: tuple[bytes, ...]) -> bool:
    """Whether a file begins in one of these ways, is empty, or is no file."""
    if not path.is_file():
        return True
    with open(path, "rb") as file:
        start = file.read(max(map(len, starts)))
    return not start or start.startswith(starts)


def sync(file: IO[bytes]) -> None:
    """Flush what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush renames within a folder to the disk, so that they survive a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError raised in the block: a full disk doesn't say which file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def why_unwritten(path: Path, error: OSError, kept: str) -> str:
    """The message for a file that can't be written further. `kept`: progress for a second call to resume."""
    if error.errno in NO_SPACE:
        then = f"{kept}: free some space and run the command again" if kept else "nothing was written"
        return f"{path}: no space left on the disk; {then}"
    return f"{path}: cannot be written ({error.strerror or error})" + (f"; {kept}" if kept else "")


def is_aside(name: str, path: Path) -> bool:
    """Whether a name is one that a killed `written_aside(path)` leaves behind."""
    return name.startswith(f".{path.name}.") and name.endswith(".partial")


@cache
def _tidy(folder: Path) -> None:
    """Remove what killed processes left in a folder: those of this machine, and all others after a day."""
    for path in folder.glob(".*.partial"):
        machine, _, rest = path.name.removesuffix(".partial").rpartition(".")[2].partition("-")
        process = rest.partition("-")[0]
        with suppress(OSError):  # another process removed it first
            dead = machine == _machine() and process.isdigit() and not _lives(int(process))
            if dead or path.stat().st_mtime < time.time() - A_DAY:
                path.unlink()


@cache
def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def write_atomically(path: Path, *parts: Any) -> None:
    """Write bytes, one after the other, like `written_aside`."""
    with written_aside(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def written_csv(path: Path) -> Iterator[Any]:
    """A `csv.writer` whose file appears like that of `written_aside`. File names that aren't UTF-8 keep their
    bytes."""
    with written_aside(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        try:
            yield csv.writer(text)
        finally:
            text.detach()  # flushes, and leaves the file open


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write `json_text` like `written_aside`."""
    write_atomically(path, json_text(content, indent).encode())


def json_text(content: Any, indent: int | None = None) -> str:
    """Serialise as JSON; infinite floats and NaN become null, as JSON has no such numbers."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
