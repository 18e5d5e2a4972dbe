"""A source and an augmentation -> batches of two views, made ahead of time by threads.

There is no state but a position: order, crops and colours are functions of (seed, epoch, index, view), so a
resumed loader is one that is told epoch and step. Threads are enough, for decoding, cropping and augmenting
all release the GIL; each takes a part of a batch, so that the first batch is not late.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import cpu
from pipelines.errors import InputError
from pipelines.order import epoch_order, step_indices, steps_per_epoch
from pipelines.parameters import P, centre_boxes, crop_boxes, draw_parameters
from pipelines.sources import Source
from pipelines.views import ViewSettings


@dataclass(frozen=True)
class ViewBatch:
    """Two views of B images.

    Attributes:
        views: float32 [2, B, 3, R, R], normalised; each view is channels-last in memory.
        labels: int64 [B].
        indices: int64 [B], positions in the data set.
        parameters: float32 [B, 2, P], see `pipelines.parameters.COLUMNS`.
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    parameters: Tensor

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
        workers: threads. ahead: batches made in advance.
        rank, ranks: this process's share of each batch.
        pin_memory: batches in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        InputError: the batch is larger than the data, or not divisible by the ranks.
    """

    def __init__(
        self,
        source: Source,
        view: ViewSettings,
        batch_size: int,
        seed: int = 0,
        workers: int = 2,
        ahead: int = 3,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        view.validate()
        if batch_size < 1 or batch_size % ranks:
            raise InputError(
                f"--batch-size must be a positive multiple of the {ranks} rank(s), got {batch_size}"
            )
        self.source, self.view, self.batch_size, self.seed = source, view, batch_size, seed
        self.rank, self.ranks, self.ahead, self.pin_memory = rank, ranks, ahead, pin_memory
        self.steps = steps_per_epoch(len(source), batch_size)
        self.epoch = self.step = 0
        self._threads = Threads(workers)

    def __len__(self) -> int:
        """Steps in an epoch: equal for all epochs and ranks."""
        return self.steps

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Go on from this step of this epoch."""
        self.epoch, self.step = epoch, step

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.set_position(**state)

    def __iter__(self) -> Iterator[ViewBatch]:
        order = epoch_order(len(self.source), self.seed, self.epoch)
        epoch = self.epoch

        def start(step: int) -> Callable[[], ViewBatch]:
            return self._start(step_indices(order, step, self.batch_size, self.rank, self.ranks), epoch)

        for batch in _ahead(start, range(self.step, self.steps), self.ahead):
            self.step += 1  # before the batch is used: a state saved after the step resumes behind it
            yield batch
        self.epoch, self.step = epoch + 1, 0

    def _start(self, indices: np.ndarray, epoch: int) -> Callable[[], ViewBatch]:
        source, side = self.source, self.view.resolution
        views = torch.empty((2, len(indices), side, side, 3), pin_memory=self.pin_memory)
        parameters = np.empty((len(indices), 2, P), np.float32)
        pixels = views.numpy()

        def make(part: slice) -> None:
            chosen = indices[part]
            table = draw_parameters(
                self.view, self.seed, epoch, chosen, source.heights[chosen], source.widths[chosen]
            )
            parameters[part] = table
            crops = np.empty((len(chosen), 2, side, side, 3), np.uint8)
            source.crops(chosen, crop_boxes(table), crops)
            for v in range(2):
                cpu.augment_into(crops[:, v], table[:, v], self.view, pixels[v, part])

        wait = self._threads.run(make, len(indices))

        def finish() -> ViewBatch:
            wait()
            return ViewBatch(
                views.permute(0, 1, 4, 2, 3),
                torch.from_numpy(source.labels[indices]),
                torch.from_numpy(indices.copy()),
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


def evaluation_batches(
    source: Source,
    view: ViewSettings,
    batch_size: int = 256,
    workers: int = 2,
    indices: np.ndarray | None = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Every image once, in order, as its centre crop without augmentation.

    Yields:
        images float32 [B, 3, R, R] (normalised, channels-last), indices int64 [B]; the last may be smaller.
    """
    everything = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    mean, std = cpu.statistics(view)

    def start(first: int) -> Callable[[], tuple[Tensor, np.ndarray]]:
        chosen = everything[first : first + batch_size]
        images = np.empty((len(chosen), view.resolution, view.resolution, 3), np.float32)

        def make(part: slice) -> None:
            crops = evaluation_crops(source, view, chosen[part])
            np.multiply(crops, 1 / (255 * std), out=images[part])
            images[part] -= mean / std

        wait = threads.run(make, len(chosen))

        def finish() -> tuple[Tensor, np.ndarray]:
            wait()
            return torch.from_numpy(images).permute(0, 3, 1, 2), chosen

        return finish

    with Threads(workers) as threads:
        yield from _ahead(start, range(0, len(everything), batch_size), 3)


def evaluation_crops(source: Source, view: ViewSettings, indices: np.ndarray) -> np.ndarray:
    """The centre crops of some samples: uint8 [B, R, R, 3]."""
    crops = np.empty((len(indices), 1, view.resolution, view.resolution, 3), np.uint8)
    boxes = centre_boxes(source.heights[indices], source.widths[indices], view.evaluation_crop)
    source.crops(indices, boxes, crops)
    return crops[:, 0]


class Threads:
    """A fixed number of threads that share the rows of a batch."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise InputError(f"--workers must be at least 1, got {workers}")
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="views")

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
