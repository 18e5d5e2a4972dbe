"""Copy a set's files to a node's own disk, once per node before training starts, and read the copies.

    python -m pipelines.staging '$TMPDIR' 'train-*.beton' -- lvssl pretrain --data 'train-*.beton' ...

The first process of a node copies while the others wait. Finished copies survive a kill. Settings and results
still name the shared files: a copy stands for the file with the same path, size and date. If the folder
doesn't exist or has no space, a message says so and the shared files are read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pipelines.amounts import size_text
from pipelines.lock import lock

STAGED = "LVSSL_STAGED"  # the environment variable with the folder of this node's copies
BLOCK = 1 << 26  # bytes copied at a time, and the most that a kill loses
WAIT = 0.2  # seconds between two attempts to lock


def near(path: Path) -> Path:
    """The copy of a file on this node, or the file itself if there is none."""
    if folder := os.environ.get(STAGED):
        try:
            copy = _place(Path(folder), path)
            return copy if copy.stat().st_size == path.stat().st_size else path
        except OSError:
            pass
    return path


def stage(to: str, files: Iterable[Path]) -> None:
    """Copy files to a folder of this node, where `near` then finds them.

    `to` may contain environment variables. Nothing is raised: files that can't be copied are read from their
    original place, and the first process of a node says so.
    """
    files, folder = list(dict.fromkeys(files)), Path(os.path.expandvars(to))  # two sets may share files
    try:
        if not folder.is_absolute() or not folder.is_dir():
            raise OSError(errno.ENOENT, "no such folder there")
        folder = folder / f"lvssl-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        with open(folder / "lock", "ab") as held:
            _wait_for(held, folder)
            started, copied = time.monotonic(), _copy_all(files, folder)
    except OSError as error:
        why = f"{to} on {socket.gethostname()}: {error.strerror or error}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            read = f"the shared files are read: {', '.join(map(str, files[:3]))}"
            print(f"warning: not staged to {why}; {read}", file=sys.stderr, flush=True)
        return
    os.environ[STAGED] = str(folder)
    if copied:  # by this process
        what = f"{copied / 1e9:,.2f} GB in {time.monotonic() - started:,.0f} s"
        print(f"staged {what} to {folder} on {socket.gethostname()}", flush=True)


def _place(folder: Path, path: Path) -> Path:
    """The path for a file's copy, which changes if the file changes."""
    status = path.stat()
    key = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    return folder / f"{path.stem}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}{path.suffix}"


def _wait_for(held: IO, folder: Path) -> None:
    while True:
        try:
            return lock(held, folder)
        except BlockingIOError:
            time.sleep(WAIT)


def _copy_all(files: list[Path], folder: Path) -> int:
    """Copy missing files, and return the bytes copied. Raises OSError, also if there isn't space for all."""
    missing = [(path, copy) for path in files if not (copy := _place(folder, path)).exists()]
    halves = [half for _, copy in missing if (half := _half(copy)).exists()]
    needed = sum(path.stat().st_size for path, _ in missing) - sum(half.stat().st_size for half in halves)
    if needed > (free := shutil.disk_usage(folder).free):
        why = f"{size_text(needed)} are needed and {size_text(free)} are free"
        raise OSError(errno.ENOSPC, why)
    for path, copy in missing:
        try:
            _copy(path, copy)
        except OSError:
            _half(copy).unlink(missing_ok=True)
            raise
    return sum(path.stat().st_size for path, _ in missing)


def _half(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.half")


def _copy(path: Path, copy: Path) -> None:
    """Resume the copy of a file, compare it with the digests of what was read, and rename it.

    Raises OSError if it can't be read or written, has changed meanwhile, or the copy differs.
    """
    half, notes = _half(copy), copy.with_name(f"{copy.name}.digests")
    before = path.stat()
    with open(path, "rb") as theirs, open(half, "ab+") as ours, open(notes, "ab+") as noted:
        noted.seek(0)
        known = list(_pieces(noted, 32))
        known = [digest for digest in known if len(digest) == 32][: half.stat().st_size // BLOCK]
        for file, size in ((ours, len(known) * BLOCK), (noted, len(known) * 32)):
            file.truncate(size)
        theirs.seek(len(known) * BLOCK)
        for block in _pieces(theirs, BLOCK):
            ours.write(block)
            ours.flush()
            known.append(hashlib.sha256(block).digest())
            noted.write(known[-1])
            noted.flush()
        os.fsync(ours.fileno())
        ours.seek(0)
        same = [hashlib.sha256(block).digest() for block in _pieces(ours, BLOCK)] == known
        after = path.stat()
    notes.unlink()
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if changed or not same or half.stat().st_size != before.st_size:
        what = "was changed meanwhile" if changed else "differs from its copy"
        raise OSError(errno.EIO, f"{path} {what}")
    half.replace(copy)


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the rest of a file, `size` bytes at a time; the last piece may be shorter."""
    return iter(lambda: file.read(size), b"")


def main(arguments: list[str]) -> None:
    from pipelines.datasets.parts import files_of

    if "--" not in arguments[2:-1]:
        sys.exit("usage: python -m pipelines.staging FOLDER FILES... -- COMMAND...")
    end = arguments.index("--")
    to, *sets = arguments[:end]
    stage(to, (file for each in sets for file in files_of(each)))
    os.execvp(arguments[end + 1], arguments[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
