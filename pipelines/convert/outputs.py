"""The two output formats of a conversion: each is written aside, resumes after a kill, and is then renamed.

A conversion calls prepare, then replay for each image in the journal, cut, add for each further image,
finish and publish. `flushed` may be called at any time in between.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipelines.convert.store import Stored
from pipelines.files import sync
from pipelines.formats.beton import VERSION, BetonWriter
from pipelines.formats.manifest import rows_path
from pipelines.formats.webdataset import END, TarLayout


@dataclass(frozen=True)
class Item:
    """What an output stores about an image besides its bytes."""

    label: int
    targets: dict[str, float] = field(default_factory=dict)


class BetonOutput:
    """One file, with its manifest OUT.beton.json next to it."""

    as_png = False  # pixels are stored raw

    def __init__(self, final: Path, capacity: int, targets: Sequence[str] = ()):
        self.final = final
        self.part = self.aside(final)
        self.manifest = final.with_name(final.name + ".json")
        self.capacity, self.targets = capacity, list(targets)
        self.file: IO[bytes] | None = None

    def describe(self) -> dict[str, Any]:
        return {"format": "beton", "format_version": VERSION}

    def bytes_written(self) -> int:
        return self.writer.length

    def aside(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.part")

    def prepare(self) -> None:
        self.file = open(self.part, "r+b" if self.part.exists() else "w+b", buffering=0)  # noqa: SIM115
        self.writer = BetonWriter(self.file, self.capacity, self.targets)

    def replay(self, item: Item, record: np.void) -> None:
        where = int(record["mode"]), int(record["height"]), int(record["width"]), int(record["size"])
        self.writer.reserve(*where, item.label, list(item.targets.values()))

    def cut(self) -> None:
        assert self.file is not None
        self.file.truncate(self.writer.position if self.writer.count else 0)

    def add(self, item: Item, stored: Stored) -> None:
        values = list(item.targets.values())
        self.writer.add(stored.mode, stored.height, stored.width, stored.data, item.label, values)

    def flushed(self) -> list[int]:
        """Descriptors of the files written since the last call, for the caller to sync and close."""
        if self.file is None:
            return []
        self.writer.flush()
        return [os.dup(self.file.fileno())]

    def finish(self) -> None:
        self.writer.finish()

    def changed(self) -> str | None:
        """How the finished file, apart from its images, differs from what was written; None if it doesn't."""
        assert self.file is not None
        number = self.file.fileno()
        if not (self.part.exists() and os.path.samestat(os.fstat(number), os.stat(self.part))):
            return "it was removed or replaced"
        if os.fstat(number).st_size != self.writer.length:
            return f"it has {os.fstat(number).st_size:,} bytes instead of {self.writer.length:,}"
        tables_differ = any(os.pread(number, len(d), at) != d for at, d in self.writer.layout())
        return "its tables differ" if tables_differ else None

    def stored(self, place: int) -> bytes:
        """The bytes of one image in the finished file."""
        assert self.file is not None
        start, size = int(self.writer.metadata["f0"]["data_ptr"][place]), int(self.writer.sizes[place])
        return os.pread(self.file.fileno(), size, start)

    def publish(self) -> None:
        self.close()
        if self.part.exists():
            os.replace(self.part, self.final)

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # full disk: the content of its buffer isn't in the journal
                self.file.close()
            self.file = None

    def remove(self) -> None:
        """Remove everything that an unfinished conversion has left."""
        self.close()
        for path in (self.part, self.aside(rows_path(self.manifest)), self.aside(self.manifest)):
            with suppress(OSError):  # it doesn't exist, or its folder never did
                path.unlink()


