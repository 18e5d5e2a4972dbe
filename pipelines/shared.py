"""Arrays that the processes of a node share, so that they lie in its memory once.

The first process that needs them writes them to the node's temporary folder, the others map what it has
written. What no process uses any more is removed by the next that ends or begins there: of a killed job some
57 bytes an image of its set are left until then. Without other processes, or where no file can be made there,
arrays are a process's own.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.cores import processes

Arrays = dict[str, np.ndarray]
VERSION = 1  # of what is written, which a process of another release may have done


def shared(told: Callable[[], str], make: Callable[[], Arrays]) -> Arrays:
    """make()'s arrays, mapped where other processes may need the same; to write into one changes this
    process's copy alone. `told()` says all that they depend on. Raises what `make` does."""
    if processes("LOCAL_WORLD_SIZE", "SLURM_NTASKS") == 1:  # torchrun's on this node, or srun's in all
        return make()
    made: Arrays = {}
    try:
        folder = Path(tempfile.gettempdir()) / f"lvssl-arrays-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():  # nor is a link followed
            raise PermissionError(f"{folder} is somebody else's")
        unused_removed(folder)
        place = folder / hashlib.sha256(f"{VERSION} {told()}".encode()).hexdigest()[:16]
        used = in_use(place.with_suffix(".used"))
        with open(place.with_suffix(".lock"), "ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if not place.is_dir():
                made = make()
                written(place, made)
        atexit.register(left, used, folder)
        return {path.stem: np.load(path, mmap_mode="c") for path in sorted(place.glob("*.npy"))}
    except OSError:
        return made or make()


def in_use(path: Path) -> IO[bytes]:
    """The file, open and locked until this process ends: the one that others find under that name."""
    while True:
        used = open(path, "ab")  # noqa: SIM115
        fcntl.flock(used, fcntl.LOCK_SH)
        if stands(used, path):
            return used
        used.close()


def stands(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still what lies under its name: another may have removed it before the lock."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def written(place: Path, arrays: Arrays) -> None:
    """A folder of .npy files, beside and then renamed. OSError: no room."""
    aside = place.with_suffix(".aside")  # of one process at a time; a killed one may have left it
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        aside.rename(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def left(used: IO[bytes], folder: Path) -> None:
    used.close()
    with suppress(OSError):
        unused_removed(folder)


def unused_removed(folder: Path) -> None:
    """Remove the arrays that no process uses. What a process has mapped stays its own until it ends."""
    for path in folder.glob("*.used"):
        with open(path, "ab") as used, suppress(BlockingIOError):
            fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not stands(used, path):
                continue
            for arrays in (path.with_suffix(""), path.with_suffix(".aside")):
                shutil.rmtree(arrays, ignore_errors=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
