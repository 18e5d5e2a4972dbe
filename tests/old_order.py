"""The first version's order of an epoch: samples sorted by one Philox number each."""

import numpy as np

from pipelines.kernels.philox import LOW, philox


def order_keys(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a uniform uint64 for each sample."""
    index = np.arange(count)
    words = philox(index & LOW, index >> 32, epoch, 0xFFFF << 16, seed & LOW, seed >> 32)
    return (words[0].astype(np.uint64) << np.uint64(32)) | words[1].astype(np.uint64)


def old_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(order_keys(seed, epoch, count), kind="stable")
