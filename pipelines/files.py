"""Files that appear whole or not at all: written beside, synced, renamed."""

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
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: the disk is full, or the share of it
_attempts = itertools.count()


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file to write (and read back) that appears as `path` when the block ends, unless it raises.

    The name beside belongs to this call alone: of two, in threads or processes, that write the same file
    at the same time, the one that ends last has its content there, whole.

    Raises:
        OSError: no room, no permission; what stood at `path` is still there.
    """
    _tidy(path.parent)
    aside = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{next(_attempts)}.partial")
    try:
        with naming(path):
            with open(aside, "w+b", buffering=1 << 20) as file:
                yield file
                sync(file)
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(file: IO[bytes]) -> None:
    """What was written, onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Renames within it, onto the disk: they too must survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block names the file: a full disk doesn't say which."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def why_unwritten(path: Path, error: OSError, kept: str) -> str:
    """What to tell the user of a file that can't be written on. `kept`: what a second call goes on from."""
    if error.errno in NO_SPACE:
        then = f"{kept}: free some, and repeat the command" if kept else "nothing was written"
        return f"{path}: no space left on the disk; {then}"
    return f"{path}: cannot be written ({error.strerror or error})" + (f"; {kept}" if kept else "")


def is_aside(name: str, path: Path) -> bool:
    """Whether a file's name is one that `written_aside(path)` leaves behind when it is killed."""
    return name.startswith(f".{path.name}.") and name.endswith(".partial")


@cache
def _tidy(folder: Path) -> None:
    """Remove what killed processes have left in a folder: this machine's, and anybody's after a day."""
    for path in folder.glob(".*.partial"):
        machine, _, rest = path.name.removesuffix(".partial").rpartition(".")[2].partition("-")
        process = rest.partition("-")[0]
        with suppress(OSError):  # another process was faster
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
    except OSError:  # somebody else's
        return True
    return True


def write_atomically(path: Path, *parts: Any) -> None:
    """Write bytes, one after the other, as `written_aside` does."""
    with written_aside(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def written_csv(path: Path) -> Iterator[Any]:
    """A `csv.writer` whose file appears as `written_aside` does. Names of files that are no UTF-8 keep their
    bytes."""
    with written_aside(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        try:
            yield csv.writer(text)
        finally:
            text.detach()  # with what it still held written, and the file left open


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write `json_text` as `written_aside` does."""
    write_atomically(path, json_text(content, indent).encode())


def json_text(content: Any, indent: int | None = None) -> str:
    """As JSON; a float that is infinite or not a number becomes null, for JSON has no such numbers."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
