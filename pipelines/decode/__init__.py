"""Sources of crops: readers that decode each image once and crop it as often as asked."""

from pathlib import Path

from pipelines.decode.on_cpu import open_files
from pipelines.decode.reader import DamagedSample, Reader
from pipelines.errors import InputError

__all__ = ["SOURCES", "DamagedSample", "Reader", "open_reader"]

SOURCES = ("auto", "beton", "folder", "dali", "nvjpeg")


def open_reader(path: str | Path, kind: str = "auto", device: str = "cpu") -> Reader:
    """Open the reader for `path`.

    Args:
        kind: `beton` for a .beton; `folder` for image files, whether loose, in class folders, in tars or in
            anything else that `convert-beton` reads; `dali` or `nvjpeg` for any of these; `auto`: beton or
            folder.
        device: the device that DALI and nvJPEG decode on: cpu, cuda, cuda:1 ...; the others only use the CPU.

    Raises:
        InputError: `path` has nothing that the reader can read, or a library that it needs isn't installed.
    """
    if kind not in SOURCES:
        raise InputError(f"unknown source {kind!r}; one of {', '.join(SOURCES)}")
    if kind == "dali":
        from pipelines.decode.dali import DALIReader

        return DALIReader(path, device)
    if kind == "nvjpeg":
        if not device.startswith("cuda"):
            raise InputError(f"--source nvjpeg decodes on a GPU, not on {device}: use --source auto")
        from pipelines.decode.nvjpeg import NvjpegReader

        return NvjpegReader(path, device)
    return open_files(path, kind)
