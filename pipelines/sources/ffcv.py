"""Crops from a .beton: each image is decoded once, by FFCV's own decoder, and cropped as often as asked.

FFCV's loader ignores the decoder's return code, draws its crops from each thread's own random state,
compiles for some 12 s in every process and can't resume in mid-epoch. So this file uses FFCV's format and
its compiled decoder (`imdecode` in libffcv) and leaves its loader alone: one numba function, compiled once
and cached on disk, that releases the GIL, checks the return code, and crops and resizes every view of the
decoded image. All that depends on FFCV stands here.
"""

import importlib.util
from pathlib import Path

import llvmlite.binding
import numpy as np
from numba import njit, types

from pipelines.convert.beton import BetonFile, open_beton
from pipelines.errors import InputError
from pipelines.resize import resize_crop

JPEG = 0  # ffcv.fields.rgb_image.IMAGE_MODES


def _load_libffcv() -> None:
    """Make libffcv's symbols known to compiled code: by name, not address, so that code can be cached."""
    spec = importlib.util.find_spec("ffcv")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    libraries = sorted(folder.glob("_libffcv*.so")) if folder else []
    if not libraries:
        raise InputError(
            "reading a .beton needs FFCV: run `make install` (or `lvssl doctor` to see what is missing)"
        )
    llvmlite.binding.load_library_permanently(str(libraries[0]))


_load_libffcv()
_imdecode = types.ExternalFunction(
    "imdecode",
    types.int32(
        types.voidptr,  # JPEG bytes and their count
        types.uint64,
        types.uint32,  # height and width of the image
        types.uint32,
        types.voidptr,  # out: RGB pixels
        types.uint32,  # height and width of the crop, which is the whole image
        types.uint32,
        types.uint32,  # its offset
        types.uint32,
        types.uint32,  # scale, as a fraction
        types.uint32,
        types.boolean,  # crop?
        types.boolean,  # flip?
    ),
)


@njit(cache=True, nogil=True)
def _crop_views(data, offsets, sizes, modes, heights, widths, boxes, out):
    """Decode each sample once and crop all its views; returns the first row that fails to decode, or -1."""
    largest = 0
    for row in range(len(offsets)):
        largest = max(largest, heights[row] * widths[row] * 3)
    pixels = np.empty(largest, np.uint8)
    for row in range(len(offsets)):
        height, width = heights[row], widths[row]
        stored = data[offsets[row] : offsets[row] + sizes[row]]
        if modes[row] == JPEG:
            failed = _imdecode(  # type: ignore[call-overload]
                stored.ctypes, np.uint64(len(stored)), np.uint32(height), np.uint32(width), pixels.ctypes,
                np.uint32(height), np.uint32(width), np.uint32(0), np.uint32(0),
                np.uint32(1), np.uint32(1), False, False,
            )  # fmt: skip
            if failed != 0:
                return row
            image = pixels[: height * width * 3].reshape(height, width, 3)
        else:
            image = stored[: height * width * 3].reshape(height, width, 3)
        for view in range(boxes.shape[1]):
            resize_crop(image, boxes[row, view], out[row, view])
    return -1


class FFCVSource:
    """A .beton as a source of crops.

    Attributes:
        labels, heights, widths: int64 [N].
    """

    def __init__(self, path: str | Path):
        """Open and check the file; raises InputError if it is missing, cut short or no beton."""
        self.file: BetonFile = open_beton(Path(path))
        self.labels = self.file.labels
        self.heights = self.file.heights
        self.widths = self.file.widths
        self._data = np.memmap(path, np.uint8, mode="r")

    def __len__(self) -> int:
        return self.file.count

    def crops(self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray) -> None:
        """Fill out uint8 [B, V, R, R, 3] with boxes int32 [B, V, 4] (top, left, height, width) of B samples.

        Thread-safe; releases the GIL. Raises InputError with index and file where an image can't be decoded.
        """
        file = self.file
        failed = _crop_views(
            self._data, file.offsets[indices].astype(np.int64), file.sizes[indices].astype(np.int64),
            file.modes[indices], file.heights[indices], file.widths[indices], boxes, out,
        )  # fmt: skip
        if failed >= 0:
            raise InputError(
                f"{file.path}: sample {indices[failed]} can't be decoded (damaged); convert the set again"
            )
