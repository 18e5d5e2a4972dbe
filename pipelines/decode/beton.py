"""Crops from a .beton, FFCV's file: each image is decoded once and cropped as often as asked.

FFCV's loader ignores the decoder's return code, draws its crops from each thread's own random state,
compiles for some 12 s in every process and can't resume in mid-epoch. So this file uses FFCV's format and
leaves its loader alone: one numba function, compiled once and cached on disk, that releases the GIL, checks
the decoder's verdict, and crops and resizes every view of the decoded image. The package itself isn't needed,
and where there is no libturbojpeg, Pillow decodes: the same pixels, more slowly.
"""

import os
from pathlib import Path

import numpy as np

from pipelines.datasets.dataset import check_labels
from pipelines.datasets.imagenet import class_names, names_in
from pipelines.decode import turbo
from pipelines.decode.reader import IN_CACHE, DamagedSample
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import JPEG, PAGE_SIZE, BetonFile, named_targets, open_beton
from pipelines.formats.manifest import manifest_path


class BetonReader:
    """A .beton as a source of crops.

    Attributes:
        labels, heights, widths: int64 [N]. targets: float64 [N] each, by name. classes: from the manifest.
    """

    chunk = IN_CACHE

    def __init__(self, path: str | Path):
        """Open and check the file; raises InputError if it is missing, cut short or no beton."""
        self.file: BetonFile = open_beton(Path(path))
        self.labels = self.file.labels
        self.heights = self.file.heights
        self.widths = self.file.widths
        self._offsets, self._sizes = self.file.offsets.astype(np.int64), self.file.sizes.astype(np.int64)
        self._open = open(path, "rb", buffering=0)  # noqa: SIM115
        self._length = os.fstat(self._open.fileno()).st_size
        manifest = manifest_path(Path(path))
        self.classes = class_names(manifest)
        self.targets = named_targets(self.file, names_in(manifest, "targets") or [])
        if len(self.labels) and self.labels.min() >= 0:
            check_labels(str(path), self.labels, self.classes, "image {}".format)

    def __len__(self) -> int:
        return self.file.count

    def storage_blocks(self) -> np.ndarray:
        """int64 [N], the page of 2 MB in which each image begins."""
        return self._offsets // PAGE_SIZE

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each."""
        return self.heights[indices], self.widths[indices]

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.decode.Reader`. Releases the GIL; with Pillow, while it decodes and crops."""
        file = self.file
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        if turbo.AVAILABLE:
            row, status = turbo.crop_stored(
                self._open.fileno(),
                turbo.Samples(
                    self._offsets[indices], self._sizes[indices], file.modes[indices], *self.sizes(indices)
                ),
                boxes,
                flips,
                out,
            )
        else:
            row, status = self._crop_with_pillow(indices, boxes, flips, out)
        if status == turbo.UNREAD:
            self._stored(int(indices[row]))  # says why; or it is there again
            return self.crops(indices, boxes, out, flips)
        if status == turbo.WRONG_BOX:
            raise ValueError(f"boxes {boxes[row].tolist()} do not lie within image {indices[row]}")
        if status != turbo.DECODED:
            index = int(indices[row])
            why = f"can't be decoded ({self._reason(index)}); convert the set again"
            raise DamagedSample(row, index, f"{file.path}: sample {index} {why}")

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        stored = self._stored(index)
        if self.file.modes[index] == JPEG:
            return stored
        return np.frombuffer(stored, np.uint8).reshape(self.heights[index], self.widths[index], 3)

    def _stored(self, index: int) -> bytes:
        """The bytes of one image. Raises InputError if they can't be read, or the file has been cut short
        since it was opened; one that was replaced or removed is still there for who has it open."""
        path, number = self.file.path, self._open.fileno()
        start, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            stored = os.pread(number, size, start)
            while 0 < len(stored) < size and (
                more := os.pread(number, size - len(stored), start + len(stored))
            ):
                stored += more
            found = os.fstat(number).st_size
        except OSError as error:
            raise InputError(f"{path}: sample {index} cannot be read ({error.strerror})") from error
        if len(stored) < size:
            raise InputError(
                f"{path}: was cut from {self._length:,} to {found:,} bytes while it was read: restore it, or "
                "convert the set again"
            )
        return stored

    def _crop_with_pillow(
        self, indices: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
    ) -> tuple[int, int]:
        """What `turbo.crop_stored` does and returns."""
        for row, index in enumerate(indices.tolist()):
            try:
                pixels = self._pixels(index)
            except jpeg.DamagedImage:
                return row, turbo.DAMAGED
            if not turbo.crop_pixels(pixels, boxes[row], flips[row], out[row]):
                return row, turbo.WRONG_BOX
        return len(indices), turbo.DECODED

    def _pixels(self, index: int) -> np.ndarray:
        """One image, uint8 [H, W, 3]. Raises DamagedImage."""
        stored = self.encoded(0, index)
        if isinstance(stored, np.ndarray):
            return stored
        header = jpeg.read_header(stored, jpeg.ANY_SIZE)
        if (header.height, header.width) != (self.heights[index], self.widths[index]):
            entry = f"{self.widths[index]} x {self.heights[index]}"
            raise jpeg.DamagedImage(f"a JPEG of {header.width} x {header.height}, but its entry says {entry}")
        if header.height * header.width > turbo.PIXELS_PER_BYTE * len(stored):
            size = f"{header.width} x {header.height}"
            raise jpeg.DamagedImage(f"{len(stored)} bytes are too few for {size} pixels")
        if not header.is_rgb_or_grey:
            raise jpeg.DamagedImage(f"its colours are {header.colour}, neither RGB nor grey")
        return jpeg.decode(stored, header)

    def _reason(self, index: int) -> str:
        """What the decoder says of a sample that failed."""
        try:
            self._pixels(index)
        except jpeg.DamagedImage as error:
            return str(error)
        return "damaged"
