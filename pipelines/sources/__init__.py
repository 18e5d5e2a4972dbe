"""Where crops come from. A source decodes an image once and crops it as often as asked."""

from pathlib import Path
from typing import Protocol

import numpy as np


class Source(Protocol):
    """What the loader needs of a data set. Indices are positions in the set, stable over epochs."""

    labels: np.ndarray  # int64 [N]
    heights: np.ndarray  # int64 [N], true sizes in pixels
    widths: np.ndarray

    def __len__(self) -> int: ...

    def crops(self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray) -> None:
        """Fill out uint8 [B, V, R, R, 3] with boxes int32 [B, V, 4] of samples indices int64 [B].

        Called from several threads at once. Raises InputError with index and file for a damaged sample.
        """


def open_source(path: str | Path) -> Source:
    """The source that reads `path` (a .beton)."""
    from pipelines.sources.ffcv import FFCVSource  # here, because it needs FFCV

    return FFCVSource(path)
