"""Where crops come from. A source decodes an image once and crops it as often as asked."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.sources.files import open_files
from pipelines.sources.source import DamagedSample, Source

__all__ = ["SOURCES", "DamagedSample", "Source", "open_source"]

SOURCES = ("auto", "ffcv", "folder", "dali")


def open_source(path: str | Path, kind: str = "auto", device: str = "cpu") -> Source:
    """The source that reads `path`.

    Args:
        kind: `ffcv` for a .beton; `folder` for images as they are, loose, in class folders, in tars or
            whatever else `convert-beton` reads; `dali` for any of these; `auto`: ffcv or folder.
        device: what DALI decodes on, cpu, cuda or cuda:1 ...; the others know the CPU alone.

    Raises:
        InputError: nothing there that the source can read, or what it needs isn't installed.
    """
    if kind not in SOURCES:
        raise InputError(f"unknown source {kind!r}; one of {', '.join(SOURCES)}")
    if kind == "dali":
        from pipelines.sources.dali import DALISource

        what, _, index = device.partition(":")
        return DALISource(path, "gpu" if what == "cuda" else "cpu", device_id=int(index or 0))
    return open_files(path, kind)
