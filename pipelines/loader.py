"""Make batches of two augmented views from a source, ahead of time, in threads.

The only state is a position: order, crops and colours are functions of (seed, epoch, index, view), so a
loader resumes from an epoch and a step. Threads suffice, as decoding, cropping and augmenting all release the
GIL; each thread makes a part of every batch, so that the first batch is ready early.
"""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import cpu
from pipelines.cores import loader_threads
from pipelines.decode import DamagedSample, Reader
from pipelines.decode.pixels import decode_damaged
from pipelines.decode.reader import put
from pipelines.decode.turbo import crop_pixels
from pipelines.errors import ON_ERROR, InputError
from pipelines.in_order import in_order
from pipelines.order import ORDERS, epoch_order, step_indices, steps_per_epoch
from pipelines.parameters import FLIP, P, centre_boxes, crop_boxes, draw_parameters
from pipelines.views import ViewSettings

__all__ = ["LoaderSettings", "TwoViewLoader", "ViewBatch", "evaluation_batches", "evaluation_crops"]

Flips = np.ndarray | None
Pixels = np.ndarray | Tensor  # on the host, or on the GPU where a source crops
Augmenter = Callable[[Tensor, Tensor, ViewSettings], Tensor]
CACHED = 1 << 20  # bytes of crops made at once, so that they are augmented while in the L2 cache
CROPPED = 32  # images per call that only makes crops: each call holds the GIL for at most 0.2 ms
AHEAD = 3  # batches made in advance
RUN_AHEAD = 2  # batches whose use was launched but isn't finished: each keeps its memory until then


@dataclass(frozen=True)
class ViewBatch:
    """Two views of B images.

    Attributes:
        views: [V, B, 3, R, R], normalised; V = 2 unless the loader has another setting. Each view is
            channels-last in memory, and float32 or the augmenter's dtype. The memory is reused once no tensor
            shares it.
        labels: int64 [B].
        indices: int64 [B], positions in the data set.
        parameters: float32 [B, V, P], see `pipelines.parameters.COLUMNS`.

    >>> with TwoViewLoader(open_reader("photos"), ViewSettings(resolution=32), LoaderSettings(4)) as loader:
    ...     batch = next(iter(loader))
    >>> batch.views.shape, batch.labels.shape, batch.parameters.shape[:2]
    (torch.Size([2, 4, 3, 32, 32]), torch.Size([4]), torch.Size([4, 2]))
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    parameters: Tensor

    def pinned(self) -> "ViewBatch":
        """The batch in page-locked memory, except for tensors that are there or on a GPU already.

        >>> batch = batch.pinned() if torch.cuda.is_available() else batch
        """
        return ViewBatch(*(part if part.is_cuda else part.pin_memory() for part in vars(self).values()))

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The batch on a device. The copy is asynchronous if it is to a GPU and the batch is pinned.

        >>> batch.to("cpu").views.device
        device(type='cpu')
        """
        device = torch.device(device)
        return ViewBatch(*(t.to(device, non_blocking=device.type != "cpu") for t in vars(self).values()))


