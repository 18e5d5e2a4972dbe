"""Crops from a .beton, FFCV's file: each image is decoded once and cropped as often as asked.

FFCV's loader ignores the decoder's return code, draws its crops from each thread's own random state,
compiles for some 12 s in every process and can't resume in mid-epoch. So this file uses FFCV's format and
leaves its loader alone: one numba function, compiled once and cached on disk, that releases the GIL, checks
the decoder's verdict, and crops and resizes every view of the decoded image. The package itself isn't needed.
"""

from pathlib import Path

import numpy as np

from pipelines.convert import jpeg
from pipelines.convert.beton import PAGE_SIZE, BetonFile, open_beton
from pipelines.convert.imagenet import class_names
from pipelines.convert.manifest import manifest_path
from pipelines.convert.readers import check_labels
from pipelines.errors import InputError
from pipelines.sources import IN_CACHE, DamagedSample, turbo


class FFCVSource:
    """A .beton as a source of crops.

    Attributes:
        labels, heights, widths: int64 [N]. targets: float64 [N] each, by name. classes: from the manifest.
        pages: int64 [N], the block of 2 MB in which each image begins.
    """

    chunk = IN_CACHE

    def __init__(self, path: str | Path):
        """Open and check the file; raises InputError if it is missing, cut short or no beton."""
        if not turbo.AVAILABLE:
            raise InputError(
                "reading a .beton needs libturbojpeg: run `make install` (or apt-get install libturbojpeg0)"
            )
        self.file: BetonFile = open_beton(Path(path))
        self.labels, self.targets = self.file.labels, self.file.targets
        self.heights = self.file.heights
        self.widths = self.file.widths
        self._offsets, self._sizes = self.file.offsets.astype(np.int64), self.file.sizes.astype(np.int64)
        self.pages = self._offsets // PAGE_SIZE
        self._data = np.memmap(path, np.uint8, mode="r")
        self.classes = class_names(manifest_path(Path(path)))
        if len(self.labels) and self.labels.min() >= 0:
            check_labels(str(path), self.labels, self.classes, "image {}".format)

    def __len__(self) -> int:
        return self.file.count

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each."""
        return self.heights[indices], self.widths[indices]

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.sources.Source`. Releases the GIL."""
        file = self.file
        row, status = turbo.crop_stored(
            self._data, self._offsets[indices], self._sizes[indices], file.modes[indices],
            self.heights[indices], self.widths[indices],
            boxes, np.zeros(boxes.shape[:2], bool) if flips is None else flips, out,
        )  # fmt: skip
        if status == turbo.WRONG_BOX:
            raise ValueError(f"boxes {boxes[row].tolist()} do not lie within image {indices[row]}")
        if status != turbo.DECODED:
            index = int(indices[row])
            why = f"can't be decoded ({self._reason(index)}); convert the set again"
            raise DamagedSample(row, index, f"{file.path}: sample {index} {why}")

    def stored(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.sources.Source`."""
        stored = self._data[self._offsets[index] :][: self._sizes[index]]
        if self.file.modes[index] == turbo.JPEG:
            return stored.tobytes()
        return stored.reshape(self.heights[index], self.widths[index], 3)

    def _reason(self, index: int) -> str:
        """What the decoder says of a sample that failed."""
        stored = self._data[self._offsets[index] :][: self._sizes[index]].tobytes()
        try:
            header = jpeg.read_header(stored)
            if (header.height, header.width) != (self.heights[index], self.widths[index]):
                entry = f"{self.widths[index]} x {self.heights[index]}"
                return f"a JPEG of {header.width} x {header.height}, but its entry says {entry}"
            if header.height * header.width > turbo.PIXELS_A_BYTE * len(stored):
                return f"{len(stored)} bytes are too few for {header.width} x {header.height} pixels"
            jpeg.decode(stored, header)
        except jpeg.DamagedImage as error:
            return str(error)
        return "damaged"
