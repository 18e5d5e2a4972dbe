"""What a source of crops is, and how it speaks of a damaged sample."""

from typing import Protocol

import numpy as np

from pipelines.errors import InputError


class Reader(Protocol):
    """What the loader needs of a data set. Indices are positions in the set, stable over epochs."""

    labels: np.ndarray  # int64 [N]
    classes: list[str] | None  # the names of the labels; None where they aren't known
    pages: np.ndarray  # int64 [N], samples that are stored beside each other have the same number
    chunk: int  # images that a call of crops takes best

    def __len__(self) -> int: ...

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
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
