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

from pipelines.datasets.beton import open_betons
from pipelines.datasets.dataset import check_labels
from pipelines.datasets.imagenet import names_among
from pipelines.decode import turbo
from pipelines.decode.reader import IN_CACHE, DamagedSample
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import JPEG, PAGE_SIZE, BetonFile, joined
from pipelines.formats.mapped import mapped
from pipelines.staging import near


class BetonReader:
    """A .beton, or several as one set, as a source of crops.

    Attributes:
        labels, heights, widths: int64 [N]. targets: float64 [N] each, by name. classes: from the manifests.
    """

    chunk = IN_CACHE

    def __init__(self, path: str | Path):
        """Open and check the files; raises InputError if one is missing, cut short, no beton, or of another
        conversion than the first."""
        parts, manifest = open_betons(path)
        self.classes = names_among(manifest, "classes")
        self._files = [part.path for part in parts]
        self._ends = np.cumsum([part.count for part in parts])
        copies = self._copies = [near(file) for file in self._files]  # or the files themselves
        stats = [os.stat(file) for file in copies]
        self._states = [(stat.st_ino, stat.st_size) for stat in stats]
        sizes = [stat.st_size for stat in stats]
        self._data, starts = mapped(copies, sizes, PAGE_SIZE)
        self.file: BetonFile = joined(Path(path), parts, starts.tolist())
        self.labels, self.heights, self.widths = self.file.labels, self.file.heights, self.file.widths
        self.targets = self.file.targets
        self._offsets, self._sizes = self.file.offsets.astype(np.int64), self.file.sizes.astype(np.int64)
        if len(self.labels) and self.labels.min() >= 0:
            name_of = "image {}".format if len(parts) == 1 else self._name
            check_labels(str(path), self.labels, self.classes, name_of)

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
        self._require_whole(indices)
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        if turbo.AVAILABLE:
            row, status = turbo.crop_stored(
                self._data,
                turbo.Samples(
                    self._offsets[indices], self._sizes[indices], file.modes[indices], *self.sizes(indices)
                ),
                boxes,
                flips,
                out,
            )
        else:
            row, status = self._crop_with_pillow(indices, boxes, flips, out)
        if status == turbo.WRONG_BOX:
            raise ValueError(f"boxes {boxes[row].tolist()} do not lie within image {indices[row]}")
        if status != turbo.DECODED:
            index = int(indices[row])
            why = f"can't be decoded ({self._reason(index)}); convert the set again"
            raise DamagedSample(row, index, f"{self._name(index)} {why}")

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        self._require_whole(np.array([index]))
        stored = self._data[self._offsets[index] :][: self._sizes[index]]
        if self.file.modes[index] == JPEG:
            return stored.tobytes()
        return stored.reshape(self.heights[index], self.widths[index], 3)

    def _name(self, index: int) -> str:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._files[part]}: sample {index - int(np.append(0, self._ends)[part])}"

    def _require_whole(self, indices: np.ndarray) -> None:
        """Raise InputError if a file has shrunk since it was opened: what is mapped and gone would end the
        process with a bus error. A file that was replaced or removed is still there for who has it open."""
        for part in {*np.searchsorted(self._ends, indices, side="right").tolist()}:
            file, (inode, size) = self._files[part], self._states[part]
            try:
                found = os.stat(self._copies[part])
            except OSError:
                continue
            if found.st_ino == inode and found.st_size < size:
                was = f"was cut from {size:,} to {found.st_size:,} bytes while it was read"
                raise InputError(f"{file}: {was}: restore it, or convert the set again")

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
