"""Check a finished beton, tar or folder of tars against its manifest: every byte, and every image decoded.

The manifest has a digest for each image. All other bytes of the file (headers, tables, padding) follow from
the manifest's rows: they are generated again and compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.convert.conversion import Bar, OutputOptions
from pipelines.cores import cores
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import ALLOCATION, HEADER, JPEG, BetonWriter
from pipelines.formats.manifest import Samples, read_manifest
from pipelines.formats.openfiles import OpenFiles
from pipelines.formats.webdataset import END, TarLayout

ENTRY = ("mode", "height", "width", "bytes", "label")  # manifest columns that are also in a beton's tables


@dataclass
class Verdict:
    """`wrong` lists (index, name, reason) of each wrong image, by index; `elsewhere`, all other errors."""

    path: Path
    count: int
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.wrong and not self.elsewhere

    def __str__(self) -> str:
        if self.sound:
            return f"{self.path}: all {self.count:,} images are as they were written"
        parts = list(self.elsewhere)
        if self.wrong:
            index, name, reason = self.wrong[0]
            parts.append(
                f"{len(self.wrong):,} of {self.count:,} images wrong, the first: {index} ({name}): {reason}"
            )
        return f"{self.path}: " + "; ".join(parts)


@dataclass(frozen=True)
class _Region:
    """One image in a file, with the bytes that must precede and follow it."""

    index: int
    file: Path
    start: int
    before: bytes
    size: int
    after: bytes = b""


def verify(path: str | Path, workers: int | None = None, progress: bool = False) -> Verdict:
    """Read and check all of it. Raises InputError if it or its manifest can't be read."""
    OutputOptions(workers=workers).validate()
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    tars = path.is_dir() or path.suffix.lower() == ".tar"
    folder = path if path.is_dir() else path.parent
    manifest, rows = read_manifest(folder / "manifest.json" if tars else path.with_name(path.name + ".json"))
    verdict = Verdict(path, manifest["count"])
    files = OpenFiles()
    try:
        regions = (
            _of_tars(path, folder, manifest, rows, verdict, files)
            if tars
            else _of_beton(path, manifest, rows, verdict, files)
        )
        with Bar(total=manifest["count"], unit="img", disable=None if progress else True) as bar:
            for index, reason in _checked(regions, rows, files, workers or cores()):
                bar.update()
                if reason:
                    verdict.wrong.append((index, str(rows["name"][index]), reason))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError) as error:  # in what the manifest says
        raise InputError(f"{path}: its manifest isn't a conversion's, or damaged ({error!r})") from error
    first = {each[0]: each for each in reversed(verdict.wrong)}  # only the first error of each image
    verdict.wrong = [first[index] for index in sorted(first)]
    return verdict


def _checked(
    regions: Iterator[_Region], rows: Samples, files: OpenFiles, workers: int
) -> Iterator[tuple[int, str | None]]:
    """Yield (index, what is wrong) for each region, in order."""
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(regions, 512)):  # in portions: a million futures would take a gigabyte
            reasons = pool.map(lambda region: _check(region, rows, files), some)
            yield from zip((region.index for region in some), reasons)


def _check(region: _Region, rows: Samples, files: OpenFiles) -> str | None:
    """Return what is wrong with one image, or None."""
    before, after = len(region.before), len(region.after)
    data = files.read(region.file, before + region.size + after, region.start - before)
    if len(data) < before + region.size + after:
        return "the file ends before it"
    around = (0, region.before, "in front of"), (before + region.size, region.after, "behind")
    for start, expected, where in around:
        there = data[start : start + len(expected)]
        if there != expected:
            place = start + next(i for i, (a, b) in enumerate(zip(there, expected)) if a != b)
            return f"byte {region.start - before + place:,}, {where} the image itself, isn't what was written"
    image = data[before : before + region.size]
    if hashlib.sha256(image).hexdigest() != rows["sha256"][region.index]:
        return "its bytes aren't those that were written"
    size = rows["height"][region.index], rows["width"][region.index]
    try:
        if jpeg.is_jpeg(image) and rows["mode"][region.index] == JPEG:
            header = jpeg.read_header(image, jpeg.ANY_SIZE)
            jpeg.check(image, header)
            found = header.height, header.width
        elif image[:4] == b"\x89PNG":
            pixels = jpeg.open_with_pillow(image, most=jpeg.ANY_SIZE)
            found = pixels.height, pixels.width
        else:
            return None if len(image) == 3 * size[0] * size[1] else "it has another size than its pixels"
    except jpeg.DamagedImage as error:
        return f"it can't be decoded: {error}"
    return (
        None if found == size else f"it has {found[1]} x {found[0]} pixels instead of {size[1]} x {size[0]}"
    )


