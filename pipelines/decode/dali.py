"""Crops by DALI, which decodes each image once, and only where the boxes lie.

`decoders.image_slice` decodes the smallest rectangle that contains all boxes of an image, and each crop is a
slice of it. On a GPU the decoder is nvJPEG (DALI's "mixed" backend), slices, resizes and flips run there too,
and the crops are passed on through DLPack without a copy to the host.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.cores import loader_threads
from pipelines.decode.on_device import BATCH, DeviceReader
from pipelines.errors import InputError

AHEAD = 2  # batches that a pipeline is fed before the first of them is taken


class DALIReader(DeviceReader):
    """Encoded images as a source of crops; one pipeline for each kind of call is shared by all threads.

    On a CPU, pixels equal those of the other readers except at the edge of a downscaled crop: DALI repeats
    the border pixels there, as OpenCV does, whereas torchvision leaves them out. Over 400 crops of ImageNet
    the mean difference was 0.001 levels and the largest 9 at 224 px; at 32 px they were 0.14 and 23, and one
    value in a thousand differed by more than 10. nvJPEG may differ by more; this wasn't measured.
    """

    decoder = "dali"

    def __init__(self, path: str | Path, device: str = "cpu"):
        """See `DeviceReader`. Also raises InputError if DALI isn't installed."""
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise InputError(
                "the DALI source needs nvidia-dali: pip install 'lvssl[dali-cu130]' (or dali-cu120)"
            ) from error
        super().__init__(path, device)
        self.threads = loader_threads()
        self._pipelines: dict[tuple[int, int], Pipeline] = {}
        self._lock = threading.Lock()

    def _made(self, files: list[bytes], boxes: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
        key = boxes.shape[1], side
        with self._lock:
            if key not in self._pipelines:
                number = None if self.device == "cpu" else int(self.device.partition(":")[2])
                self._pipelines[key] = Pipeline(*key, number, self.threads)
            pipeline = self._pipelines[key]
        return pipeline.crops([np.frombuffer(file, np.uint8) for file in files], boxes, flips)


class Pipeline:
    """An asynchronous DALI pipeline: it decodes one thread's images while others feed it or take theirs.

    device_id: the GPU, or None for the CPU.
    """

    def __init__(self, views: int, side: int, device_id: int | None, threads: int) -> None:
        self.pipeline = _pipeline(views, side, device_id, threads)
        self.room = threading.Semaphore(AHEAD)
        self.feeding, self.turn = threading.Lock(), threading.Condition()
        self.fed = self.taken = 0
        self.failed = False

    def crops(self, files: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray) -> Tensor:
        """See `DeviceReader._made`. Raises RuntimeError if DALI fails, or has failed in an earlier call."""
        with self.room:
            with self.feeding:
                if self.failed:  # its queue is in an unknown state
                    raise RuntimeError("DALI has failed before")
                try:
                    self._feed(files, boxes, flips)
                except BaseException:
                    self.failed = True
                    raise
                number, self.fed = self.fed, self.fed + 1
            with self.turn:
                self.turn.wait_for(lambda: self.taken == number)
            try:
                return self._take()
            except BaseException:
                self.failed = True
                raise
            finally:
                with self.turn:
                    self.taken += 1
                    self.turn.notify_all()

    def _feed(self, files: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray) -> None:
        feed, start = self.pipeline.feed_input, boxes[..., :2].min(1)
        feed("files", files)
        feed("start", start)
        feed("shape", (boxes[..., :2] + boxes[..., 2:]).max(1) - start)
        for view in range(boxes.shape[1]):
            feed(f"start{view}", boxes[:, view, :2] - start)
            feed(f"shape{view}", np.ascontiguousarray(boxes[:, view, 2:]))
            feed(f"flip{view}", flips[:, view].astype(np.int32))
        self.pipeline.schedule_run()

    def _take(self) -> Tensor:
        crops = [torch.from_dlpack(views.as_tensor()) for views in self.pipeline.share_outputs()]
        stacked = torch.stack(crops, dim=1)
        if stacked.is_cuda:
            torch.cuda.current_stream().synchronize()  # the next batch may reuse the memory
        del crops
        self.pipeline.release_outputs()
        return stacked


def _pipeline(views: int, side: int, device_id: int | None, threads: int) -> Any:
    dali: Any = importlib.import_module("nvidia.dali")  # its type stubs are incomplete
    fn, types = dali.fn, dali.types

    def fed(name: str, ndim: int = 1) -> Any:
        return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)

    pipeline = dali.Pipeline(  # with exec_pipelined it would wait for AHEAD batches before the first
        batch_size=BATCH, num_threads=threads, device_id=device_id,
        prefetch_queue_depth=AHEAD, exec_async=True, exec_pipelined=False,
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
