"""FFCV's file format, version 2: a writer and a checked reader of the layout, with NumPy only.

A beton is, from its first byte:

    header         24 bytes          version, field count, page size, sample count, address of the table
    field          1,041 bytes each  type id, name, 1,024 bytes of arguments (none for our fields)
    metadata       24 bytes each     image {mode, width, height, data_ptr}, padding, label; 8 more per target
    pages          the images        no image crosses a multiple of the page size
    table          24 bytes each     {sample id, ptr, size} of each image

The stock `ffcv.loader.Loader` reads what `BetonWriter` writes. FFCV's own writer isn't used, because it polls
worker processes without ever checking them, so that one bad image makes it hang for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.errors import InputError

VERSION = 2
JPEG, RAW = 0, 1  # values of an image's mode
PAGE_SIZE = 1 << 21  # FFCV's smallest; doubled if an image is larger
LARGEST_PAGE_SIZE = 1 << 31  # the header stores it as u4
GATHERED, MOST_GATHERED = 1 << 20, 512  # bytes and images per system call
ROWS = 65_536  # of the table, built at a time
LONGEST_SIDE = 65_535  # width and height are u2
NO_LABEL = -1  # label of every image of an unlabelled set

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

COLUMNS = ("modes", "heights", "widths", "labels", "offsets", "sizes")  # columns of a BetonFile

FLOAT_FIELD, INT_FIELD, IMAGE_FIELD = 0, 1, 2
LONGEST_NAME = 16  # bytes, of a field
_SPAN = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# FFCV's type id -> (dtype of one sample's metadata, whether it has a row in the table)
FIELD_TYPES: dict[int, tuple[np.dtype, bool]] = {
    FLOAT_FIELD: (np.dtype("<f8"), False),
    INT_FIELD: (np.dtype("<i8"), False),
    IMAGE_FIELD: (IMAGE, True),
    3: (_SPAN, True),  # bytes
    4: (np.dtype("<u8"), True),  # array
    5: (_SPAN, True),  # JSON
    6: (np.dtype("<u8"), True),  # torch tensor
}


@dataclass(frozen=True)
class BetonFile:
    """The location of everything in a beton. Arrays have one entry per sample (N in all), in file order."""

    path: Path
    count: int
    modes: np.ndarray  # u1 [N], JPEG or RAW
    heights: np.ndarray  # int64 [N], pixels
    widths: np.ndarray  # int64 [N], pixels
    labels: np.ndarray  # int64 [N]
    offsets: np.ndarray  # int64 [N], first byte of the image in the file
    sizes: np.ndarray  # int64 [N], bytes of the image; RAW holds height * width * 3
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # float64 [N] for each FloatField


def open_beton(path: str | Path) -> BetonFile:
    """Read and check the layout of a beton with the fields `image` and `label`, without reading pixels.

    Raises InputError if the file doesn't exist, isn't a beton of version 2, is shorter than its tables state,
    has contradictory tables, or lacks a field or has it with another type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a beton' if path.is_dir() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            return _read_layout(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def count_in(path: Path) -> int:
    """The number of images in a beton, from its header alone. Raises like `open_beton`, and OSError."""
    with open(path, "rb") as file:
        return int(_Layout(path, file, os.fstat(file.fileno()).st_size).header()["num_samples"])