def _of_beton(
    path: Path, manifest: dict[str, Any], rows: Samples, verdict: Verdict, files: OpenFiles
) -> Iterator[_Region]:
    targets = manifest["targets"]
    writer = BetonWriter(None, manifest["count"] + len(manifest["refused"]), targets)
    starts = []
    for i in range(manifest["count"]):
        mode, height, width, size, label = (rows[name][i] for name in ENTRY)
        starts.append(writer.reserve(mode, height, width, size, label, [rows[name][i] for name in targets]))
    found = files.size(path)
    if found != writer.length:
        verdict.elsewhere.append(f"it has {found:,} bytes instead of {writer.length:,}")
    row_of_metadata = HEADER.itemsize + writer.fields.nbytes
    for address, data in writer.layout():
        there = files.read(path, len(data), address)
        if there == data:
            continue
        at = address + next((i for i, (a, b) in enumerate(zip(there, data)) if a != b), len(there))
        if at >= writer.position:
            index = (at - writer.position) // ALLOCATION.itemsize
        else:
            index = (at - row_of_metadata) // writer.metadata.itemsize
        if at < row_of_metadata:
            verdict.elsewhere.append(f"its header isn't what was written (byte {at})")
        else:
            verdict.wrong.append(
                (index, str(rows["name"][index]), f"its entry isn't what was written (byte {at:,})")
            )
    end = row_of_metadata + writer.metadata[: writer.count].nbytes
    for i, start in enumerate(starts):
        yield _Region(i, path, start, bytes(start - end), rows["bytes"][i])
        end = start + rows["bytes"][i]


def _of_tars(
    path: Path, folder: Path, manifest: dict[str, Any], rows: Samples, verdict: Verdict, files: OpenFiles
) -> Iterator[_Region]:
    layout = TarLayout(manifest["prefix"], manifest["images_per_tar"])
    wanted = None if path.is_dir() else path.name
    found = False
    if wanted is not None:
        verdict.count = 0
    file: Path | None = None

    def finish() -> None:
        name = layout.tar_name()
        if file is not None and (
            files.size(file) != layout.position + len(END)
            or files.read(file, len(END), layout.position) != END
        ):
            verdict.elsewhere.append(f"{name} doesn't end where it should")
        index = (folder / name).with_suffix(".idx")
        if wanted in (None, name) and (
            not index.is_file() or index.read_bytes() != layout.index_text().encode()
        ):
            verdict.elsewhere.append(f"{index.name} isn't what was written")

    for i in range(manifest["count"]):
        if layout.full():
            finish()
            layout.next_tar()
        if layout.position == 0:
            name, file = layout.tar_name(), None
            if wanted in (None, name):
                if not (folder / name).is_file():
                    raise InputError(f"{folder / name}: no such file")
                file = folder / name
                found = True
        start, size = layout.position, rows["bytes"][i]
        targets = {name: float(rows[name][i]) for name in manifest["targets"]}
        before, after = layout.reserve(rows["mode"][i], size, rows["label"][i], targets)
        if file is not None:
            verdict.count += wanted is not None
            yield _Region(i, file, start + len(before), before, size, after)
    finish()
    if not found and wanted is not None:
        raise InputError(f"{path}: not one of the tars of {folder / 'manifest.json'}")
