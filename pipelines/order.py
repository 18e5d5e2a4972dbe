"""The order of an epoch: an exact permutation that depends on (seed, epoch) alone, whatever the ranks."""

import numpy as np

from pipelines.errors import InputError
from pipelines.parameters import PAGE_STREAM, order_keys

ORDERS = ("random", "quasi-random", "sequential")
WINDOW = 64  # pages that are open at once in quasi-random order: 128 MB of a beton


def epoch_order(
    count: int, seed: int, epoch: int, kind: str = "random", pages: np.ndarray | None = None
) -> np.ndarray:
    """A permutation of range(count), int64 [count]; the same on every rank, for any worker count.

    Args:
        kind: `random`; `quasi-random`, for sets larger than memory: pages in random order, and samples
            shuffled among the pages of a window; or `sequential`.
        pages: int64 [count], the page of each sample, for quasi-random.
    """
    if kind not in ORDERS:
        raise InputError(f"unknown order {kind!r}; one of {', '.join(ORDERS)}")
    if kind == "sequential":
        return np.arange(count)
    keys = order_keys(seed, epoch, count)
    if kind == "random":
        return np.argsort(keys, kind="stable")
    assert pages is not None
    found, page = np.unique(pages, return_inverse=True)
    place = np.empty(len(found), np.int64)  # of each page in the epoch
    place[np.argsort(order_keys(seed, epoch, len(found), PAGE_STREAM), kind="stable")] = np.arange(len(found))
    return np.lexsort((keys, place[page] // WINDOW))


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full global batches an epoch, the same for every epoch and rank; the rest waits for another epoch.

    Raises:
        InputError: the batch is larger than the data.
    """
    if batch_size > count:
        raise InputError(
            f"the batch of {batch_size} is larger than the data set of {count} images: lower --batch-size"
        )
    return count // batch_size


def step_indices(order: np.ndarray, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """The rank's part of global batch `step`: disjoint parts, together the same for any number of ranks.

    Args:
        order: int64 [count], see `epoch_order`. batch_size: of all ranks together, divisible by `ranks`.
    """
    share = batch_size // ranks
    start = step * batch_size + rank * share
    return order[start : start + share]
