"""The order of an epoch: a permutation that depends only on (seed, epoch), for any number of ranks.

The image at any place of an epoch is computed in constant time and without a table, so that a rank computes
only its own batches. A Feistel network with Philox as its round function permutes a square of at least as
many cells as there are images; the two halves of a number are its row and column (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"). Results beyond the last image are permuted again until they aren't
("cycle walking").
"""

from collections.abc import Callable

import numpy as np
from numba import int64

from pipelines.errors import InputError
from pipelines.kernels.compiled import compiled
from pipelines.kernels.philox import LOW
from pipelines.parameters import philox_compiled

ORDERS = ("random", "quasi-random", "sequential")
WINDOW = 64  # storage blocks open at once in quasi-random order: 128 MB of a beton
ROUNDS = 8  # with four, a chi-squared test finds a pattern in sets of 30 images
IMAGES, BLOCKS = 0xFFFF, 0xFFFE  # streams of Philox, above the view numbers in `pipelines.parameters`

Order = Callable[[np.ndarray], np.ndarray]  # places in the epoch -> positions in the data set, both int64


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    kind: str = "random",
    storage_blocks: Callable[[], np.ndarray] | None = None,
) -> Order:
    """A permutation of range(count) as a function; the same on every rank and for any number of workers.

    Args:
        count: at most 2^60, so that a half of a number fits into a word of Philox's counter.
        seed: 0 <= seed < 2^64. epoch: 0 <= epoch < 2^32.
        kind: `random`; `quasi-random`, for sets larger than memory: storage blocks in random order, and
            samples shuffled among the blocks of a window; or `sequential`. Only quasi-random takes memory:
            32 bytes per block, and 8 per image if the blocks aren't in the order of the images.
        storage_blocks: returns int64 [count], the block of each sample, for quasi-random.
    """
    if kind == "sequential":
        return lambda places: places
    if kind == "random":
        return lambda places: permuted(places, count, seed, epoch)
    assert storage_blocks is not None
    return _by_blocks(storage_blocks(), seed, epoch)


def permuted(
    places: np.ndarray, count: int, seed: int, epoch: int, stream: int = IMAGES, windows: np.ndarray | int = 0
) -> np.ndarray:
    """A keyed permutation of range(count) at some places, int64 [n]: 0 <= place < count.

    `windows` is part of the key, below 2^28; if it is an array, `count` is one as well.
    """
    shape = np.shape(places)
    out = np.empty(shape, np.int64)
    sides = np.sqrt(np.asarray(count, np.float64)).astype(np.int64)  # side of the square, rounded up below
    sides += sides * sides < count
    sides += sides & 1  # an odd side would exclude half of a small set's permutations
    each = [np.array(np.broadcast_to(np.int64(n), shape)) for n in (places, count, sides, windows)]
    _permute(*each, np.uint64(seed), np.uint64(epoch), np.uint64(stream), out)
    return out


@compiled()
def _permute(places, counts, sides, windows, seed, epoch, stream, out):
    seed = int64(seed)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for n in range(len(places)):
        side, count, at = sides[n], counts[n], places[n]
        while True:
            row, column = at // side, at % side
            for each in range(ROUNDS):
                words = philox_compiled(
                    column, windows[n] << 4 | each, int64(epoch), int64(stream) << 16, k0, k1
                )
                row, column = column, (row + (words[0] * side >> 32)) % side
            at = row * side + column
            if at < count:
                break
        out[n] = at


def _by_blocks(block_of: np.ndarray, seed: int, epoch: int) -> Order:
    """Blocks in random order, with the samples of every WINDOW blocks shuffled."""
    in_order = bool((block_of[1:] >= block_of[:-1]).all())
    samples = None if in_order else np.argsort(block_of, kind="stable")
    block_of = block_of if samples is None else block_of[samples]
    first = np.append(0, 1 + np.flatnonzero(block_of[1:] != block_of[:-1]))
    sizes = np.diff(first, append=len(block_of))
    drawn = permuted(np.arange(len(first)), len(first), seed, epoch, BLOCKS)
    ends = np.cumsum(sizes[drawn])  # of the blocks in the epoch's order
    starts = first[drawn]
    window_ends = np.append(ends[WINDOW - 1 : -1 : WINDOW], ends[-1:])
    window_starts = np.append(0, window_ends[:-1])

    def order(places: np.ndarray) -> np.ndarray:
        window = np.searchsorted(window_ends, places, side="right")
        begins = window_starts[window]
        count = window_ends[window] - begins
        places = begins + permuted(places - begins, count, seed, epoch, IMAGES, window)
        block = np.searchsorted(ends, places, side="right")
        found = starts[block] + places - (ends[block] - sizes[drawn[block]])
        return found if samples is None else samples[found]

    return order


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full global batches per epoch, the same for every epoch and rank; leftover images wait for another
    epoch.

    Raises:
        InputError: the data set has fewer than two images, or the batch is larger than it.
    """
    if count < 2:
        raise InputError(f"a data set of {count} image: training needs at least two: pass more with --data")
    if batch_size > count:
        raise InputError(
            f"the batch of {batch_size} is larger than the data set of {count} images: lower --batch-size"
        )
    return count // batch_size


def step_indices(order: Order, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """The rank's part of global batch `step`. Parts are disjoint; their union is the same for any number of
    ranks.

    Args:
        order: see `epoch_order`. batch_size: of all ranks together, divisible by `ranks`.
    """
    share = batch_size // ranks
    start = step * batch_size + rank * share
    return order(np.arange(start, start + share))
