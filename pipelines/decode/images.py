"""Crops from plain image files, without a conversion, FFCV or DALI; libjpeg-turbo is used if installed.

It opens every source of `pipelines.datasets.opening` (class folders, tars, parquet), and folders of loose
images, which have no labels. JPEGs take the same compiled path as those of a .beton and give the same pixels;
those that are CMYK or rotated by EXIF, and other formats such as PNG, take a slower path, mostly Pillow's.
Each original is decoded in full, so this is slower than a .beton of smaller images, by about the ratio of
their pixels.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from pipelines.datasets.folders import unlabelled_images
from pipelines.datasets.opening import open_dataset
from pipelines.datasets.shards import open_shards
from pipelines.decode import turbo
from pipelines.decode.pixels import as_rgb, decode_other, upright
from pipelines.decode.reader import IN_CACHE, DamagedSample
from pipelines.errors import InputError, first_line
from pipelines.formats import jpeg
from pipelines.formats.beton import JPEG

RECENT = 64 << 20  # bytes that a thread keeps between a call of sizes and one of crops
BLOCK = 64  # files per storage block of the quasi-random order: a folder's files are often stored together


class ImageReader:
    """Image files as a source of crops.

    Attributes:
        labels: int64 [N], all NO_LABEL if there are none. targets: {name: float64 [N]}. names: of the files.
        classes: class names, by label. notes: messages for the user, such as what is left out.
        split: the one of a set's splits that was taken; None if it has none.
    """

    chunk = IN_CACHE
    device = "cpu"

    def __init__(self, path: str | Path, labelled: bool = True):
        """List the images; raises InputError if there are none. Files are read when they are asked for.

        `labelled=False` takes every image below a folder, named by its path there, and ignores class folders.
        """
        self.path = Path(path)
        if labelled:  # with their classes, if they have any
            opened = open_shards(self.path) or open_dataset(str(self.path))
        else:
            opened = unlabelled_images(self.path)
        self.names, self.labels = opened.names, opened.labels
        self.classes: list[str] | None = list(opened.classes)
        self.targets, self.notes, self.split = opened.targets, opened.notes, opened.split
        self._read, self._recent = opened.read, _Recent()
        self._heights = np.zeros(len(self.labels), np.int64)  # 0: not read yet
        self._widths = np.zeros(len(self.labels), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def storage_blocks(self) -> np.ndarray:
        """int64 [N], see `pipelines.decode.Reader`."""
        return np.arange(len(self)) // BLOCK

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths (upright), int64 [B] each; headers are read once. Raises DamagedSample."""
        self._recent.forget()
        for row in np.flatnonzero(self._heights[indices] == 0):
            index = int(indices[row])
            data = self.encoded(int(row), index)
            try:
                height, width, data = _size(data)
            except Exception as error:  # any decoder error concerns this image alone
                raise self._damaged(int(row), index, error) from error
            self._widths[index] = width
            self._heights[index] = height  # set last, as another thread may read it
            self._recent.keep(index, data)
        return self._heights[indices], self._widths[indices]

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.decode.Reader`. Holds the GIL while it opens files, not while it decodes them."""
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        for row, index in enumerate(indices.tolist()):
            data = self._recent.images.pop(index, None)
            data = self.encoded(row, index) if data is None else data
            try:
                fits = _crop(data, boxes[row], flips[row], out[row])
            except Exception as error:
                raise self._damaged(row, index, error) from error
            if not fits:
                raise ValueError(f"boxes {boxes[row].tolist()} do not lie within {self.names[index]}")

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        try:
            return self._read(index)
        except InputError:  # concerns the whole set, not this image
            raise
        except Exception as error:
            raise self._damaged(row, index, error) from error

    def _damaged(self, row: int, index: int, error: Exception) -> DamagedSample:
        name, reason = self.names[index], getattr(error, "strerror", None) or first_line(error)
        return DamagedSample(row, index, f"{self.path}: sample {index}, {name}, can't be decoded ({reason})")


class _Recent(threading.local):
    """Images that a thread has read to find their sizes, kept because it asks for their crops next."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.images: dict[int, bytes | np.ndarray] = {}
        self.room = RECENT

    def keep(self, index: int, image: bytes | np.ndarray) -> None:
        size = len(image) if isinstance(image, bytes) else image.nbytes
        if size <= self.room:
            self.images[index] = image
            self.room -= size


def _header(data: bytes) -> jpeg.JpegHeader:
    """Read and check a JPEG's header. Raises DamagedImage."""
    header = jpeg.read_header(data)
    if min(header.height, header.width) < 1:  # a file of tables alone has a header, too
        raise jpeg.DamagedImage("contains no image")
    if header.height * header.width > turbo.PIXELS_PER_BYTE * len(data):
        raise jpeg.DamagedImage(f"{len(data)} bytes are too few for {header.width} x {header.height} pixels")
    return header


def _size(data: bytes | np.ndarray) -> tuple[int, int, bytes | np.ndarray]:
    """Height and width, upright, of an image; and the image itself, or its pixels if it had to be decoded."""
    if isinstance(data, bytes) and not jpeg.is_jpeg(data):
        data = _other(data)
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1], data
    header = _header(data)
    turned = header.orientation >= 5
    height, width = (header.width, header.height) if turned else (header.height, header.width)
    return height, width, data


def _crop(data: bytes | np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> bool:
    """Crop all views of one image; returns False if a box lies outside it. Raises DamagedImage."""
    if isinstance(data, np.ndarray):
        pixels = as_rgb(data)
    elif not jpeg.is_jpeg(data):
        pixels = _other(data)
    else:
        header = _header(data)
        if turbo.AVAILABLE and header.is_rgb_or_grey and header.orientation == 1:
            return _crop_jpeg(data, header, boxes, flips, out)
        pixels = upright(jpeg.decode(data, header), header.orientation)
    return turbo.crop_pixels(np.ascontiguousarray(pixels), boxes, flips, out)


def _crop_jpeg(
    data: bytes, header: jpeg.JpegHeader, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
) -> bool:
    mode, size = np.full(1, JPEG, np.uint8), (np.array([header.height]), np.array([header.width]))
    sample = turbo.Samples(np.zeros(1, np.int64), np.array([len(data)]), mode, *size)
    bytes_of = np.frombuffer(data, np.uint8)
    _, status = turbo.crop_stored(bytes_of, sample, boxes[None], flips[None], out[None])
    if status in (turbo.DAMAGED, turbo.WRONG_SIZE):
        jpeg.decode(data, header)  # raises the reason
        raise jpeg.DamagedImage("damaged")
    return status == turbo.DECODED


def _other(data: bytes) -> np.ndarray:
    return upright(*decode_other(data))
