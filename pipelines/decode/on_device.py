"""JPEGs of another source, decoded and cropped on a GPU: the part that DALI and nvJPEG have in common.

The bytes come from WebDataset tars, a .beton or a folder by index, so that all sources share indices, labels,
order and boxes; the libraries' own readers would impose an order that can't be resumed. Anything but a sound,
upright JPEG in RGB or grey is decoded by the base source on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.decode.on_cpu import open_files
from pipelines.decode.reader import DamagedSample, put
from pipelines.errors import InputError, first_line
from pipelines.formats import jpeg

BATCH = 64  # images decoded together; larger calls are split


class DeviceReader(ABC):
    """Encoded images as a source of crops made on `device`; they are copied to the host only if asked for.

    Attributes:
        decoder: name of the decoder. device: cpu or cuda:N. base: the source of the bytes. labels: int64 [N].
        targets: {name: float64 [N]}. classes: names of the labels, or None.
    """

    chunk = BATCH
    decoder: str

    def __init__(self, path: str | Path, device: str = "cpu"):
        """Open tars, a .beton or a folder; `device`: cpu, cuda, cuda:1 ... Raises InputError."""
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu, cuda or cuda:N, got {device!r}")
        self.device = f"cuda:{number or 0}" if kind == "cuda" else "cpu"
        self.base = open_files(path)
        self.labels, self.classes = self.base.labels, self.base.classes
        self.targets = getattr(self.base, "targets", {})
        self._sound = np.zeros(len(self.labels), bool)

    def __len__(self) -> int:
        return len(self.base)

    def storage_blocks(self) -> np.ndarray:
        """int64 [N], see `pipelines.decode.Reader`."""
        return self.base.storage_blocks()

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""
        return self.base.sizes(indices)

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        return self.base.encoded(row, index)

    def crops(
        self,
        indices: np.ndarray,
        boxes: np.ndarray,
        out: np.ndarray | Tensor,
        flips: np.ndarray | None = None,
    ) -> None:
        """See `pipelines.decode.Reader`. Returns when the crops are made and no work is left."""
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        sizes = np.stack(self.sizes(indices), axis=1)
        corner = boxes[..., :2] + boxes[..., 2:]
        if (boxes[..., :2] < 0).any() or (boxes[..., 2:] < 1).any() or (corner > sizes[:, None]).any():
            raise ValueError("boxes do not lie within their images")
        rows, files = [], []
        for row, index in enumerate(indices.tolist()):
            data = self.encoded(row, index)
            if isinstance(data, bytes) and self._is_plain(index, data, sizes[row]):
                rows.append(row)
                files.append(data)
            else:
                self._by_base(row, indices, boxes, out, flips)
        with torch.cuda.device(self.device) if self.device != "cpu" else nullcontext():
            for first in range(0, len(rows), BATCH):
                some = rows[first : first + BATCH]
                try:
                    made = self._made(files[first : first + BATCH], boxes[some], flips[some], out.shape[2])
                except RuntimeError as error:
                    raise InputError(
                        f"--source {self.decoder}: one of the images {indices[some].tolist()} can't be "
                        f"decoded on {self.device} ({first_line(error)}): use --source auto"
                    ) from error
                put(made, out, some)

    def _by_base(
        self, row: int, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray | Tensor, flips: np.ndarray
    ) -> None:
        one, room = slice(row, row + 1), np.empty((1, *out.shape[1:]), np.uint8)
        try:
            self.base.crops(indices[one], boxes[one], room, flips[one])
        except DamagedSample as sample:
            raise DamagedSample(row, int(indices[row]), str(sample)) from sample
        put(torch.from_numpy(room), out, [row])

    def _is_plain(self, index: int, data: bytes, size: np.ndarray) -> bool:
        """Whether the library can decode it: a sound, upright JPEG in RGB or grey, of the size that the set
        states. libjpeg-turbo checks each JPEG the first time, in some 0.4 ms, because the libraries return
        grey blocks for damaged data, without an error."""
        if not jpeg.is_jpeg(data):
            return False
        try:
            header = jpeg.read_header(data)
            if not self._sound[index]:
                jpeg.check(data, header)
                self._sound[index] = True
        except jpeg.DamagedImage:
            return False  # the base source reports what is wrong
        fits = (header.height, header.width) == tuple(size)
        return fits and header.is_rgb_or_grey and header.orientation == 1

    @abstractmethod
    def _made(self, files: list[bytes], boxes: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        """Crops of 1 to BATCH JPEGs: uint8 [B, V, R, R, 3] on `device`; all their inputs may be freed on
        return. Called from several threads at once, each on its current stream."""
