"""Crops from a .beton, FFCV's file format: each image is decoded once and cropped as often as asked.

FFCV's loader ignores the decoder's return code, draws its crops from each thread's own random state, compiles
for some 9 s in every process and can't resume in mid-epoch. This module therefore uses FFCV's format but not
its loader: one numba function, compiled once and cached on disk, releases the GIL, checks the decoder's
return code, and crops and resizes every view of the decoded image. The ffcv package itself isn't needed.
Without libturbojpeg, Pillow decodes: the pixels are the same, but it is slower.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.datasets.beton import open_betons
from pipelines.datasets.dataset import check_labels
from pipelines.datasets.imagenet import names_among
from pipelines.datasets.parts import parts_of
from pipelines.decode import turbo
from pipelines.decode.reader import IN_CACHE, DamagedSample
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import JPEG, PAGE_SIZE, BetonFile, columns_of
from pipelines.formats.manifest import manifest_path
from pipelines.formats.openfiles import OpenFiles, most_open
from pipelines.shared import Arrays, shared


def identity_of(path: str | Path, files: Sequence[Path]) -> str:
    """What a set's columns depend on: its files and manifests, with each one's size and modification time."""
    found = [each for file in files for each in (file, manifest_path(file)) if each.exists()]
    told = [(os.path.abspath(each), each.stat().st_size, each.stat().st_mtime_ns) for each in found]
    return json.dumps([str(path), told])


def read_columns(path: str | Path) -> Arrays:
    """`columns_of` a set, and "manifest": bytes of a JSON text with the names of the classes and targets."""
    parts, head = open_betons(path)
    text = json.dumps({**head, "targets": list(parts[0].targets)})
    return columns_of(parts) | {"manifest": np.frombuffer(text.encode(), np.uint8)}


class BetonReader:
    """One .beton, or several as one set, as a source of crops.

    Attributes:
        labels, heights, widths: int64 [N]. targets: {name: float64 [N]}. classes: from the manifests.
    """

    chunk = IN_CACHE
    device = "cpu"

    def __init__(self, path: str | Path):
        """Open and check the files. Raises InputError if one is missing, cut short, not a beton, or from a
        different conversion than the first."""
        self._files = parts_of(path)
        columns = shared(partial(identity_of, path, self._files), partial(read_columns, path))
        manifest = json.loads(columns.pop("manifest").tobytes())
        self._counts = columns.pop("counts")
        targets = {name: columns.pop(f"target-{n}") for n, name in enumerate(manifest["targets"])}
        self.classes = names_among(manifest, "classes")
        self.file = BetonFile(Path(path), len(columns["labels"]), **columns, targets=targets)
        self.labels, self.heights, self.widths = self.file.labels, self.file.heights, self.file.widths
        self.targets = self.file.targets
        self._open = OpenFiles()
        self._lengths = [self._open.size(file) for file in self._files]
        few = len(self._files) <= most_open()  # few enough to keep all of them open
        self._kept = [self._open.held(file) for file in self._files] if few else []
        self._numbers = np.array([file.number for file in self._kept], np.int32)
        self._ends = np.cumsum(self._counts)
        if len(self.labels) and self.labels.min() >= 0:
            name_of = "image {}".format if len(self._files) == 1 else self._name
            check_labels(str(path), self.labels, self.classes, name_of)

    def __len__(self) -> int:
        return self.file.count

    def storage_blocks(self) -> np.ndarray:
        """int64 [N]: the 2 MB page in which each image begins."""
        pages = np.array([-(-length // PAGE_SIZE) for length in self._lengths])
        return self.file.offsets // PAGE_SIZE + np.repeat(np.cumsum(pages) - pages, self._counts)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each."""
        return self.heights[indices], self.widths[indices]

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.decode.Reader`. Releases the GIL; with Pillow, only while it decodes and crops."""
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        parts = self._part_of(indices)
        for rows in self._together(parts):
            given = indices[rows], parts[rows], boxes[rows], flips[rows], out[rows]
            row, status = self._crops(*given) if turbo.AVAILABLE else self._crop_with_pillow(*given)
            if status == turbo.UNREAD:
                self._stored(int(indices[rows.start + row]))  # raises the reason, if it still applies
                row, status = self._crops(*given)
            row += rows.start
            if status == turbo.WRONG_BOX:
                raise ValueError(f"boxes {boxes[row].tolist()} do not lie within image {indices[row]}")
            if status != turbo.DECODED:
                index = int(indices[row])
                why = f"can't be decoded ({self._reason(index)}); convert the set again"
                raise DamagedSample(row, index, f"{self._name(index)} {why}")

    def _together(self, parts: np.ndarray) -> Iterator[slice]:
        """Yield runs of rows that lie in few files: each thread keeps these files open while it reads."""
        start, seen = 0, set[int]()
        if not self._kept:
            most = max(1, most_open() // 8)
            for row, part in enumerate(parts.tolist()):
                if part not in seen and len(seen) == most:
                    yield slice(start, row)
                    start, seen = row, set()
                seen.add(part)
        yield slice(start, len(parts))

    def _crops(
        self, indices: np.ndarray, parts: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
    ) -> tuple[int, int]:
        """See `turbo.crop_stored`."""
        if self._kept:
            numbers = self._numbers[parts]
        else:
            held = {part: self._open.held(self._files[part]) for part in {*parts.tolist()}}
            numbers = np.array([held[part].number for part in parts.tolist()], np.int32)
        where = self.file.offsets[indices], self.file.sizes[indices], self.file.modes[indices]
        return turbo.crop_stored(numbers, turbo.Samples(*where, *self.sizes(indices)), boxes, flips, out)

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        stored = self._stored(index)
        if self.file.modes[index] == JPEG:
            return stored
        return np.frombuffer(stored, np.uint8).reshape(self.heights[index], self.widths[index], 3)

    def _part_of(self, indices: np.ndarray | int) -> np.ndarray:
        """The file in which each image lies, int64 [B]."""
        return np.searchsorted(self._ends, indices, side="right")

    def _name(self, index: int) -> str:
        part = int(self._part_of(index))
        return f"{self._files[part]}: sample {index - int(self._ends[part] - self._counts[part])}"

    def _stored(self, index: int) -> bytes:
        """The bytes of one image. Raises InputError if they can't be read, or if the file was cut short after
        it was opened. A file that was replaced or removed remains readable for the process that has it
        open."""
        part = int(self._part_of(index))
        file, size = self._files[part], int(self.file.sizes[index])
        try:
            stored = self._open.read(file, size, int(self.file.offsets[index]))
            found = self._open.size(file)
        except OSError as error:
            raise InputError(f"{self._name(index)} cannot be read ({error.strerror})") from error
        if len(stored) < size:
            raise InputError(
                f"{file}: was cut from {self._lengths[part]:,} to {found:,} bytes while it was read: restore "
                "it, or convert the set again"
            )
        return stored

    def _crop_with_pillow(
        self, indices: np.ndarray, _: np.ndarray, boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
    ) -> tuple[int, int]:
        """Does and returns the same as `turbo.crop_stored`."""
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
        """The decoder's message about a sample that failed."""
        try:
            self._pixels(index)
        except jpeg.DamagedImage as error:
            return str(error)
        return "damaged"