class TarOutput:
    """A folder with tars, an index for each, and manifest.json, written in a folder next to it. The bytes of
    the tars depend only on the images that are added."""

    as_png = True

    def __init__(self, final: Path, prefix: str, images_per_tar: int):
        self.final = final
        self.part = final.with_name(f".{final.name}.part")
        self.manifest = final / "manifest.json"
        self.prefix, self.images_per_tar = prefix, images_per_tar
        self.index: tuple[int, list[str]] = -1, []  # of the tar that `stored` read last
        self.file: IO[bytes] | None = None

    def describe(self) -> dict[str, Any]:
        return {"format": "webdataset", "prefix": self.prefix, "images_per_tar": self.images_per_tar}

    def bytes_written(self) -> int:
        return sum(path.stat().st_size for path in self.part.glob(f"{self.prefix}-*.tar"))

    def aside(self, path: Path) -> Path:
        return self.part / path.name

    def prepare(self) -> None:
        self.part.mkdir(exist_ok=True)
        self.layout = TarLayout(self.prefix, self.images_per_tar)
        self.finished: list[tuple[str, int]] = []  # name and bytes of each complete tar

    def replay(self, item: Item, record: np.void) -> None:
        if self.layout.full():
            self._finish_tar()
        self.layout.reserve(int(record["mode"]), int(record["file_size"]), item.label, item.targets)

    def cut(self) -> None:
        """Remove what the journal doesn't have, such as tars of another conversion into this folder, whose
        journal is elsewhere; `_open` truncates the last tar that it has."""
        known = {Path(name).with_suffix(end).name for name, _ in self.finished for end in (".tar", ".idx")}
        known |= {self.layout.tar_name()} if self.layout.index else set()
        for path in self.part.iterdir():
            if path.name not in known:
                path.unlink()

    def add(self, item: Item, stored: Stored) -> None:
        if self.layout.full():
            self._finish_tar()
        file = self._open()
        before, after = self.layout.reserve(stored.mode, len(stored.file), item.label, item.targets)
        for part in (before, stored.file, after):
            file.write(part)

    def flushed(self) -> list[int]:
        if self.file is None:  # earlier tars were synced when they were full
            return []
        self.file.flush()
        return [os.dup(self.file.fileno())]

    def _open(self) -> IO[bytes]:
        """The tar that is being filled, positioned at its end."""
        if self.file is None:
            path = self.part / self.layout.tar_name()
            self.file = open(path, "r+b" if path.exists() else "w+b", buffering=1 << 20)  # noqa: SIM115
            self.file.truncate(self.layout.position)
            self.file.seek(self.layout.position)
        return self.file

    def _finish_tar(self) -> None:
        file, name = self._open(), self.layout.tar_name()
        file.write(END)
        self.finished.append((name, file.tell()))
        sync(file)
        self.close()
        with open((self.part / name).with_suffix(".idx"), "wb") as index:
            index.write(self.layout.index_text().encode())
            sync(index)
        self.layout.next_tar()

    def finish(self) -> None:
        self._finish_tar()

    def changed(self) -> str | None:
        """How the finished tars, apart from their images, differ from what was written; None if equal."""
        for name, size in self.finished:
            path = self.part / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} isn't as long as it was"
        return None

    def stored(self, place: int) -> bytes:
        """The bytes of one image in the finished tars."""
        number, row = divmod(place, self.images_per_tar)
        path = self.part / self.finished[number][0]
        if self.index[0] != number:  # images are read in the order of the tars
            self.index = number, path.with_suffix(".idx").read_text().splitlines()[1:]
        _, start, size, *_ = self.index[1][row].split(" ")
        with open(path, "rb") as file:
            return os.pread(file.fileno(), int(size), int(start))

    def publish(self) -> None:
        self.close()
        old = self.final.with_name(f".{self.final.name}.old")
        if self.part.exists():
            if self.final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.final, old)
            os.replace(self.part, self.final)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.part, ignore_errors=True)


def is_of_tars(name: str) -> bool:
    """Whether a file in a folder of tars may be from a conversion, by its name."""
    manifest = Path("manifest.json")
    return name.endswith((".tar", ".idx")) or name in (manifest.name, rows_path(manifest).name)


Output = BetonOutput | TarOutput
