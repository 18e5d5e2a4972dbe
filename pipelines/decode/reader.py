"""The interface of a source of crops, and the error that it raises for a damaged sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipelines.errors import InputError

if TYPE_CHECKING:  # not every reader needs torch
    from torch import Tensor


class Reader(Protocol):
    """What the loader needs from a data set. Indices are positions in the set, the same in every epoch."""

    labels: np.ndarray  # int64 [N]
    classes: list[str] | None  # names of the labels; None if unknown
    chunk: int  # preferred number of images per call of crops
    device: str  # where crops are made: cpu or cuda:N

    def __len__(self) -> int: ...

    def storage_blocks(self) -> np.ndarray:
        """int64 [N]: samples that are stored next to each other have the same number."""

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """One image as it is stored: a file's bytes, or uint8 pixels. Raises DamagedSample with `row`."""

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: Any, flips: np.ndarray | None = None
    ) -> None:
        """Fill out uint8 [B, V, R, R, 3] with the boxes int32 [B, V, 4] of the samples indices int64 [B].

        `out` is an array, or, where `device` is a GPU, a tensor there, which is filled on its current stream.
        Boxes are top, left, height, width, within the image; flips bool [B, V] mirrors crops. Called from
        several threads at once. Raises DamagedSample for the first sample, by row, that can't be decoded.
        """


IN_CACHE = 4  # images per call, so that their crops are augmented while still in the L2 cache


class DamagedSample(InputError):
    """A sample that can't be decoded: row in the call, index in the set, and message for the user."""

    def __init__(self, row: int, index: int, message: str):
        super().__init__(message)
        self.row, self.index = row, index


def put(crops: Tensor, out: np.ndarray | Tensor, rows: list[int]) -> None:
    """Copy crops uint8 [B, V, R, R, 3] into rows of `out`, on any devices; the copy is complete on return."""
    if isinstance(out, np.ndarray):
        out[rows] = crops.cpu().numpy()
        return
    if len(rows) == len(out):
        out.copy_(crops)
    else:
        for crop, row in zip(crops, rows):
            out[row].copy_(crop)
    if out.is_cuda:
        import torch

        torch.cuda.current_stream(out.device).synchronize()