@dataclass(frozen=True)
class LoaderSettings:
    """Which batches are made, and how.

    >>> LoaderSettings(batch_size=256, seed=1, order="quasi-random").workers
    0
    """

    batch_size: int
    """Images per step, over all ranks; must be divisible by `ranks`."""
    seed: int = 0
    """Random seed, in [0, 2^64)."""
    workers: int = 0
    """Number of threads; 0 means the default of `pipelines.cores.loader_threads`."""
    rank: int = 0
    """Which of the `ranks` parts of each batch this process makes."""
    ranks: int = 1
    """Number of processes that share each batch."""
    order: str = "random"
    """random, quasi-random (for sets larger than memory) or sequential, see `pipelines.order`."""
    on_error: str = "raise"
    """What to do with a sample that can't be decoded: `raise` InputError, or `skip` it (the next good sample
    of the set replaces it, in `indices` too, and `skipped` counts it); `keep` is `skip`, but uses what Pillow
    decodes from a damaged JPEG."""
    crops_only: bool = False
    """Return views as uint8 crops, mirrored as their parameters say, for a custom augmentation. The two views
    of an image are adjacent in memory."""
    augmenter: Augmenter | None = None
    """If None, the workers augment on the CPU. Otherwise it is called with crops uint8 [2B, R, R, 3],
    parameters [2B, P] and the view, on the device where the batch is used, and returns [2B, 3, R, R] in the
    dtype of the training (see `pipelines.augment.augmenter_for`)."""
    device: torch.device | str = "cpu"
    """Device of the batches. For a GPU, they are copied and augmented on a separate stream, one batch ahead
    of the one in use. The device never waits for the host, and the host waits for the device only when it is
    RUN_AHEAD batches ahead."""
    views: int = 2
    """Number of views of each image; 1, for training with labels, gives the first of the two."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value.

        >>> LoaderSettings(batch_size=256, ranks=8).validate()
        """
        for name in ("batch_size", "seed", "workers", "rank", "ranks", "views"):
            if not isinstance(getattr(self, name), Integral):
                raise InputError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.ranks < 1:
            raise InputError(f"ranks must be at least 1, got {self.ranks}")
        if self.views not in (1, 2):
            raise InputError(f"views must be 1 or 2, got {self.views}")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"--seed must be in [0, 2^64), got {self.seed}")
        if self.batch_size < 1 or self.batch_size % self.ranks:
            raise InputError(
                f"--batch-size must be a positive multiple of the {self.ranks} rank(s), got {self.batch_size}"
            )
        if not 0 <= self.rank < self.ranks:
            raise InputError(f"rank must be in [0, {self.ranks}), got {self.rank}")
        if self.order not in ORDERS:
            raise InputError(f"unknown order {self.order!r}; one of {', '.join(ORDERS)}")
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        known = ["cpu", *(["cuda", *gpus] if gpus else [])]
        if str(self.device) not in ("cpu:0", *known):
            raise InputError(f"device must be {' or '.join(known)} here, got {str(self.device)!r}")

    @property
    def augments(self) -> bool:
        """Whether the workers augment the crops.

        >>> LoaderSettings(batch_size=256, crops_only=True).augments
        False
        """
        return self.augmenter is None and not self.crops_only


