"""Where crops come from. A source decodes an image once and crops it as often as asked."""

from pathlib import Path

from pipelines.decode.on_cpu import open_files
from pipelines.decode.reader import DamagedSample, Reader
from pipelines.errors import InputError

__all__ = ["SOURCES", "DamagedSample", "Reader", "open_reader"]

SOURCES = ("auto", "beton", "folder", "dali")


def open_reader(path: str | Path, kind: str = "auto", device: str = "cpu") -> Reader:
    """The source that reads `path`.

    Args:
        kind: `beton` for a .beton; `folder` for images as they are, loose, in class folders, in tars or
            whatever else `convert-beton` reads; `dali` for any of these; `auto`: beton or folder.
        device: what DALI decodes on, cpu, cuda or cuda:1 ...; the others know the CPU alone.

    Raises:
        InputError: nothing there that the source can read, or what it needs isn't installed.
    """
    if kind not in SOURCES:
        raise InputError(f"unknown source {kind!r}; one of {', '.join(SOURCES)}")
    if kind == "dali":
        from pipelines.decode.dali import DALIReader

        what, _, index = device.partition(":")
        return DALIReader(path, "gpu" if what == "cuda" else "cpu", device_id=int(index or 0))
    return open_files(path, kind)
