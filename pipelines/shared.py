"""Arrays shared by the processes of a node, so that they are in its memory once.

The first process that needs them writes them to the node's temporary folder, and the others map the files.
Unused arrays are removed by the next process that ends or starts there; until then, a killed job leaves some
41 bytes per image of its set. If there are no other processes, or no file can be written there, each process
has its own arrays.
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
VERSION = 1  # of the files' content, as another release may have written them


def shared(told: Callable[[], str], make: Callable[[], Arrays]) -> Arrays:
    """make()'s arrays, memory-mapped if other processes may need the same; writing to one only changes this
    process's copy. `told()` states everything that they depend on. Raises what `make` raises."""
    if processes("LOCAL_WORLD_SIZE", "SLURM_NTASKS") == 1:  # torchrun's on this node, or srun's on all nodes
        return make()
    made: Arrays = {}
    try:
        folder = Path(tempfile.gettempdir()) / f"lvssl-arrays-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():  # nor is a link followed
            raise PermissionError(f"{folder} belongs to another user")
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
    """Open and lock a file until this process ends, making sure that others find this file under its name."""
    while True:
        used = open(path, "ab")  # noqa: SIM115
        fcntl.flock(used, fcntl.LOCK_SH)
        if stands(used, path):
            return used
        used.close()


def stands(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name: another process may have removed it before it was locked."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def written(place: Path, arrays: Arrays) -> None:
    """Write a folder of .npy files, under another name and then renamed. Raises OSError: no space."""
    aside = place.with_suffix(".aside")  # used by one process at a time; a killed one may have left it
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
    """Remove arrays that no process uses. Arrays that a process has mapped stay valid until it ends."""
    for path in folder.glob("*.used"):
        with open(path, "ab") as used, suppress(BlockingIOError):
            fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not stands(used, path):
                continue
            for arrays in (path.with_suffix(""), path.with_suffix(".aside")):
                shutil.rmtree(arrays, ignore_errors=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
