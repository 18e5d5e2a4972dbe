"""libturbojpeg: its location and signatures, for Python (`formats.jpeg`) and for compiled code
(`decode.turbo`, which finds its functions by name).

It is searched for in this order; the first that loads is used:

    $LVSSL_TURBOJPEG     a file, or the folder that has it; if this is set, nothing else is tried
    sys.prefix/lib       where `make install` puts it
    $CONDA_PREFIX/lib
    lib/                 next to this package, where an offline bundle may put it
    the system           by its usual names, then as found by the linker's cache or a compiler

Without it, Pillow decodes with the code that it bundles. The pixels of sound files are the same, but Pillow
holds the GIL in between, and doesn't report damage that a decoder can paint over.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import threading
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_ulong, c_void_p
from pathlib import Path

VARIABLE = "LVSSL_TURBOJPEG"
NAMES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "libturbojpeg.so", "libturbojpeg.dylib")
NEEDED = (
    *("tjInitDecompress", "tjDestroy", "tjGetErrorStr2", "tjDecompressHeader3", "tjDecompress2"),
    *("tjInitCompress", "tjBufSize", "tjCompress2"),
)

COLOURS = ("RGB", "YCbCr", "grey", "CMYK", "YCCK")  # TJCS_*, from 0
RGB, GREY = 0, 6  # TJPF_*
SAMPLINGS = {"4:4:4": 0, "4:2:0": 2}  # TJSAMP_*, for encoding
USUAL_SAMPLINGS = 6  # TJSAMP_444, 422, 420, GRAY, 440 and 411, from 0; 441 came with version 3
NO_REALLOCATION, ACCURATE_DCT = 1024, 4096  # TJFLAG_*; the fast DCT is less accurate
STOP_AT_500_SCANS = 32768  # TJFLAG_LIMITSCANS: a progressive JPEG of a few kilobytes could take minutes


def candidates() -> Iterator[str]:
    """Files and names to try, in order."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        yield from _within(Path(chosen)) if os.path.isdir(chosen) else [chosen]
        return
    prefixes = [sys.prefix, os.environ.get("CONDA_PREFIX"), Path(__file__).parents[2]]
    for prefix in prefixes:
        if prefix:
            yield from _within(Path(prefix) / "lib")
    yield from NAMES
    found = ctypes.util.find_library("turbojpeg")
    if found:
        yield found


def _within(folder: Path) -> list[str]:
    return [str(folder / name) for name in NAMES if (folder / name).is_file()]


def load() -> tuple[ctypes.CDLL, str] | None:
    """The library and the name by which it was loaded, or None."""
    for name in candidates():
        try:
            library = ctypes.CDLL(name)
            for function in NEEDED:
                getattr(library, function)
        except (OSError, AttributeError):  # missing, not a library, or of another kind
            continue
        return library, name
    return None


FOUND = load()


def typed() -> ctypes.CDLL | None:
    """The library with the argument types of its functions declared, or None."""
    if FOUND is None:
        return None
    turbo, _ = FOUND
    turbo.tjInitDecompress.restype = c_void_p
    turbo.tjDestroy.argtypes = [c_void_p]
    turbo.tjGetErrorStr2.argtypes, turbo.tjGetErrorStr2.restype = [c_void_p], c_char_p
    turbo.tjDecompressHeader3.argtypes = [c_void_p, c_char_p, c_ulong, *[POINTER(c_int)] * 4]
    turbo.tjDecompress2.argtypes = [c_void_p, c_char_p, c_ulong, c_void_p, *[c_int] * 5]
    turbo.tjInitCompress.restype = c_void_p
    turbo.tjBufSize.argtypes, turbo.tjBufSize.restype = [c_int] * 3, c_ulong
    pixels = [c_void_p, c_int, c_int, c_int, c_int]  # address, width, bytes per line, height, format
    turbo.tjCompress2.argtypes = [c_void_p, *pixels, POINTER(c_void_p), POINTER(c_ulong), *[c_int] * 3]  # type: ignore[list-item]
    return turbo


class _Place(ctypes.Structure):  # Dl_info of <dlfcn.h>
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p)]
    _fields_ += [("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def file() -> str:
    """The path of the loaded library; its name if the linker doesn't know more; empty if there is none."""
    if FOUND is None:
        return ""
    library, name = FOUND
    place = _Place()
    try:
        known = ctypes.CDLL(None).dladdr(
            ctypes.cast(library.tjInitDecompress, ctypes.c_void_p), ctypes.byref(place)
        )
    except (OSError, AttributeError):
        return name
    return os.fsdecode(place.file) if known and place.file else name


def absence() -> str:
    """A message for the case that the library is missing, in one line."""
    chosen = os.environ.get(VARIABLE)
    none = (
        f"libturbojpeg can't be loaded from {VARIABLE}={chosen}" if chosen else "libturbojpeg isn't installed"
    )
    return (
        f"{none}: Pillow decodes JPEGs instead, more slowly; `lvssl doctor` says how to install it, "
        f"or set {VARIABLE} to its file"
    )


_said = threading.Lock()  # taken once and never released: several threads may find out at the same moment


def say_absence() -> None:
    """Print `absence` to stderr, once per process and only on the first rank."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if _said.acquire(blocking=False) and rank == "0":
        print(absence(), file=sys.stderr, flush=True)