class TwoViewLoader:
    """Iterates over the `ViewBatch`es of one epoch, from its current position to the end of the epoch.

    Every pixel is a function of (seed, epoch, index, view): the number of workers, the batch size and the
    number of ranks don't matter. Use it as a context manager, or call `close()`.

    Raises:
        InputError: an impossible setting, or the data set has fewer than two images, or fewer than a batch.

    Attributes:
        skipped: number of samples replaced so far, including those in batches made in advance.
        damaged: {index: reason} of the damaged samples met so far.
        waited: seconds spent waiting for batches that weren't ready when they were asked for.

    >>> settings = LoaderSettings(batch_size=4, seed=0)
    >>> with TwoViewLoader(open_reader("photos"), ViewSettings(resolution=32), settings) as loader:
    ...     for epoch in range(2):
    ...         loader.set_epoch(epoch)
    ...         seen = [len(batch.indices) for batch in loader]
    >>> seen, len(loader)
    ([4, 4, 4], 3)
    """

    def __init__(self, source: Reader, view: ViewSettings, settings: LoaderSettings) -> None:
        if isinstance(source, str | Path):
            raise InputError(f"source must be a Reader, such as open_reader({str(source)!r}), got a path")
        view.validate()
        settings.validate()
        self.source, self.view, self.settings = source, view, settings
        self.steps = steps_per_epoch(len(source), settings.batch_size)
        self.epoch = self.step = 0
        self.waited = 0.0
        self._replacements = Replacements(source, settings.on_error)
        device = torch.device(settings.device)
        there = source.device if device.type == "cuda" and not settings.augments else "cpu"
        self._buffers = Buffers(device.type == "cuda", there)
        self._threads = Threads(settings.workers)
        self._on_device = _OnDevice(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Steps per epoch, equal for all epochs and ranks."""
        return self.steps

    @property
    def skipped(self) -> int:
        """Number of samples replaced so far.

        >>> loader.skipped
        0
        """
        return self._replacements.count

    @property
    def damaged(self) -> dict[int, str]:
        """{index: reason} of the damaged samples met so far.

        >>> loader.damaged
        {}
        """
        return dict(self._replacements.damaged)

    def describe_skipped(self) -> str:
        """Describe the damaged samples in one line for a log, naming the first of them.

        >>> loader.describe_skipped()
        '0 replacements of damaged samples (0 distinct); the first: none'
        """
        damaged = self.damaged
        first = damaged[min(damaged)] if damaged else "none"
        return f"{self.skipped} replacements of damaged samples ({len(damaged)} distinct); the first: {first}"

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of this epoch.

        >>> loader.set_epoch(3)
        """
        self.set_position(epoch)

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Move to this step of this epoch. Raises InputError if an epoch has fewer steps.

        >>> loader.set_position(epoch=3, step=2)
        >>> loader.state_dict()
        {'epoch': 3, 'step': 2}
        """
        if epoch < 0 or not 0 <= step <= self.steps:
            raise InputError(f"no step {step} in epoch {epoch}: an epoch has {self.steps} steps")
        self.epoch, self.step = epoch, step

    def state_dict(self) -> dict[str, int]:
        """The position, which is all that a resumed loader needs.

        >>> loader.set_epoch(0)
        >>> loader.state_dict()
        {'epoch': 0, 'step': 0}
        """
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the position of a `state_dict`.

        >>> loader.load_state_dict({"epoch": 3, "step": 2})
        """
        self.set_position(**state)

    def __iter__(self) -> Iterator[ViewBatch]:
        epoch = self.epoch
        chosen = self.settings
        blocks = self.source.storage_blocks
        order = epoch_order(len(self.source), chosen.seed, epoch, chosen.order, blocks)

        def start(step: int) -> Callable[[], ViewBatch]:
            indices = step_indices(order, step, chosen.batch_size, chosen.rank, chosen.ranks)
            return self._start(indices.copy(), epoch)

        batches = in_order(start, range(self.step, self.steps), AHEAD)
        if self._on_device is not None:
            batches = self._on_device.each(batches, self._augmented)
        for batch in batches:
            self.step += 1  # before its use: a state saved after the step resumes with the next one
            yield batch if self._on_device is not None else self._augmented(batch)
        self.epoch, self.step = epoch + 1, 0

    def _augmented(self, batch: ViewBatch) -> ViewBatch:
        """Augment the batch, unless the workers have done so."""
        augmenter = self.settings.augmenter
        if augmenter is None or self.settings.crops_only:
            return batch
        crops = batch.views.permute(0, 1, 3, 4, 2).flatten(0, 1)
        views = augmenter(crops, batch.parameters.transpose(0, 1).flatten(0, 1), self.view)
        return replace(batch, views=views.unflatten(0, (self.settings.views, -1)))

    def _start(self, indices: np.ndarray, epoch: int) -> Callable[[], ViewBatch]:
        side, count, each = self.view.resolution, len(indices), self.settings.views
        here = self.settings.augments
        if here:
            views = self._buffers.take((each, count, side, side, 3), torch.float32)
        else:  # in the layout that the source fills, so that nothing is copied
            views = self._buffers.take((count, each, side, side, 3), torch.uint8)
        parameters = np.empty((count, each, P), np.float32)
        pixels = views.numpy() if views.device.type == "cpu" else views
        make = self._buffers.beside(partial(self._make, epoch, indices, parameters, pixels))
        at_once = images_a_call(self.source, side, each) if here else max(CROPPED, self.source.chunk)
        wait = self._threads.run(make, count, at_once)

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

    def _make(
        self, epoch: int, indices: np.ndarray, parameters: np.ndarray, pixels: Pixels, rows: slice
    ) -> None:
        """Make some rows of a batch: sizes -> parameters -> crops -> views; again if a sample is replaced."""
        indices, table, side = indices[rows], parameters[rows], self.view.resolution
        asked, here = indices.copy(), self.settings.augments
        crops = np.empty((*table.shape[:2], side, side, 3), np.uint8) if here else pixels[rows]
        while True:
            try:
                sizes = self.source.sizes(indices)
                table[:] = draw_parameters(
                    self.view, self.settings.seed, epoch, indices, *sizes, table.shape[1]
                )
                flips = table[..., FLIP] != 0 if self.settings.crops_only else None
                self._replacements.crops(indices, crop_boxes(table), crops, flips)
                break
            except DamagedSample as sample:
                self._replacements.replace(sample, indices, asked)
        for v in range(len(pixels) * here):
            assert isinstance(crops, np.ndarray) and isinstance(pixels, np.ndarray)
            cpu.augment_into(crops[:, v], table[:, v], self.view, pixels[v, rows])

    def close(self) -> None:
        """Stop the threads and wait for them.

        >>> loader.close()
        """
        self._threads.close()

    def __enter__(self) -> "TwoViewLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OnDevice:
    """Copies and augments on a stream of its own, one batch ahead of the one in use.

    A loader keeps one stream: torch's allocator has separate memory for each stream, so that a new one every
    epoch would allocate another epoch's memory each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.in_use: deque[torch.cuda.Event] = deque()  # ends of batches' use not yet reached by the device

    def each(
        self, batches: Iterator[ViewBatch], augmented: Callable[[ViewBatch], ViewBatch]
    ) -> Iterator[ViewBatch]:
        """Yield the batches on the device, for use on the stream that is current when they are yielded."""
        last = None
        for batch in batches:
            if batch.views.is_cuda:  # cropped there, on another stream, and complete
                batch.views.record_stream(self.stream)
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
        """Yield the batch; when the next is asked for, record an event after all work launched with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in vars(batch).values():  # so that memory isn't reused while in use
            tensor.record_stream(current)
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
    replacements: "Replacements | None" = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield each image, or each of `indices`, once and in order, as its centre crop without augmentation.

    Yields:
        crops uint8 [B, R, R, 3] (`pipelines.normalise` normalises them), indices int64 [B]; the last batch
        may be smaller. With `replacements` that skip, a damaged image is replaced by another one, as is its
        index; otherwise it raises DamagedSample.

    >>> for crops, indices in evaluation_batches(open_reader("photos"), ViewSettings(resolution=32), 8):
    ...     print(crops.shape, indices.tolist())
    torch.Size([8, 32, 32, 3]) [0, 1, 2, 3, 4, 5, 6, 7]
    torch.Size([4, 32, 32, 3]) [8, 9, 10, 11]
    """
    everything = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    replacements, side = replacements or Replacements(source), view.resolution
    buffers = Buffers(False, source.device)

    def start(first: int) -> Callable[[], tuple[Tensor, np.ndarray]]:
        chosen = everything[first : first + batch_size].copy()
        crops = buffers.take((len(chosen), 1, side, side, 3), torch.uint8)
        pixels = crops.numpy() if crops.device.type == "cpu" else crops

        def make(rows: slice) -> None:
            _centre_crops(view, chosen[rows], replacements, pixels[rows])

        wait = threads.run(buffers.beside(make), len(chosen), images_a_call(source, side))

        def finish() -> tuple[Tensor, np.ndarray]:
            wait()
            if crops.is_cuda:
                crops.record_stream(torch.cuda.current_stream(crops.device))
            return crops[:, 0], chosen

        return finish

    with Threads(workers) as threads:
        yield from in_order(start, range(0, len(everything), batch_size), AHEAD)


def images_a_call(source: Reader, side: int, views: int = 1) -> int:
    """The number of images to crop at once, into `views` of `side` pixels each.

    Small images are cropped many at a time, because each call holds the GIL for some microseconds, during
    which a training loop can't launch anything. The number is limited because a damaged image makes a call
    start again.
    """
    return max(source.chunk, CACHED // (views * side * side * 3))


def sent(images: Tensor, device: torch.device) -> Tensor:
    """Copy images to a device; to a GPU by way of page-locked memory, so that the host doesn't wait."""
    if images.is_cuda or device.type != "cuda":
        return images.to(device)
    return images.pin_memory().to(device, non_blocking=True)


def evaluation_crops(
    source: Reader, view: ViewSettings, indices: np.ndarray, replacements: "Replacements | None" = None
) -> np.ndarray:
    """Centre crops of some samples: uint8 [B, R, R, 3].

    Raises DamagedSample for a damaged sample; with `replacements` that skip, it is replaced, in `indices`
    too.

    >>> evaluation_crops(open_reader("photos"), ViewSettings(resolution=32), np.array([0, 5])).shape
    (2, 32, 32, 3)
    """
    crops = np.empty((len(indices), 1, view.resolution, view.resolution, 3), np.uint8)
    _centre_crops(view, indices, replacements or Replacements(source), crops)
    return crops[:, 0]


def _centre_crops(view: ViewSettings, indices: np.ndarray, replacements: "Replacements", out: Pixels) -> None:
    """Fill out uint8 [B, 1, R, R, 3]. Replaces damaged samples in `indices`."""
    asked = indices.copy()
    while True:
        try:
            boxes = centre_boxes(*replacements.source.sizes(indices), view.evaluation_crop)
            return replacements.crops(indices, boxes, out)
        except DamagedSample as sample:
            replacements.replace(sample, indices, asked)


class Replacements:
    """Replaces a damaged sample by the next good one in the set's own order, so that it is the same in every
    epoch, on every rank, and for any number of workers. With on_error="raise" nothing is replaced.

    Attributes:
        damaged: {index: reason} of those met so far. count: number of replacements.
    """

    def __init__(self, source: Reader, on_error: str = "raise") -> None:
        if on_error not in ON_ERROR:
            raise InputError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}")
        self.source, self.skip, self.keep = source, on_error != "raise", on_error == "keep"
        self.damaged: dict[int, str] = {}
        self.count = 0
        self._lock = threading.Lock()

    def crops(self, indices: np.ndarray, boxes: np.ndarray, out: Pixels, flips: Flips = None) -> None:
        """Like `Reader.crops`; with on_error="keep", it also crops what Pillow makes of a damaged JPEG."""
        try:
            self.source.crops(indices, boxes, out, flips)
        except DamagedSample:
            if not self.keep:
                raise
            flips = np.zeros(boxes.shape[:2], bool) if flips is None else flips
            for row in range(len(indices)):
                self._crop_or_keep(row, indices, boxes, out, flips)

    def _crop_or_keep(
        self, row: int, indices: np.ndarray, boxes: np.ndarray, out: Pixels, flips: np.ndarray
    ) -> None:
        part = slice(row, row + 1)
        try:
            self.source.crops(indices[part], boxes[part], out[part], flips[part])
        except DamagedSample as sample:
            pixels = decode_damaged(self.source.encoded(row, sample.index))
            kept = np.empty((1, *out.shape[1:]), np.uint8)
            if pixels is None or not crop_pixels(pixels, boxes[row], flips[row], kept[0]):
                raise DamagedSample(row, sample.index, str(sample)) from None
            put(torch.from_numpy(kept), out, [row])

    def replace(self, sample: DamagedSample, indices: np.ndarray, asked: np.ndarray) -> None:
        """Put another sample into `indices`, which were `asked` at first. Raises the sample if it may not be
        replaced, and InputError if there is no replacement."""
        if not self.skip:
            raise sample
        with self._lock:
            self.damaged[sample.index] = str(sample)
            after = ((sample.index + step) % len(self.source) for step in range(1, len(self.source)))
            index = next((index for index in after if index not in self.damaged), None)
            if index is None:
                raise InputError(f"none of {len(self.source)} samples can be decoded; the last: {sample}")
            self.count += int(indices[sample.row] == asked[sample.row])
            indices[sample.row] = index


