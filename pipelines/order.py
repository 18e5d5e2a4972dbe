"""The order of an epoch: an exact permutation that depends on (seed, epoch) alone."""

import numpy as np

from pipelines.errors import InputError
from pipelines.parameters import order_keys


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of range(count), int64 [count]; the same on every rank, for any worker count."""
    return np.argsort(order_keys(seed, epoch, count), kind="stable")


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
