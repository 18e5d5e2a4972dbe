"""Crops by DALI, from the JPEGs of another source: decoded once, cropped where our boxes say.

The files' bytes come from a .beton or a folder, so that all sources share indices, labels, order and boxes;
DALI's own readers would bring an order of their own, which can't be resumed. With device="gpu" DALI's mixed
decoder (nvJPEG) and its crops run on the GPU, and come back to the host; with "cpu" all stays here, where it
serves to hold DALI's pixels against ours: it is slower than `ffcv`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert import jpeg
from pipelines.errors import InputError
from pipelines.sources import DamagedSample, open_source

BATCH = 64  # the most that a pipeline is built for; larger calls are cut


class DALISource:
    """Encoded images as a source of crops.

    Decoded by the CPU, pixels are the other sources' but where a shrunken crop ends: there DALI repeats the
    border pixels, as OpenCV does, where torchvision leaves them out. 200 crops of ImageNet, measured: at 224
    px a mean difference of 0.001 levels, at most 6; at 32 px 0.14, at most 26. nvJPEG's may differ by more.

    Attributes:
        labels, pages: int64 [N].
    """

    def __init__(self, path: str | Path, device: str = "cpu", threads: int = 1, check: bool = True):
        """Open a .beton or a folder.

        Args:
            device: `cpu` or `gpu`. threads: of each pipeline; one belongs to each thread that asks for crops.
            check: hold each JPEG against libjpeg-turbo first, at 0.4 ms each: DALI gives grey blocks for
                damaged data, without an error. Not needed for what `convert-beton` has checked.

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
        self.base = open_source(path)
        self.labels, self.pages = self.base.labels, self.base.pages
        self.device, self.threads, self.check = device, threads, check
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.base)

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True heights and widths in pixels, int64 [B] each. Raises DamagedSample."""
        return self.base.sizes(indices)

    def stored(self, row: int, index: int) -> bytes | np.ndarray:
        """See `pipelines.sources.Source`."""
        return self.base.stored(row, index)

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        """See `pipelines.sources.Source`. What isn't an upright JPEG goes the base source's way."""
        flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
        heights, widths = self.sizes(indices)
        inside = (boxes[..., :2] >= 0).all() and (boxes[..., 2:] >= 1).all()
        if not inside or (boxes[..., 0] + boxes[..., 2] > heights[:, None]).any() or (
            boxes[..., 1] + boxes[..., 3] > widths[:, None]
        ).any():  # fmt: skip
            raise ValueError("boxes do not lie within their images")
        rows, files = [], []
        for row, index in enumerate(indices.tolist()):
            data = self.stored(row, index)
            if self._is_plain(row, index, data):
                rows.append(row)
                files.append(np.frombuffer(data, np.uint8))
            else:
                one = slice(row, row + 1)
                self.base.crops(indices[one], boxes[one], out[one], flips[one])
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            self._run(files[first : first + BATCH], boxes[some], flips[some], out, some)

    def _is_plain(self, row: int, index: int, data: bytes | np.ndarray) -> bool:
        """Whether DALI can have it: an upright JPEG in RGB or grey."""
        if isinstance(data, np.ndarray) or not jpeg.is_jpeg(data):
            return False
        try:
            header = jpeg.read_header(data)
            if self.check:
                jpeg.check(data, header)
        except jpeg.DamagedImage as error:
            raise DamagedSample(row, index, f"sample {index} can't be decoded ({error})") from error
        height, width = self.sizes(np.array([index]))
        if (header.height, header.width) != (height[0], width[0]):
            return False  # turned, or wrong: the base source knows which
        return header.is_rgb_or_grey and header.orientation == 1

    def _run(
        self, files: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray, out: np.ndarray, rows: list[int]
    ) -> None:
        views, side = boxes.shape[1], out.shape[2]
        pipelines: dict[tuple[int, int], Any] = self._local.__dict__.setdefault("pipelines", {})
        if (views, side) not in pipelines:
            pipelines[views, side] = _pipeline(views, side, self.device, self.threads)
        pipeline = pipelines[views, side]
        pipeline.feed_input("files", files)
        for view in range(views):
            pipeline.feed_input(f"start{view}", np.ascontiguousarray(boxes[:, view, :2]))
            pipeline.feed_input(f"shape{view}", np.ascontiguousarray(boxes[:, view, 2:]))
            pipeline.feed_input(f"flip{view}", flips[:, view].astype(np.int32))
        for view, crops in enumerate(pipeline.run()):
            out[rows, view] = (crops.as_cpu() if self.device == "gpu" else crops).as_array()


def _pipeline(views: int, side: int, device: str, threads: int) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=BATCH, num_threads=threads, device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1, exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    with pipeline:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            files, device="mixed" if device == "gpu" else "cpu", adjust_orientation=False
        )
        outputs = []
        for view in range(views):
            start = fn.external_source(name=f"start{view}", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name=f"shape{view}", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name=f"flip{view}", dtype=types.INT32, ndim=0)
            crop = fn.slice(images, start=start, shape=shape, axes=[0, 1])
            crop = fn.resize(crop, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
            outputs.append(fn.flip(crop, horizontal=flip))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline
