"""The order of an epoch: a permutation, as random as one that is drawn by sorting, the same for all ranks."""

import hashlib
import itertools

import numpy as np
import pytest
from old_order import old_order
from scipy.stats import chisquare, kstest

from pipelines.errors import InputError
from pipelines.order import epoch_order, permuted, step_indices, steps_per_epoch


def whole_order(count: int, *key: int | str, blocks: np.ndarray | None = None) -> np.ndarray:
    return epoch_order(count, *key, storage_blocks=lambda: blocks)(np.arange(count))


def test_an_epochs_order_is_a_permutation_of_its_own():
    orders = [whole_order(1000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**40, 0)]]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.02
    assert np.array_equal(orders[0], whole_order(1000, 0, 0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 99, 10_000, 10_001, 65_537])
def test_every_image_comes_once(count):
    assert np.array_equal(np.sort(permuted(np.arange(count), count, 3, 1)), np.arange(count))


@pytest.mark.parametrize("count", [10**9, (1 << 29) ** 2 + 1, 1 << 60])
def test_places_of_a_huge_set_are_computed_alone(count):
    """Some in the middle, alone and among others; images are spread over the whole set."""
    places = count // 2 + np.arange(4000)
    found = permuted(places, count, 0, 0)
    assert len(set(found.tolist())) == 4000 and found.min() >= 0 and found.max() < count
    assert np.array_equal(permuted(places[100:110], count, 0, 0), found[100:110])
    assert kstest(found / count, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("count", [3, 4, 5])
def test_each_permutation_of_a_small_set_is_as_likely(count):
    number = {order: n for n, order in enumerate(itertools.permutations(range(count)))}
    drawn = [number[tuple(permuted(np.arange(count), count, 1, epoch))] for epoch in range(40 * len(number))]
    assert chisquare(np.bincount(drawn, minlength=len(number))).pvalue > 1e-4


def by_philox_keys(count: int, epochs: int) -> np.ndarray:
    return np.stack([old_order(count, 5, epoch) for epoch in range(epochs)])


def by_feistel(count: int, epochs: int) -> np.ndarray:
    return np.stack([whole_order(count, 5, epoch) for epoch in range(epochs)])


@pytest.mark.parametrize("draw", [by_philox_keys, by_feistel])
@pytest.mark.parametrize("count", [12, 30])
def test_orders_are_random(draw, count):
    """Pairs of places, neighbours in an epoch, and the same place in two epochs: as sorting by keys has it.

    Half as many rounds of the Feistel network give a p below 1e-14 for the pairs.
    """
    orders = draw(count, 12_000)
    for one, other in [(0, 1), (0, 5), (3, count - 1), (count // 2, count // 2 + 1)]:
        pairs = np.bincount(orders[:, one] * count + orders[:, other], minlength=count**2)
        unequal = pairs.reshape(count, count)[~np.eye(count, dtype=bool)]
        assert chisquare(unequal).pvalue > 1e-4
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % count).ravel(), minlength=count)[1:]
    assert chisquare(steps).pvalue > 1e-4
    again = np.bincount(((orders[1:] - orders[:-1]) % count).ravel(), minlength=count)
    assert chisquare(again).pvalue > 1e-4


@pytest.mark.parametrize("draw", [by_philox_keys, by_feistel])
def test_batches_of_a_large_set_are_random(draw):
    """Neighbours in the set, which are often of one class, come as far apart, and classes as mixed, as by
    chance."""
    (order,) = draw(100_000, 1)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    far = np.abs(np.diff(place)[::2]) / len(order)
    assert kstest(far, "triang", args=(0,)).pvalue > 1e-4  # the distance of two uniform points
    classes = np.stack(
        [np.bincount(batch * 10 // len(order), minlength=10) for batch in order.reshape(-1, 500)]
    )
    assert 0.8 < classes.var(axis=0).mean() / (500 * 0.1 * 0.9) < 1.2


def test_the_order_that_epochs_had_first_is_reproduced():
    """Its digest, which was a golden value then."""
    digest = hashlib.sha256(old_order(10_000, 5, 2).tobytes()).hexdigest()
    assert digest == "ff06a36e1625a04349eb06807a7813e0017ad71ae42c56a22048124f272a6e77"


@pytest.mark.parametrize("kind", ["random", "quasi-random", "sequential"])
def test_every_order_is_the_same_permutation_for_all_ranks(kind):
    count, blocks = 10_000, np.arange(10_000) // 65
    whole = whole_order(count, 3, 1, kind, blocks=blocks)
    assert np.array_equal(np.sort(whole), np.arange(count))
    seen = [
        step_indices(epoch_order(count, 3, 1, kind, lambda: blocks), step, 64, rank, 4)
        for step in range(steps_per_epoch(count, 64))
        for rank in range(4)
    ]
    assert np.array_equal(np.concatenate(seen), whole[: count // 64 * 64])
    changed = not np.array_equal(whole, whole_order(count, 3, 2, kind, blocks=blocks))
    assert changed == (kind != "sequential")


@pytest.mark.parametrize("scattered", [False, True])
def test_quasi_random_opens_a_window_of_blocks_at_a_time(scattered):
    blocks = np.arange(50_000) // 65 * 3  # not every number is a block's
    if scattered:
        blocks = np.random.default_rng(0).permutation(blocks)
    order = whole_order(50_000, 0, 0, "quasi-random", blocks=blocks)
    assert np.array_equal(np.sort(order), np.arange(50_000))
    opened = [len(np.unique(blocks[order[start : start + 4160]])) for start in range(0, 50_000, 4160)]
    assert max(opened) <= 2 * 64  # at most two windows' blocks; a random order opens all 770
    drawn = blocks[order[: 64 * 65]] // 3
    assert len(np.unique(drawn)) == 64 and drawn.max() > 700  # the blocks of a window lie anywhere
    assert len(np.unique(drawn[:64])) > 30  # and their samples are shuffled within


def test_blocks_of_any_size_are_shuffled_once():
    blocks = np.repeat(np.arange(200), np.random.default_rng(1).integers(1, 9, 200))
    order = whole_order(len(blocks), 1, 1, "quasi-random", blocks=blocks)
    assert np.array_equal(np.sort(order), np.arange(len(blocks)))
    assert len(np.unique(blocks[order[: (blocks < 64).sum() // 2]])) <= 64


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_global_batches(ranks):
    order, whole = epoch_order(103, 5, 2), whole_order(103, 5, 2)
    for step in range(steps_per_epoch(103, 20)):
        parts = [step_indices(order, step, 20, rank, ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), whole[step * 20 : step * 20 + 20])


def test_a_batch_larger_than_the_data_is_refused():
    assert steps_per_epoch(20, 20) == 1
    with pytest.raises(InputError, match="larger than the data set of 19"):
        steps_per_epoch(19, 20)