class Buffers:
    """Memory for batches, reused once a batch's tensors are gone: fresh memory costs a page fault for every
    4 KB, which takes a tenth of the time of a 224 px crop.

    If a source crops on a GPU, its memory is there, and it crops on a stream used for nothing else. Memory
    that torch's allocator reuses on that stream is idle, so that a decoder with its own streams may write to
    it at once. If a batch is used on another stream, the caller must record that stream.
    """

    def __init__(self, pinned: bool, device: str = "cpu") -> None:
        self.pinned = pinned
        self.stream = torch.cuda.Stream(device) if device != "cpu" else None
        self._free: list[np.ndarray] = []

    def beside(self, make: Callable[[slice], None]) -> Callable[[slice], None]:
        """Run `make` on that stream, in whatever thread it is called."""

        def made(rows: slice) -> None:
            with torch.cuda.stream(self.stream):
                make(rows)

        return make if self.stream is None else made

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                return torch.empty(shape, dtype=dtype, device=self.stream.device)
        if self.pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch itself caches these
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
    """A fixed number of threads that share the rows of each batch."""

    def __init__(self, workers: int) -> None:
        if workers < 0:
            raise InputError(f"--workers must be at least 0, got {workers}")
        self.workers = loader_threads(workers)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="views")
        self._closed = False
        self._process = 0  # in which the threads run, once there are any

    def run(self, make: Callable[[slice], None], rows: int, chunk: int) -> Callable[[], None]:
        """Start make(part) on equal shares of `rows`, in chunks of `chunk` rows; the returned call waits, and
        raises what the threads raised."""
        if self._closed:
            raise RuntimeError("the loader is closed: make a new one")
        if self._process not in (0, os.getpid()):  # a fork has no threads, and would wait forever
            raise RuntimeError("a loader can't be used on after a fork: make one in each process")
        self._process = os.getpid()
        share = max(1, -(-rows // self.workers))

        def make_share(first: int) -> None:
            last = min(first + share, rows)
            for start in range(first, last, chunk):
                make(slice(start, min(start + chunk, last)))

        futures: list[Future[None]] = [
            self._pool.submit(make_share, first) for first in range(0, rows, share)
        ]

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
