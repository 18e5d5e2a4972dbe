"""A source and an augmentation -> batches of two views, made ahead of time by threads.

There is no state but a position: order, crops and colours are functions of (seed, epoch, index, view), so a
resumed loader is one that is told epoch and step. Threads are enough, for decoding, cropping and augmenting
all release the GIL; each takes a part of a batch, so that the first batch is not late.
"""

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import cpu
from pipelines.cores import loader_threads
from pipelines.decode import DamagedSample, Reader
from pipelines.decode.pixels import decode_damaged
from pipelines.decode.turbo import crop_pixels
from pipelines.errors import ON_ERROR, InputError
from pipelines.order import ORDERS, epoch_order, step_indices, steps_per_epoch
from pipelines.parameters import FLIP, P, centre_boxes, crop_boxes, draw_parameters
from pipelines.views import ViewSettings

Augmenter = Callable[[Tensor, Tensor, ViewSettings], Tensor]
Boxes = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
CACHED = 1 << 20  # bytes of crops that are made at once: augmented before they leave the second-level cache
RUN_AHEAD = 2  # batches whose use has been launched and isn't over: each keeps its memory until then


@dataclass(frozen=True)
class ViewBatch:
    """Two views of B images.

    Attributes:
        views: [V, B, 3, R, R], normalised, V = 2 unless the loader was told otherwise; each view is
            channels-last in memory. float32, or what the augmenter gives. Its memory is used again when no
            tensor shares it any more.
        labels: int64 [B].
        indices: int64 [B], positions in the data set.
        parameters: float32 [B, V, P], see `pipelines.parameters.COLUMNS`.
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    parameters: Tensor

    def pinned(self) -> "ViewBatch":
        """The batch in page-locked memory; its views already are if the loader was told so."""
        return ViewBatch(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> "ViewBatch":
        """The batch on a device; asynchronous where the batch is pinned."""
        if device.type == "cpu":
            return self
        return ViewBatch(
            *(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__)
        )


class TwoViewLoader:
    """Iterates over the `ViewBatch`es of one epoch, from the position it was given to the epoch's end.

    Every pixel is a function of (seed, epoch, index, view): the count of workers, the batch size and the
    number of ranks change nothing. Use as a context manager, or call `close()`.

    Args:
        source: the images.
        view: the augmentation's ranges.
        batch_size: images a step, over all ranks; must be divisible by `ranks`.
        seed: in [0, 2^64).
        workers: threads; 0: see `pipelines.cores.loader_threads`. ahead: batches made in advance.
        rank, ranks: this process's share of each batch.
        pin_memory: batches in page-locked memory, for asynchronous copies to a GPU.
        order: random, quasi-random (for sets larger than memory) or sequential, see `pipelines.order`.
        on_error: a sample that can't be decoded: `raise` InputError, or `skip` it: the next good one of the
            set takes its place, in `indices` too, and `skipped` counts it.
        crops_only: views are uint8 crops, mirrored as their parameters say, for an augmentation of one's own;
            the two views of an image lie side by side in memory.
        augmenter: None augments in the workers, on the CPU. Otherwise it is called with crops uint8
            [2B, R, R, 3], parameters [2B, P] and `view` where the batch is to be used, and gives
            [2B, 3, R, R], in the dtype of the training (see `pipelines.augment.augmenter_for`).
        views: of each image; 1, for training with labels, gives the first of the two.
        device: where batches come out. On a GPU they are copied, and augmented, on a stream of their own, one
            ahead of the batch in use; the device never waits for the host, and the host for the device only
            where it is RUN_AHEAD batches before it.

    Raises:
        InputError: the batch is larger than the data, or not divisible by the ranks; unknown order.

    Attributes:
        skipped: how many samples were replaced so far, ahead of the batch in use too.
        damaged: index -> why, of each that was met.
        waited: seconds for which a batch was asked for before the threads had made it.
    """

    def __init__(
        self,
        source: Reader,
        view: ViewSettings,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        ahead: int = 3,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
        order: str = "random",
        on_error: str = "raise",
        crops_only: bool = False,
        augmenter: Augmenter | None = None,
        device: torch.device | str = "cpu",
        views: int = 2,
    ) -> None:
        view.validate()
        if batch_size < 1 or batch_size % ranks:
            raise InputError(
                f"--batch-size must be a positive multiple of the {ranks} rank(s), got {batch_size}"
            )
        if not 0 <= rank < ranks:
            raise InputError(f"rank must be in [0, {ranks}), got {rank}")
        if order not in ORDERS:
            raise InputError(f"unknown order {order!r}; one of {', '.join(ORDERS)}")
        self.source, self.view, self.batch_size, self.seed = source, view, batch_size, seed
        self.rank, self.ranks, self.ahead, self.order = rank, ranks, ahead, order
        self.views = views
        self.device, self.augmenter, self.crops_only = torch.device(device), augmenter, crops_only
        self.steps = steps_per_epoch(len(source), batch_size)
        self.epoch = self.step = 0
        self.waited = 0.0
        self._decoder = Decoder(source, on_error)
        self._buffers = Buffers(pin_memory or self.device.type == "cuda")
        self._threads = Threads(workers)
        self._on_device = _OnDevice(self.device) if self.device.type == "cuda" else None

    def __len__(self) -> int:
        """Steps in an epoch: equal for all epochs and ranks."""
        return self.steps

    @property
    def skipped(self) -> int:
        return self._decoder.skipped

    @property
    def damaged(self) -> dict[int, str]:
        return dict(self._decoder.damaged)

    def describe_skipped(self) -> str:
        """One line for a log, with the first of the damaged samples."""
        damaged = self.damaged
        first = damaged[min(damaged)] if damaged else "none"
        return (
            f"{self.skipped} times a damaged sample was replaced, {len(damaged)} in all; the first: {first}"
        )

    def set_epoch(self, epoch: int) -> None:
        """Go on from the beginning of this epoch."""
        self.set_position(epoch)

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Go on from this step of this epoch."""
        if epoch < 0 or not 0 <= step <= self.steps:
            raise InputError(f"no step {step} in epoch {epoch}: an epoch has {self.steps} steps")
        self.epoch, self.step = epoch, step

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.set_position(**state)

    def __iter__(self) -> Iterator[ViewBatch]:
        epoch = self.epoch
        order = epoch_order(len(self.source), self.seed, epoch, self.order, self.source.pages)

        def start(step: int) -> Callable[[], ViewBatch]:
            return self._start(step_indices(order, step, self.batch_size, self.rank, self.ranks), epoch)

        batches = _ahead(start, range(self.step, self.steps), self.ahead)
        if self._on_device is not None:
            batches = self._on_device.each(batches, self._augmented)
        for batch in batches:
            self.step += 1  # before the batch is used: a state saved after the step resumes behind it
            yield batch if self._on_device is not None else self._augmented(batch)
        self.epoch, self.step = epoch + 1, 0

    def _augmented(self, batch: ViewBatch) -> ViewBatch:
        """The batch after the augmenter, where that isn't the workers' task."""
        if self.augmenter is None or self.crops_only:
            return batch
        crops = batch.views.permute(0, 1, 3, 4, 2).flatten(0, 1)
        views = self.augmenter(crops, batch.parameters.transpose(0, 1).flatten(0, 1), self.view)
        return replace(batch, views=views.unflatten(0, (self.views, -1)))

    def _start(self, indices: np.ndarray, epoch: int) -> Callable[[], ViewBatch]:
        indices, side = indices.copy(), self.view.resolution
        here = self.augmenter is None and not self.crops_only  # augmented by the workers
        count, each = len(indices), self.views
        if here:
            views = self._buffers.take((each, count, side, side, 3), torch.float32)
        else:  # as the source fills them, so that nothing is copied
            views = self._buffers.take((count, each, side, side, 3), torch.uint8)
        pixels = views.numpy()
        parameters = np.empty((count, each, P), np.float32)
        chunk = images_a_call(self.source, side, each)

        def make(part: slice) -> None:
            for first in range(part.start, part.stop, chunk):
                rows = slice(first, min(first + chunk, part.stop))
                table = parameters[rows]
                crops = np.empty((len(table), each, side, side, 3), np.uint8) if here else pixels[rows]

                def boxes(chosen: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
                    table[:] = draw_parameters(self.view, self.seed, epoch, chosen, heights, widths, each)  # noqa: B023
                    return crop_boxes(table)  # noqa: B023

                def flips() -> np.ndarray | None:
                    return table[..., FLIP] != 0 if self.crops_only else None  # noqa: B023

                self._decoder.crops(indices[rows], boxes, crops, flips)
                for v in range(each * here):
                    cpu.augment_into(crops[:, v], table[:, v], self.view, pixels[v, rows])

        wait = self._threads.run(make, len(indices))

        def finish() -> ViewBatch:
            started = time.perf_counter()
            wait()
            self.waited += time.perf_counter() - started
            return ViewBatch(
                views.permute(0, 1, 4, 2, 3) if here else views.permute(1, 0, 4, 2, 3),
                torch.from_numpy(self.source.labels[indices]),
                torch.from_numpy(indices),
                torch.from_numpy(parameters),
            )

        return finish

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._threads.close()

    def __enter__(self) -> "TwoViewLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OnDevice:
    """Copies and augments on a stream of its own, one batch ahead of the one in use.

    One stream for a loader's life: torch's allocator keeps memory for each stream, and another every epoch
    would take that of an epoch's batches again and again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.in_use: deque[torch.cuda.Event] = deque()  # ends of use that the device hasn't come to

    def each(
        self, batches: Iterator[ViewBatch], augmented: Callable[[ViewBatch], ViewBatch]
    ) -> Iterator[ViewBatch]:
        """The batches on the device, for use on the stream that is current when they come."""
        last = None
        for batch in batches:
            with torch.cuda.stream(self.stream):
                copy = augmented(batch.pinned().to(self.device))
                copied = torch.cuda.Event()
                copied.record(self.stream)
            if last is not None:
                yield from self._used(*last)
            last = copy, copied
        if last is not None:
            yield from self._used(*last)

    def _used(self, batch: ViewBatch, copied: torch.cuda.Event) -> Iterator[ViewBatch]:
        """The batch; and when the next is asked for, a mark behind all that was launched with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for name in batch.__dataclass_fields__:  # so that their memory isn't reused while they are in use
            getattr(batch, name).record_stream(current)
        yield batch
        end = torch.cuda.Event(blocking=True)
        end.record(torch.cuda.current_stream(self.device))
        self.in_use.append(end)
        if len(self.in_use) > RUN_AHEAD:
            self.in_use.popleft().synchronize()


def evaluation_batches(
    source: Reader,
    view: ViewSettings,
    batch_size: int = 256,
    workers: int = 0,
    indices: np.ndarray | None = None,
    decoder: "Decoder | None" = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Every image once, in order, as its centre crop without augmentation.

    Yields:
        crops uint8 [B, R, R, 3] (`pipelines.normalise` makes images of them), indices int64 [B]; the last may
        be smaller. With a decoder that skips, a damaged image is another, in its indices too (see `Decoder`).
    """
    everything = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    decoder, side = decoder or Decoder(source), view.resolution
    chunk = images_a_call(source, side)

    def start(first: int) -> Callable[[], tuple[Tensor, np.ndarray]]:
        chosen = everything[first : first + batch_size].copy()
        crops = np.empty((len(chosen), side, side, 3), np.uint8)

        def make(part: slice) -> None:
            for row in range(part.start, part.stop, chunk):
                rows = slice(row, min(row + chunk, part.stop))
                crops[rows] = evaluation_crops(source, view, chosen[rows], decoder)

        wait = threads.run(make, len(chosen))

        def finish() -> tuple[Tensor, np.ndarray]:
            wait()
            return torch.from_numpy(crops), chosen

        return finish

    with Threads(workers) as threads:
        yield from _ahead(start, range(0, len(everything), batch_size), 3)


def images_a_call(source: Reader, side: int, views: int = 1) -> int:
    """How many images are cropped at once, into `views` of `side` pixels each.

    Many small ones: each call holds the GIL for some microseconds, in which a training loop launches nothing.
    No more, for after a damaged image all of a call's are decoded anew.
    """
    return max(source.chunk, CACHED // (views * side * side * 3))


def sent(images: Tensor, device: torch.device) -> Tensor:
    """The same on a device; to a GPU by way of page-locked memory, so that the host doesn't wait."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)


def evaluation_crops(
    source: Reader, view: ViewSettings, indices: np.ndarray, decoder: "Decoder | None" = None
) -> np.ndarray:
    """The centre crops of some samples: uint8 [B, R, R, 3]."""
    crops = np.empty((len(indices), 1, view.resolution, view.resolution, 3), np.uint8)

    def boxes(_: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        return centre_boxes(heights, widths, view.evaluation_crop)

    (decoder or Decoder(source)).crops(indices, boxes, crops)
    return crops[:, 0]


class Decoder:
    """Crops of a source, with a damaged sample replaced by the next good one or raised.

    The next one in the set's own order: so the same sample takes the place in every epoch, on every rank,
    whatever the workers.
    """

    def __init__(self, source: Reader, on_error: str = "raise") -> None:
        if on_error not in ON_ERROR:
            raise InputError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}")
        self.source, self.skip, self.keep = source, on_error != "raise", on_error == "keep"
        self.damaged: dict[int, str] = {}
        self.skipped = 0
        self._lock = threading.Lock()

    def crops(
        self,
        indices: np.ndarray,
        boxes: Boxes,
        out: np.ndarray,
        flips: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        """Fill out uint8 [B, V, R, R, 3] with crops in boxes(indices, heights, widths), int32 [B, V, 4].

        Those that flips(), bool [B, V], names are mirrored; it is called after boxes(). Replaces damaged
        samples in `indices`, then asks for boxes anew. Raises DamagedSample.
        """
        replaced = set()
        while True:
            try:
                drawn = boxes(indices, *self.source.sizes(indices))
                self._crop(indices, drawn, out, flips())
                break
            except DamagedSample as sample:
                if not self.skip:
                    raise
                replaced.add(sample.row)
                indices[sample.row] = self._after(sample)
        with self._lock:
            self.skipped += len(replaced)

    def _crop(
        self, indices: np.ndarray, drawn: np.ndarray, out: np.ndarray, flips: np.ndarray | None
    ) -> None:
        """What `Reader.crops` does; with `keep`, what Pillow makes of a damaged JPEG is cropped."""
        try:
            self.source.crops(indices, drawn, out, flips)
        except DamagedSample:
            if not self.keep:
                raise
            flips = np.zeros(drawn.shape[:2], bool) if flips is None else flips
            for row in range(len(indices)):
                self._crop_or_keep(row, indices, drawn, out, flips)

    def _crop_or_keep(
        self, row: int, indices: np.ndarray, drawn: np.ndarray, out: np.ndarray, flips: np.ndarray
    ) -> None:
        part = slice(row, row + 1)
        try:
            self.source.crops(indices[part], drawn[part], out[part], flips[part])
        except DamagedSample as sample:
            pixels = decode_damaged(self.source.encoded(row, sample.index))
            if pixels is None or not crop_pixels(pixels, drawn[row], flips[row], out[row]):
                raise DamagedSample(row, sample.index, str(sample)) from None

    def _after(self, sample: DamagedSample) -> int:
        """The next sample that isn't known to be damaged."""
        count = len(self.source)
        with self._lock:
            self.damaged[sample.index] = str(sample)
            for step in range(1, count):
                if (index := (sample.index + step) % count) not in self.damaged:
                    return index
        raise InputError(f"none of {count} samples can be decoded; the last: {sample}")


class Buffers:
    """Memory for batches, used again once a batch's tensors are gone: fresh memory costs a page fault
    for every 4 KB, which is a tenth of the time that a 224 px crop takes."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        if self.pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch keeps these itself
        size = math.prod(shape) * dtype.itemsize
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        if memory.size != size:
            memory = np.empty(size, np.uint8)
        lent = memory[:]  # lives as long as any tensor that shares its memory
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


class Threads:
    """A fixed number of threads that share the rows of a batch."""

    def __init__(self, workers: int) -> None:
        if workers < 0:
            raise InputError(f"--workers must be at least 0, got {workers}")
        self.workers = loader_threads(workers)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="views")

    def run(self, make: Callable[[slice], None], rows: int) -> Callable[[], None]:
        """Start make(part) on equal parts of `rows`; the returned call waits, and raises what they raised."""
        share = max(1, -(-rows // self.workers))
        parts = [slice(first, min(first + share, rows)) for first in range(0, rows, share)]
        futures: list[Future[None]] = [self._pool.submit(make, part) for part in parts]

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ahead(start: Callable[[int], Callable[[], Any]], items: range, count: int) -> Iterator[Any]:
    """start(item)() for each item, with `count` of them under way."""
    waiting: deque[Callable[[], Any]] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) > count:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
