"""A store of what a network computes from a set of images, computed once and kept in memory-mapped files.

    FOLDER/KEY/features.npy ...   a row for each image, plain .npy files: np.load(path, mmap_mode="r")
               rows.npy           positions of these images in the set: all, unless damaged ones are left out
               store.json         the key and the arrays; written last, so a store that has it is complete
               parts/             during the computation: which parts are done, and locks of those under way

The key holds everything that the numbers depend on: another checkpoint, set, view or arithmetic gets another
folder. Any number of processes, be they ranks or commands, can fill a store together: each takes a part that
no other has, under a lock that the system releases if the process is killed. Parts of two machines may share
a page of the file, and an NFS client sends the whole page with what it takes for the other's bytes, unless
the file is opened with O_DSYNC. Parts that were done before a kill are kept.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.amounts import size_text
from pipelines.errors import InputError
from pipelines.files import sync, write_atomically, write_json, written_aside
from pipelines.lock import lock

PART = 8192  # images computed, or lost to a kill, together: whole batches
HEAD = 4096  # bytes before the numbers of an array
WAIT = 1.0  # seconds between two checks of what other processes compute

Arrays = dict[str, np.ndarray]  # by name, with a row for each image
# Positions int64 [n], ascending -> batches: positions of the images that can be read, and their arrays.
Compute = Callable[[np.ndarray], Iterator[tuple[np.ndarray, Arrays]]]


@dataclass(frozen=True)
class Store:
    """The arrays of `count` images, computed or to be computed."""

    folder: Path
    key: dict[str, Any]
    count: int

    @classmethod
    def beside(cls, folder: Path, key: dict[str, Any], count: int) -> Store:
        """Return the store FOLDER/KEY. If it is neither writable nor complete, use a temporary folder and say
        so on stderr."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder / name).close()
        except OSError as error:
            if (folder / name / "store.json").is_file():
                return cls(folder / name, key, count)
            own = Path(tempfile.mkdtemp(prefix="lvssl-features-"))
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            said = f"can't be written ({error.strerror}): features are kept in {own} until this command ends"
            print(f"note: {folder} {said}", file=sys.stderr, flush=True)
            return cls(own, key, count)
        return cls(folder / name, key, count)

    @property
    def whole(self) -> bool:
        return (self.folder / "store.json").is_file()

    def open(self) -> Arrays:
        """Return all arrays, mapped. InputError if the store is damaged."""
        path = self.folder / "store.json"
        try:
            head = json.loads(path.read_text())
            found = {name: mapped(self.folder / f"{name}.npy") for name in head["arrays"]}
            wrong = [name for name, shape in head["arrays"].items() if list(found[name].shape) != shape]
            if head["key"] != json.loads(json.dumps(self.key)) or wrong:
                raise ValueError(f"its header says otherwise of {', '.join(wrong) or 'its key'}")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise InputError(f"{self.folder}: damaged ({error}); remove this folder") from error

    def fill(self, compute: Compute, to_the_end: bool = True) -> None:
        """Compute every missing part that no other process is computing.

        `to_the_end`: wait for the other processes' parts, and take them over if they die, so that the store
        is complete afterwards. InputError if the disk has no space for it, or if not one image can be read.
        """
        waited = False
        while not self.whole:
            busy = [part for part in range(-(-self.count // PART)) if not self._take(part, compute)]
            if not busy:
                with self._lock("finish") as mine:
                    if mine and not self.whole:
                        self._finish()
            elif not to_the_end:
                return
            if not self.whole:
                if not waited:
                    said = "another process is computing features there; waiting for it"
                    print(f"note: {self.folder}: {said}", file=sys.stderr, flush=True)
                waited = True
                time.sleep(WAIT)

    def _take(self, part: int, compute: Compute) -> bool:
        """Return whether a part is done; compute it unless another process does."""
        done = self.folder / "parts" / f"{part}.npy"
        if done.exists() or self.whole:
            return True
        with self._lock(str(part)) as mine:
            if not mine:
                return done.exists() or self.whole
            if done.exists() or self.whole:
                return True
            rows = np.arange(part * PART, min((part + 1) * PART, self.count))
            batches = list(compute(rows))
            found = np.concatenate([np.zeros(0, np.int64), *(at for at, _ in batches)])
            for name in batches[0][1] if batches else ():
                values = np.concatenate([arrays[name] for _, arrays in batches])
                placed = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                placed[found - rows[0]] = values
                self._write(name, int(rows[0]), placed)
            write_atomically(done, npy(found))
            return True

    @contextmanager
    def _lock(self, name: str) -> Iterator[bool]:
        """Hold the lock of that name during the context; yield whether this process got it."""
        path = self.folder / "parts" / f"{name}.lock"
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            try:
                lock(file, path)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write rows from number `first` on to an array's file, which is created in its full size."""
        path = self.folder / f"{name}.npy"
        size = HEAD + self.count * values[0].nbytes
        if not path.exists() and (free := shutil.disk_usage(self.folder).free) < size:
            raise InputError(
                f"{path}: not enough space: {size_text(size)} are needed, {size_text(free)} are free; "
                f"free some, or link {self.folder.parent} to another disk"
            )
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DSYNC, 0o666)
        with open(number, "wb") as file:  # which doesn't truncate an open file
            file.write(npy_head(values.dtype, (self.count, *values.shape[1:])))
            file.seek(HEAD + first * values[0].nbytes)
            file.write(np.ascontiguousarray(values).data)
            if file.seek(0, os.SEEK_END) < size:
                file.truncate(size)
            sync(file)

    def _finish(self) -> None:
        """Remove the rows of images that were left out, and write the header."""
        parts = range(-(-self.count // PART))
        rows = np.concatenate([np.load(self.folder / "parts" / f"{part}.npy") for part in parts])
        if not len(rows):
            raise InputError("not one of the images can be decoded")
        arrays = {}
        for path in sorted(self.folder.glob("*.npy")):
            if path.name != "rows.npy":
                arrays[path.stem] = list(self._closed(path, rows).shape)
        write_atomically(self.folder / "rows.npy", npy(rows))
        arrays["rows"] = [len(rows)]
        write_json(self.folder / "store.json", {"key": self.key, "images": self.count, "arrays": arrays})
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def _closed(self, path: Path, rows: np.ndarray) -> np.ndarray:
        """Rewrite the array in a file to hold `rows` alone, and return it."""
        all_of = mapped(path)
        if len(all_of) == len(rows):
            return all_of
        with written_aside(path) as file:
            file.write(npy_head(all_of.dtype, (len(rows), *all_of.shape[1:])))
            for start in range(0, len(rows), PART):
                file.write(np.ascontiguousarray(all_of[rows[start : start + PART]]).data)
        return mapped(path)


def mapped(path: Path) -> np.ndarray:
    """Map the array of a .npy file; writing to it changes this process's copy alone."""
    return np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npy_head(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return the first HEAD bytes of a .npy file of version 1.0."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + (HEAD - 10).to_bytes(2, "little") + text.ljust(HEAD - 11).encode() + b"\n"
