"""libjpeg-turbo for compiled code: one decompressor per call, so that no error outlives its image.

FFCV's own decoder (`imdecode` in libffcv) calls the same library but isn't used, for two reasons. It keeps
its decompressors for ever, although one that has failed on a header (libjpeg-turbo 2.1) misreads the next
good file. And it doesn't compare the JPEG's size with the size it was told, so a wrong entry gives garbage.
"""

from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba import types

from pipelines.decode.resize import resize_crop
from pipelines.formats import turbojpeg
from pipelines.formats.beton import JPEG
from pipelines.formats.jpeg import PIXELS_PER_BYTE
from pipelines.formats.turbojpeg import RGB, STOP_AT_500_SCANS
from pipelines.kernels.compiled import compiled

AVAILABLE = turbojpeg.FOUND is not None
if turbojpeg.FOUND is not None:  # compiled code finds symbols by name, so that it can be cached
    llvmlite.binding.load_library_permanently(turbojpeg.FOUND[1])

_handle = types.uintp
_init = types.ExternalFunction("tjInitDecompress", _handle())
_destroy = types.ExternalFunction("tjDestroy", types.int32(_handle))
_read_header = types.ExternalFunction(
    "tjDecompressHeader3",
    types.int32(
        _handle, types.voidptr, types.ulong,  # the JPEG's bytes and their number
        types.voidptr, types.voidptr, types.voidptr, types.voidptr,  # out: width, height, sampling, colours
    ),
)  # fmt: skip
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(
        _handle, types.voidptr, types.ulong,
        types.voidptr, types.int32, types.int32, types.int32,  # out: pixels; width, bytes per line, height
        types.int32, types.int32,  # pixel format, flags
    ),
)  # fmt: skip

_pread: Any = types.ExternalFunction(
    "pread",
    types.intp(types.int32, types.voidptr, types.uintp, types.int64),  # descriptor; out: bytes; count, offset
)

DECODED, WRONG_SIZE, DAMAGED, WRONG_BOX, TOO_SHORT, UNREAD = 0, 1, 2, 3, 4, 5


class Samples(NamedTuple):
    """Where some stored images lie, and what is known about them."""

    offsets: np.ndarray  # int64 [B], of each image in the data
    sizes: np.ndarray  # int64 [B], in bytes
    modes: np.ndarray  # uint8 [B], JPEG or not
    heights: np.ndarray  # int64 [B], in pixels
    widths: np.ndarray


def crop_stored(
    data: np.ndarray, samples: Samples, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
) -> tuple[int, int]:
    """Decode each sample once and crop all its views; stop at the first sample that can't be decoded.

    Args:
        data: uint8 [n], in which sample i occupies sizes[i] bytes from offsets[i]; or int32 [B], file
            descriptors that are read, because a memory map would kill the process if the file is cut short.
        boxes: int32 [B, V, 4]. flips: bool [B, V].
        out: uint8 [B, V, R, R, 3], filled.

    Returns:
        (row, why) of the sample that failed, or (B, DECODED).
    """
    handle = _begin()
    files, data = (_NOWHERE, data) if data.dtype == np.uint8 else (data, _NOTHING)
    try:
        return _crop_stored(handle, files, data, *samples, boxes, flips, out)
    finally:  # a false size or a lack of memory raises; numba itself has no `finally`
        _end(handle)


_NOTHING, _NOWHERE = np.frombuffer(b"", np.uint8), np.empty(0, np.int32)  # read-only, as bytes are


@compiled()
def _begin():
    return _init()


@compiled()
def _end(handle):
    _destroy(handle)


@compiled()
def _crop_stored(handle, files, data, offsets, sizes, modes, heights, widths, boxes, flips, out):
    numbers = np.empty(4, np.int32)
    pixels = np.empty(0, np.uint8)
    room = np.empty(0, np.uint8)
    status = DECODED
    for row in range(len(offsets)):
        height, width = heights[row], widths[row]
        if len(files) == 0:
            stored = data[offsets[row] : offsets[row] + sizes[row]]
        else:
            if len(room) < sizes[row]:
                room = np.empty(sizes[row], np.uint8)
            stored = room[: sizes[row]]
            if not _read(files[row], offsets[row], stored):
                status = UNREAD
                break
        if modes[row] == JPEG:
            status, pixels = _decode(handle, stored, height, width, numbers, pixels)
            if status != DECODED:
                break
            image = pixels[: height * width * 3].reshape(height, width, 3)
        else:
            image = stored[: height * width * 3].reshape(height, width, 3)
        if not crop_pixels(image, boxes[row], flips[row], out[row]):
            status = WRONG_BOX
            break
    return row if status != DECODED else len(offsets), status


@compiled()
def _read(file, start, out):
    """Fill `out` with the bytes from `start` on; False if the file ends too early or can't be read."""
    done = 0
    while done < len(out):
        read = _pread(file, out[done:].ctypes, np.uint64(len(out) - done), np.int64(start + done))
        if read <= 0:
            return False
        done += read
    return True


@compiled()
def crop_pixels(image, boxes, flips, out):
    """Crop all views of one image uint8 [H, W, 3]; False if a box lies outside it, which only this checks."""
    for view in range(len(boxes)):
        top, left, height, width = boxes[view]
        inside = top + height <= image.shape[0] and left + width <= image.shape[1]
        if min(top, left) < 0 or min(height, width) < 1 or not inside:
            return False
        resize_crop(image, boxes[view], out[view], flips[view])
    return True


@compiled()
def _decode(handle, stored, height, width, numbers, pixels):
    """Decode a JPEG of known size into `pixels`, or into a larger buffer, which is returned in its place."""
    numbers[:] = 0
    if _read_header(
        handle, stored.ctypes, np.uint64(len(stored)),
        numbers[0:].ctypes, numbers[1:].ctypes, numbers[2:].ctypes, numbers[3:].ctypes,
    ):  # fmt: skip
        return DAMAGED, pixels
    if numbers[0] != width or numbers[1] != height:
        return WRONG_SIZE, pixels
    if height * width > PIXELS_PER_BYTE * len(stored):
        return TOO_SHORT, pixels
    if len(pixels) < height * width * 3:  # only now, as a damaged entry may claim gigabytes
        pixels = np.empty(height * width * 3, np.uint8)
    failed = _decompress(
        handle, stored.ctypes, np.uint64(len(stored)),
        pixels.ctypes, np.int32(width), np.int32(width * 3), np.int32(height),
        np.int32(RGB), np.int32(STOP_AT_500_SCANS),
    )  # fmt: skip
    return DAMAGED if failed else DECODED, pixels
