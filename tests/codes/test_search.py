"""Hamming search against brute force, with ties, odd widths and shapes at the blocks' edges."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvssl.codes import search
from lvssl.codes.hamming import TILE, keep_nearest
from lvssl.codes.search import hamming_distances, hamming_search, staged_search
from pipelines.kernels.pack import pack_bits


def random_bits(n, d, seed=0, on=0.5):
    return np.random.default_rng(seed).random((n, d)) < on


def brute_force(queries, database, k):
    """Rows and distances by comparing every bit; a stable sort leaves ties in the order of the rows."""
    truth = (queries[:, None, :] != database[None, :, :]).sum(axis=2)
    order = np.argsort(truth, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(truth, order, axis=1), truth


SHAPES = [
    (1, 1, 1, 1),  # everything single; D = 1
    (3, 50, 13, 50),  # padding within a byte and a word; k = N
    (5, TILE + 7, 64, 5),  # a whole tile and a bit
    (65, 2 * TILE, 8, 300),  # 9 distances only: nearly all are ties, over tiles
    (2, 3 * TILE, 520, 20),  # 9 words: one eight and one single
    (1, 1500, 1100, 3),  # 18 words: two eights and two; one query: threads share the rows
    (4, 700, 2048, 1),
    (0, 4, 8, 2),  # no query
]


@pytest.mark.parametrize(("q", "n", "d", "k"), SHAPES)
def test_search_agrees_with_brute_force(q, n, d, k):
    queries, database = random_bits(q, d, 1), random_bits(n, d, 2)
    order, near, truth = brute_force(queries, database, k)
    rows, distances = hamming_search(pack_bits(queries), pack_bits(database), k)
    assert rows.dtype == np.int64 and distances.dtype == np.int32
    assert np.array_equal(rows, order) and np.array_equal(distances, near)
    assert np.array_equal(hamming_distances(pack_bits(queries), pack_bits(database)), truth)


@settings(max_examples=60, deadline=None)
@given(
    q=st.integers(1, 4), n=st.integers(1, 40), d=st.integers(1, 20), seed=st.integers(0, 999), data=st.data()
)
def test_search_agrees_on_small_sets_full_of_ties(q, n, d, seed, data):
    k = data.draw(st.integers(1, n))
    queries, database = random_bits(q, d, seed), random_bits(n, d, seed + 1, on=0.2)
    order, near, _ = brute_force(queries, database, k)
    rows, distances = hamming_search(pack_bits(queries), pack_bits(database), k)
    assert np.array_equal(rows, order) and np.array_equal(distances, near)


@pytest.mark.parametrize("q", [1, 7])
def test_chunks_and_threads_change_nothing(monkeypatch, q):
    """A database in many chunks, ties across them, by one thread and by three."""
    bits = random_bits(q, 24, 5), random_bits(2000, 24, 6)
    whole, (queries, database) = brute_force(*bits, 40), map(pack_bits, bits)
    monkeypatch.setattr(search, "CHUNK_BYTES", 3 * 333)
    for threads in (1, 3):
        chunked = hamming_search(queries, database, 40, threads=threads)
        assert np.array_equal(chunked[0], whole[0]) and np.array_equal(chunked[1], whole[1])


def test_memory_does_not_grow_with_the_square_of_the_threads(monkeypatch):
    """15 queries by 16 threads: with buffers for a part of the rows, for five, and for one a thread."""
    bits = random_bits(15, 64, 7), random_bits(3000, 64, 8)
    whole, (queries, database) = brute_force(*bits, 500), map(pack_bits, bits)
    peaks = []
    for parts in (16, 1, 5, 16):  # the first compiles
        monkeypatch.setattr(search, "BUFFERS", parts * 8 * 15 * (2 * 500 + search.SPARE))
        tracemalloc.start()
        found = hamming_search(queries, database, 500, threads=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert np.array_equal(found[0], whole[0]) and np.array_equal(found[1], whole[1])
    assert 2 * peaks[1] < peaks[2] and 2 * peaks[2] < peaks[3]


def test_equal_codes_come_in_the_order_of_their_rows():
    """More ties than a buffer holds."""
    database = np.repeat(pack_bits(random_bits(2, 64, 3)), 5000, axis=0)
    rows, distances = hamming_search(database[-1:], database, 7)
    assert rows.tolist() == [list(range(5000, 5007))] and not distances.any()


def test_keep_nearest_keeps_the_order():
    distances = np.array([3, 1, 3, 0, 3, 2])
    keys = (distances << search.ROW_BITS) | np.arange(6)
    assert keep_nearest(keys, 4, np.zeros(65, np.int64)) == 3
    assert [(k >> search.ROW_BITS, k & 7) for k in keys[:4].tolist()] == [(3, 0), (1, 1), (0, 3), (2, 5)]


def test_a_database_that_is_neither_contiguous_nor_aligned(tmp_path):
    bits = random_bits(300, 128, 4)
    truth, database = brute_force(bits[:3], bits, 5), pack_bits(bits)
    strided = np.repeat(database, 2, axis=0)[::2]
    for odd in (np.asfortranarray(database), strided, misaligned(database, tmp_path)):
        assert np.array_equal(hamming_search(database[:3], odd, 5)[0], truth[0])
        staged = staged_search(database[:3], odd, 5, coarse_bits=64, candidates=300)
        assert np.array_equal(staged[0], truth[0])


def misaligned(database, folder):
    (folder / "rows").write_bytes(b"x" + database.tobytes())
    return np.memmap(folder / "rows", np.uint8, "r", offset=1, shape=database.shape)


# --- two stages -----------------------------------------------------------------------------------


def correlated(n, d, seed):
    """Sign bits of clustered low-rank features plus noise: distances spread as a network's do."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((16, d))
    centres = np.random.default_rng(98).standard_normal((n // 20 + 1, 16))
    latent = centres[generator.integers(0, len(centres), n)] + 0.3 * generator.standard_normal((n, 16))
    return pack_bits(latent @ mixing + 0.5 * generator.standard_normal((n, d)) > 0)


def test_two_stages_with_every_row_a_candidate_are_the_exact_search():
    queries, database = pack_bits(random_bits(9, 200, 1)), pack_bits(random_bits(500, 200, 2))
    exact = hamming_search(queries, database, 30)
    staged = staged_search(queries, database, 30, coarse_bits=64, candidates=500)
    assert np.array_equal(staged[0], exact[0]) and np.array_equal(staged[1], exact[1])


@pytest.mark.parametrize("bits", [200, 1024])
def test_two_stages_find_nearly_all_with_true_distances(bits):
    queries, database = correlated(50, bits, 1), correlated(5000, bits, 0)
    _, near = hamming_search(queries, database, 10)
    rows, distances = staged_search(queries, database, 10, coarse_bits=128, candidates=300)
    assert np.array_equal(distances, np.take_along_axis(hamming_distances(queries, database), rows, axis=1))
    assert (np.diff(distances, axis=1) >= 0).all()
    assert (distances <= near[:, -1:]).mean() >= 0.99
    default = staged_search(queries, database, 10, coarse_bits=64)
    assert np.array_equal(default[0], staged_search(queries, database, 10, coarse_bits=64, candidates=500)[0])
    few = staged_search(queries, database, 10, coarse_bits=64, candidates=10)
    assert (few[1] <= near[:, -1:]).mean() < 0.95  # so the figure above says something
    assert np.array_equal(few, staged_search(queries, database, 10, coarse_bits=1, candidates=3))  # in words


def test_two_stages_fall_back_where_there_is_nothing_to_save():
    queries, database = pack_bits(random_bits(2, 60, 1)), pack_bits(random_bits(30, 60, 2))
    for k in (1, 30):
        staged = staged_search(queries, database, k)
        assert np.array_equal(staged[0], hamming_search(queries, database, k)[0])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [hamming_search, staged_search])
def test_search_refuses_other_widths_and_impossible_k(function):
    a, b = pack_bits(random_bits(2, 8)), pack_bits(random_bits(2, 16))
    with pytest.raises(ValueError, match="1 bytes a code, the database 2"):
        function(a, b, 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match="between 1 and the 2 codes"):
            function(a, a, k)
    with pytest.raises(ValueError, match="the 0 codes"):
        function(a, a[:0], 1)
    with pytest.raises(ValueError, match="uint8"):
        function(a.astype(int), a, 1)
    with pytest.raises(ValueError, match="uint8"):
        function(a[:, :0], a[:, :0], 1)


def test_no_coarse_bits_are_refused():
    a = pack_bits(random_bits(2, 8))
    with pytest.raises(ValueError, match="coarse_bits"):
        staged_search(a, a, 1, coarse_bits=0)