@dataclass(frozen=True)
class _Layout:
    """A beton that is being read; the locations in it follow from the sizes in its header."""

    path: Path
    file: IO[bytes]
    size: int  # of the file in bytes

    def read(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        if self.file.tell() + dtype.itemsize * count > self.size:
            raise InputError(
                f"{self.path}: truncated in its {what} ({self.size:,} bytes are left); convert it again"
            )
        return np.fromfile(self.file, dtype, count)

    def header(self) -> np.void:
        """Read the header and check its page size, version and table."""
        path, size = self.path, self.size
        if size < HEADER.itemsize:
            raise InputError(f"{path}: not a beton ({size} bytes are too few for its header)")
        header = self.read(HEADER, 1, "header")[0]
        page_size, table_start = int(header["page_size"]), int(header["alloc_table_ptr"])
        if header["version"] != VERSION or page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise InputError(f"{path}: not a beton of FFCV's format version {VERSION}")
        if table_start == 0:
            raise InputError(f"{path}: was never finished by its writer; convert it again")
        if table_start > size:
            raise InputError(
                f"{path}: truncated, {size:,} of more than {table_start:,} bytes are left; convert it again"
            )
        return header

    def fields(self, count: int) -> dict[str, int]:
        """The type of each field by name, in file order."""
        path, fields = self.path, self.read(FIELD, count, "field list")
        names = [bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace") for field in fields]
        types = [int(field["type_id"]) for field in fields]
        for wanted, type_id, kind in (("image", IMAGE_FIELD, "RGB image"), ("label", INT_FIELD, "integer")):
            if wanted not in names:
                raise InputError(f"{path}: has no field '{wanted}' (only {', '.join(names) or 'none'})")
            if types[names.index(wanted)] != type_id:
                raise InputError(f"{path}: its field '{wanted}' is not FFCV's {kind} field")
        for name, type_id in zip(names, types):
            if type_id not in FIELD_TYPES:
                raise InputError(f"{path}: its field '{name}' is of an unknown kind (type id {type_id})")
        return dict(zip(names, types))

    def table(self, start: int, rows: int) -> np.ndarray:
        """The allocation table, at the end of the file."""
        if self.size - start != rows * ALLOCATION.itemsize:
            raise InputError(
                f"{self.path}: truncated or damaged, its table has {self.size - start:,} bytes instead of "
                f"{rows * ALLOCATION.itemsize:,}; convert it again"
            )
        self.file.seek(start)
        return self.read(ALLOCATION, rows, "table")


def _read_layout(path: Path, file: IO[bytes], size: int) -> BetonFile:
    layout = _Layout(path, file, size)
    header = layout.header()
    count, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    types = layout.fields(int(header["num_fields"]))
    metadata = layout.read(_metadata_dtype(list(types.values())), count, "metadata")
    metadata_end = file.tell()
    table = layout.table(table_start, count * sum(FIELD_TYPES[type_id][1] for type_id in types.values()))
    column = {name: metadata[f"f{i}"] for i, name in enumerate(types)}
    image = column["image"]
    return BetonFile(
        path=path,
        count=count,
        modes=image["mode"].copy(),
        heights=image["height"].astype(np.int64),
        widths=image["width"].astype(np.int64),
        labels=column["label"].astype(np.int64),
        offsets=image["data_ptr"].astype(np.int64),
        sizes=_image_sizes(path, image, table, metadata_end, table_start),
        targets={
            name: column[name].astype(np.float64) for name, type_id in types.items() if type_id == FLOAT_FIELD
        },
    )


def _image_sizes(path: Path, image: np.ndarray, table: np.ndarray, start: int, end: int) -> np.ndarray:
    """Size of each image in bytes, u8 [N], looked up by address; every image must lie within [start, end)."""
    if len(image) == 0:
        raise InputError(f"{path}: holds no image; convert it again")
    table = table[np.argsort(table["ptr"], kind="stable")]
    rows = np.minimum(np.searchsorted(table["ptr"], image["data_ptr"]), len(table) - 1)
    ptr, size = table["ptr"][rows], table["size"][rows]
    pixels = 3 * image["height"].astype(np.uint64) * image["width"]
    wrong = (ptr != image["data_ptr"]) | (ptr < start) | (ptr > end) | (size > np.uint64(end) - ptr)
    wrong |= (size == 0) | (image["mode"] > RAW) | (pixels == 0) | ((image["mode"] == RAW) & (size != pixels))
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(f"{path}: damaged, the entry of image {first} contradicts itself; convert it again")
    return size.astype(np.int64)


def _metadata_dtype(type_ids: list[int]) -> np.dtype:
    """The metadata of one sample, with fields named f0, f1 ... and padded like FFCV's."""
    return np.dtype([(f"f{i}", FIELD_TYPES[type_id][0]) for i, type_id in enumerate(type_ids)], align=True)


class BetonWriter:
    """Writes images one after the other; the bytes only depend on `capacity` and on what is added.

    `capacity` is the largest number of images that may be added: space for their metadata is reserved before
    the images. `targets` are names of regression targets, each stored as an FFCV FloatField, see
    `field_names`. The file is only valid after `finish`.
    """

    def __init__(self, file: IO[bytes] | None, capacity: int, targets: Sequence[str] = ()):
        self.file = file
        self.count = 0
        self.page_size = PAGE_SIZE
        names = [b"image", b"label", *field_names(targets)]
        types = [IMAGE_FIELD, INT_FIELD, *[FLOAT_FIELD] * len(targets)]
        self.fields = np.zeros(len(names), FIELD)
        for row, name, type_id in zip(self.fields, names, types):
            row["type_id"] = type_id
            row["name"][: len(name)] = np.frombuffer(name, np.uint8)
        self.metadata = np.zeros(capacity, _metadata_dtype(types))
        self.sizes = np.zeros(capacity, np.uint32)  # bytes of each image
        self._gathered: list[bytes | memoryview] = []  # images not written yet, one after the other
        self._gathered_bytes = 0
        self.position = HEADER.itemsize + self.fields.nbytes + self.metadata.nbytes

    def add(
        self,
        mode: int,
        height: int,
        width: int,
        data: bytes | memoryview,
        label: int,
        targets: Sequence[float] = (),
    ) -> None:
        """Append one image: the bytes of a JPEG file, or (RAW) height * width * 3 bytes of RGB."""
        end = self.position
        if self.reserve(mode, height, width, len(data), label, targets) != end:
            self._write_gathered(end)
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes > GATHERED or len(self._gathered) == MOST_GATHERED:
            self.flush()

    def flush(self) -> None:
        """Pass the images added so far to the operating system."""
        self._write_gathered(self.position)

    def _write_gathered(self, end: int) -> None:
        """Write all in one call, which takes three quarters of the time of one call per image."""
        assert self.file is not None
        at, number = end - self._gathered_bytes, self.file.fileno()
        if self._gathered:
            written = os.pwritev(number, self._gathered, at)
            while written < end - at:  # cut short by a signal, or by a full disk, which the next call reports
                written += os.pwrite(number, b"".join(self._gathered)[written:], at + written)
        self._gathered, self._gathered_bytes = [], 0

    def reserve(
        self, mode: int, height: int, width: int, size: int, label: int, targets: Sequence[float] = ()
    ) -> int:
        """Enter one image into the tables, and return the address for its bytes."""
        start = self._place(size)
        sample = self.metadata[self.count]
        sample["f0"] = (mode, width, height, start)
        sample["f1"] = label
        for i, value in enumerate(targets):
            sample[f"f{i + 2}"] = value
        self.sizes[self.count] = size
        self.position = start + size
        self.count += 1
        return start

    def _place(self, size: int) -> int:
        """The next address from which `size` bytes don't cross a page boundary.

        FFCV needs images within a page if it caches pages itself (`os_cache=False`). Doubling the page size
        keeps earlier images valid, since a multiple of the larger size is one of the smaller. Raises
        InputError if the image is larger than the largest page.
        """
        while size > self.page_size:
            self.page_size *= 2
        if self.page_size > LARGEST_PAGE_SIZE:
            raise InputError(f"an image of {size:,} bytes is too large for a beton; set --max-resolution")
        room = self.page_size - self.position % self.page_size
        return self.position if size <= room else self.position + room

    @property
    def length(self) -> int:
        """Size of the whole file in bytes; the allocation table comes last."""
        return self.position + self.count * ALLOCATION.itemsize

    def layout(self) -> Iterator[tuple[int, memoryview]]:
        """Everything except the images, as (address, bytes); the header, which makes it valid, comes last."""
        for start in range(0, self.count, ROWS):
            rows = np.arange(start, min(start + ROWS, self.count))
            table = np.zeros(len(rows), ALLOCATION)
            table["sample_id"], table["size"] = rows, self.sizes[rows]
            table["ptr"] = self.metadata["f0"]["data_ptr"][rows]
            yield self.position + start * ALLOCATION.itemsize, _bytes_of(table)
        yield HEADER.itemsize, _bytes_of(self.fields)
        yield HEADER.itemsize + self.fields.nbytes, _bytes_of(self.metadata[: self.count])
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, len(self.fields), self.page_size, self.count, self.position)
        yield 0, _bytes_of(header)

    def finish(self) -> None:
        """Write the table, the metadata and finally the header."""
        assert self.file is not None
        self.flush()
        for address, data in self.layout():
            written = 0
            while written < len(data):
                written += os.pwrite(self.file.fileno(), data[written:], address + written)


def field_names(targets: Sequence[str]) -> list[bytes]:
    """Field names of targets; a name that is too long, or not ASCII, is replaced by one with its number."""
    fit = [name.encode() if name.isascii() and len(name) <= LONGEST_NAME else b"" for name in targets]
    return [name or b"target_%d" % number for number, name in enumerate(fit)]


def named_targets(beton: BetonFile, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The targets of a file under the names in its manifest, in the same order."""
    if len(names) != len(beton.targets):
        return beton.targets
    return dict(zip(names, beton.targets.values()))


def columns_of(parts: Sequence[BetonFile]) -> dict[str, np.ndarray]:
    """The columns of all parts together, [N] each, and "counts", int64 [parts]. Offsets refer to each image's
    own file; a target is named by "target-" and its number."""

    def joined(columns: list[np.ndarray]) -> np.ndarray:
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    columns = {name: joined([getattr(part, name) for part in parts]) for name in COLUMNS}
    for number, name in enumerate(parts[0].targets):
        columns[f"target-{number}"] = joined([part.targets[name] for part in parts])
    return columns | {"counts": np.array([part.count for part in parts])}


def _bytes_of(rows: np.ndarray) -> memoryview:
    return rows.view(np.uint8).data if len(rows) else memoryview(b"")
