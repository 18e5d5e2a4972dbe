"""Crops by DALI, from the JPEGs of another source: decoded once, where our boxes lie, and cropped there.

Bytes come from our WebDataset tars by their indices, from a .beton or from a folder, so that all sources
share indices, labels, order and boxes; DALI's own readers would bring an order of their own, which can't be
resumed. `decoders.image_slice` decodes the smallest rectangle that holds all of an image's boxes, each is
then a slice of it. With device="gpu" the decoder is nvJPEG (DALI's "mixed"), slices, resizes and flips run on
the GPU, and the crops come back to the host, where the loader makes batches. With "cpu" all stays here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.decode.on_cpu import open_files
from pipelines.decode.reader import DamagedSample
from pipelines.errors import InputError
from pipelines.formats import jpeg

BATCH = 64  # the most that a pipeline is built for; larger calls are cut


class DALIReader:
    """Encoded images as a source of crops.

    On a CPU, pixels are the other sources' but where a shrunken crop ends: there DALI repeats the border
    pixels, as OpenCV does, where torchvision leaves them out. 400 crops of ImageNet, measured: at 224 px a
    mean difference of 0.001 levels, at most 9; at 32 px 0.14, at most 23, one value in a thousand above 10.
    nvJPEG's may differ by more: not measured.

    Attributes:
        base: the source of the bytes. labels, pages: int64 [N]. targets: float64 [N] each, by name.
        classes: names of the labels, or None.
    """

    chunk = BATCH

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        threads: int = 1,
        check: bool = True,
        device_id: int = 0,
    ):
        """Open tars, a .beton or a folder.

        Args:
            device: `cpu` or `gpu`. threads: of each pipeline; there are as many as calls of `crops` at once.
            check: hold each JPEG against libjpeg-turbo when it first comes, at some 0.4 ms: DALI gives grey
                blocks for damaged data, without an error.
            device_id: which of the GPUs.

        Raises:
            InputError: nothing to open, or DALI isn't installed.
        """
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise InputError(
                "the DALI source needs nvidia-dali: pip install 'lvssl[dali-cu130]' (or dali-cu120)"
            ) from error
        if device not in ("cpu", "gpu"):
            raise InputError(f"device must be cpu or gpu, got {device!r}")
        self.base = open_files(path)
        self.labels, self.classes, self.pages = self.base.labels, self.base.classes, self.base.pages
        self.targets = getattr(self.base, "targets", {})
        self.device, self.threads = device, threads
        self.device_id = device_id if device == "gpu" else None
        self._sound = np.full(len(self.labels), not check)
        self._free: dict[tuple[int, int], list[Any]] = {}  # pipelines that no thread is using

    def __len__(self) -> int:
        return len(self.base)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""
        return self.base.sizes(indices)

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.decode.Reader`."""
        return self.base.encoded(row, index)

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.decode.Reader`. What isn't a sound, upright JPEG goes the base source's way."""
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        sizes = np.stack(self.sizes(indices), axis=1)
        corner = boxes[..., :2] + boxes[..., 2:]
        if (boxes[..., :2] < 0).any() or (boxes[..., 2:] < 1).any() or (corner > sizes[:, None]).any():
            raise ValueError("boxes do not lie within their images")
        rows, files = [], []
        for row, index in enumerate(indices.tolist()):
            data = self.encoded(row, index)
            if self._is_plain(index, data, sizes[row]):
                rows.append(row)
                files.append(np.frombuffer(data, np.uint8))
            else:
                one = slice(row, row + 1)
                try:
                    self.base.crops(indices[one], boxes[one], out[one], flips[one])
                except DamagedSample as sample:
                    raise DamagedSample(row, index, str(sample)) from sample
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            out[some] = self._run(files[first : first + BATCH], boxes[some], flips[some], out.shape[2])

    def _is_plain(self, index: int, data: bytes | np.ndarray, size: np.ndarray) -> bool:
        """Whether DALI can have it: a sound, upright JPEG in RGB or grey, of the size that the set says."""
        if isinstance(data, np.ndarray) or not jpeg.is_jpeg(data):
            return False
        try:
            header = jpeg.read_header(data)
            if not self._sound[index]:
                jpeg.check(data, header)
                self._sound[index] = True
        except jpeg.DamagedImage:
            return False  # the base source says what is wrong
        fits = (header.height, header.width) == tuple(size)
        return fits and header.is_rgb_or_grey and header.orientation == 1

    def _run(self, files: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray, side: int) -> np.ndarray:
        """Crops of at most BATCH JPEGs: uint8 [B, V, R, R, 3]."""
        views = boxes.shape[1]
        free = self._free.setdefault((views, side), [])
        try:
            pipeline = free.pop()
        except IndexError:
            pipeline = _pipeline(views, side, self.device_id, self.threads)
        start = boxes[..., :2].min(1)
        pipeline.feed_input("files", files)
        pipeline.feed_input("start", start)
        pipeline.feed_input("shape", (boxes[..., :2] + boxes[..., 2:]).max(1) - start)
        for view in range(views):
            pipeline.feed_input(f"start{view}", boxes[:, view, :2] - start)
            pipeline.feed_input(f"shape{view}", np.ascontiguousarray(boxes[:, view, 2:]))
            pipeline.feed_input(f"flip{view}", flips[:, view].astype(np.int32))
        crops = [(c.as_cpu() if self.device == "gpu" else c).as_array() for c in pipeline.run()]
        stacked = np.stack(crops, axis=1)
        free.append(pipeline)  # unless it raised: what it is then in is nobody's knowledge
        return stacked


def _pipeline(views: int, side: int, device_id: int | None, threads: int) -> Any:
    """`device_id`: the GPU; None: on the CPU."""
    dali: Any = importlib.import_module("nvidia.dali")  # its stubs lack half of what it has
    fn, types = dali.fn, dali.types

    def fed(name: str, ndim: int = 1) -> Any:
        return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)

    pipeline = dali.Pipeline(
        batch_size=BATCH, num_threads=threads, device_id=device_id,
        prefetch_queue_depth=1, exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    with pipeline:
        images = fn.decoders.image_slice(
            fn.external_source(name="files", dtype=types.UINT8, ndim=1), start=fed("start"),
            shape=fed("shape"), axes=[0, 1], device="cpu" if device_id is None else "mixed",
            adjust_orientation=False,
        )  # fmt: skip
        outputs = []
        for view in range(views):
            crop = fn.slice(images, start=fed(f"start{view}"), shape=fed(f"shape{view}"), axes=[0, 1])
            crop = fn.resize(crop, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
            outputs.append(fn.flip(crop, horizontal=fed(f"flip{view}", 0)))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline
