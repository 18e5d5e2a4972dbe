"""Where crops come from. A source decodes an image once and crops it as often as asked."""

from pathlib import Path
from typing import Protocol

import numpy as np

from pipelines.errors import InputError

SOURCES = ("auto", "ffcv", "folder", "dali")


class Source(Protocol):
    """What the loader needs of a data set. Indices are positions in the set, stable over epochs."""

    labels: np.ndarray  # int64 [N]
    classes: list[str] | None  # the names of the labels; None where they aren't known
    pages: np.ndarray  # int64 [N], samples that are stored beside each other have the same number
    chunk: int  # images that a call of crops takes best

    def __len__(self) -> int: ...

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""

    def stored(self, row: int, index: int) -> bytes | np.ndarray:
        """One image as it is stored: a file's bytes, or pixels uint8. Raises DamagedSample with `row`."""

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """Fill out uint8 [B, V, R, R, 3] with boxes int32 [B, V, 4] of samples indices int64 [B].

        Boxes are top, left, height, width, within the image; flips bool [B, V] mirrors crops. Called from
        several threads at once. Raises DamagedSample for the first sample, by row, that can't be decoded.
        """


IN_CACHE = 4  # images whose crops are augmented before they have left the second-level cache


class DamagedSample(InputError):
    """A sample that can't be decoded: row of the call, index in the set, and the message for the user."""

    def __init__(self, row: int, index: int, message: str):
        super().__init__(message)
        self.row, self.index = row, index


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
    if kind == "auto":
        kind = "folder" if _holds_images(Path(path)) else "ffcv"
    if kind == "folder":
        if Path(path).suffix == ".beton":
            raise InputError(f"{path}: a .beton is what --source ffcv reads, or auto")
        from pipelines.sources.folder import FolderSource

        return FolderSource(path)
    from pipelines.sources.ffcv import FFCVSource  # here: numba takes a second to load

    return FFCVSource(path)


def _holds_images(path: Path) -> bool:
    """Whether these are images as they are: a folder, tars, a table of them, or torchvision:NAME."""
    if path.is_dir() or path.suffix == ".beton":
        return path.is_dir()
    return path.suffix in (".tar", ".parquet", ".csv", ".jsonl") or bool({"{", ":"} & {*str(path)})
