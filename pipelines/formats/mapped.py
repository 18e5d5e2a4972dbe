"""Files in memory one behind the other, without a descriptor for each: a set may have thousands."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.errors import InputError

_FIXED = 0x10  # MAP_FIXED of Linux and macOS, for which Python has no name
_map = ctypes.CDLL(None, use_errno=True).mmap
_map.restype = ctypes.c_void_p
_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]


def mapped(files: Sequence[Path], sizes: Sequence[int], alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of files, read-only uint8 [n], and where each of them begins, int64 [files].

    Each begins at a multiple of `alignment` bytes, itself one of the system's page; what lies between two is
    zero. Python's own `mmap` keeps each file open; here the room is one mapping, and files are put into it.

    Raises:
        InputError: a file can't be read, or doesn't have the bytes that `sizes` says.
    """
    rooms = -(-np.asarray(sizes, np.int64) // alignment) * alignment
    starts = np.cumsum(rooms) - rooms
    room = mmap.mmap(-1, int(rooms.sum()), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    data = np.frombuffer(room, np.uint8)  # the mapping ends with the last array of it
    for path, size, start in zip(files, sizes, starts.tolist()):
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    raise InputError(f"{path}: was changed while it was opened; start again")
                place, how = data.ctypes.data + start, mmap.MAP_SHARED | _FIXED
                if _map(place, size, mmap.PROT_READ, how, file.fileno(), 0) != place:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        except OSError as error:
            raise InputError(f"{path}: cannot be mapped into memory ({error.strerror})") from error
    return data[: int(starts[-1]) + sizes[-1]], starts
