"""Exact nearest neighbours in Hamming distance, and a two-stage search that is exact on few candidates.

The database is read once, chunk by chunk, so that a memory-mapped file larger than memory streams through.
Rows at the same distance come in the order of their index: the answer is unique, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np

from lvssl.codes import hamming
from lvssl.codes.hamming import ROW_BITS
from pipelines.cores import cores

CHUNK_BYTES = 64 << 20  # of the database at a time
QUERY_BLOCK = 4096  # queries that go through the database together
SPARE = 64  # places of a buffer beyond 2 k, so that a small k is not sorted out all the time

# NumPy: 8,192 rows x 64 queries, whose distances (2 MB of int32) and two buffers stay in the cache.
NUMPY_ROWS, NUMPY_QUERIES = 8192, 64

ENGINES = ("numba", "faiss", "numpy")
T = TypeVar("T")


def hamming_search(
    queries: np.ndarray, database: np.ndarray, k: int, *, engine: str = "numba", threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of `database` for each query: (rows int64 [Q, k], distances int32 [Q, k]), nearest
    first, ties by the lower row.

    Both are packed codes, uint8 [Q, bytes] and [N, bytes]; `database` may be a memmap. `engine`: `numba`
    (the fastest), `faiss` (its binary index; the extra `faiss`) or `numpy` (the reference), which all give
    the same. `threads` of numba, 0: one a core. Raises ValueError for widths that differ, for k outside
    1..N and for an unknown engine, ImportError where faiss is asked for and missing.
    """
    check_packed(queries, database)
    check_k(k, len(database))
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if engine == "numba":
        return split(nearest_keys(queries, database, k, database.shape[1], threads))
    search = with_faiss if engine == "faiss" else with_numpy
    return split(search(queries, database, k))


def staged_search(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    *,
    coarse_bits: int = 512,
    candidates: int = 0,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """As `hamming_search`, but only the rows nearest in the first `coarse_bits` bits are compared whole.

    `candidates`: how many, 0: the larger of 50 k and a thousandth of the rows. Distances are exact; a
    neighbour whose prefix lies far away is missed, so measure the recall on your codes (a prefix stands for
    the whole where the bits carry alike much, as a network's do; `benchmarks.search` measures it).
    512 bits are one cache line of a row. Raises ValueError as `hamming_search`, and for no coarse bits.
    """
    check_packed(queries, database)
    check_k(k, len(database))
    if coarse_bits < 1:
        raise ValueError(f"coarse_bits must be at least 1, not {coarse_bits}")
    coarse_bytes = 8 * -(-coarse_bits // 64)
    if coarse_bytes >= database.shape[1]:
        return hamming_search(queries, database, k, threads=threads)
    asked = max(k, candidates or max(50 * k, len(database) // 1000))
    keys = nearest_keys(queries, database, min(asked, len(database)), coarse_bytes, threads)
    rows = np.sort(keys & ((1 << ROW_BITS) - 1), axis=1)
    query_words, exact = words(queries), np.empty_like(rows)

    def compare(part: slice) -> None:
        for i in range(part.start, part.stop):
            near = words(database[rows[i]])
            distances = np.empty((1, len(near)), np.int32)
            hamming.distances_into(query_words[i : i + 1], near, distances)
            exact[i] = (distances[0].astype(np.int64) << ROW_BITS) | rows[i]

    in_threads(compare, slices(len(queries), thread_count(threads)))
    exact.sort(axis=1)
    return split(exact[:, :k])


def rerank(
    query_means: np.ndarray, means: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each query's candidates rows int64 [Q, C] the k of most similar posterior: (rows [Q, k], cosines
    float32 [Q, k] between the posteriors' means), most similar first, ties in the order of the candidates.

    query_means [Q, D], means [N, D] (may be a memmap of float16). For Bernoulli bits, whose means are
    2p - 1, the inner product is D - 2 E[Hamming distance of two samples]: bits of which the encoder isn't
    sure count less. Raises ValueError for shapes that don't match and for k outside 1..C.
    """
    if query_means.ndim != 2 or means.ndim != 2 or query_means.shape[1] != means.shape[1]:
        raise ValueError(
            f"means [Q, D] and [N, D] are needed, not {list(query_means.shape)} and {list(means.shape)}"
        )
    if rows.ndim != 2 or len(rows) != len(query_means):
        raise ValueError(f"candidates [{len(query_means)}, C] are needed, not {list(rows.shape)}")
    check_k(k, rows.shape[1])
    best, cosines = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
    for i, candidates in enumerate(rows):
        m, q = means[candidates].astype(np.float32), query_means[i].astype(np.float32)
        length = np.linalg.norm(m, axis=1) * np.linalg.norm(q)
        cosine = m @ q / np.maximum(length, np.finfo(np.float32).tiny)
        order = np.argsort(-cosine, kind="stable")[:k]
        best[i], cosines[i] = candidates[order], cosine[order]
    return best, cosines


def hamming_distances(queries: np.ndarray, database: np.ndarray, threads: int = 0) -> np.ndarray:
    """All distances, int32 [Q, N]. For sets small enough to hold them: 4 Q N bytes."""
    check_packed(queries, database)
    out, query_words = np.empty((len(queries), len(database)), dtype=np.int32), words(queries)
    for first, chunk in chunks(database):
        block = out[:, first : first + len(chunk)]

        def fill(part: slice, chunk: np.ndarray = chunk, block: np.ndarray = block) -> None:
            hamming.distances_into(query_words[part], chunk, block[part])

        in_threads(fill, slices(len(queries), thread_count(threads)))
    return out


# ---------------------------------------------------------------------------------------- the engines


def nearest_keys(queries: np.ndarray, database: np.ndarray, k: int, width: int, threads: int) -> np.ndarray:
    """Keys int64 [Q, k], sorted, of the k nearest rows by the first `width` bytes. By numba.

    Several queries are shared out among the threads; for fewer queries than threads each takes a part of
    the rows, with buffers of its own, which are merged.
    """
    workers = thread_count(threads)
    parts = 1 if len(queries) >= workers else workers
    query_words = words(queries[:, :width])
    best = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = query_words[start : start + QUERY_BLOCK]
        keys = np.full((parts, len(block), 2 * k + SPARE), np.iinfo(np.int64).max)
        held = np.zeros((parts, len(block)), np.int64)
        limits = np.full((parts, len(block)), np.iinfo(np.uint64).max)

        def take(
            task: tuple[int, slice, int, np.ndarray],
            block: np.ndarray = block,
            keys: np.ndarray = keys,
            held: np.ndarray = held,
            limits: np.ndarray = limits,
        ) -> None:
            part, rows, first, chunk = task
            hamming.scan(block[rows], chunk, first, keys[part, rows], held[part, rows], limits[part, rows], k)

        for first, chunk in chunks(database):
            if parts == 1:
                tasks = [(0, rows, first, chunk) for rows in slices(len(block), workers)]
            else:
                everyone = slice(0, len(block))
                tasks = [
                    (part, everyone, first + rows.start, chunk[rows])
                    for part, rows in enumerate(slices(len(chunk), parts))
                ]
            in_threads(take, tasks)
        for part in range(parts):  # what a buffer held before it was sorted out lies behind its end
            keys[part][np.arange(keys.shape[2]) >= held[part][:, None]] = np.iinfo(np.int64).max
        joined = np.concatenate(list(keys), axis=1)
        best[start : start + QUERY_BLOCK] = np.sort(np.partition(joined, k - 1, axis=1)[:, :k], axis=1)
    return best


def with_faiss(queries: np.ndarray, database: np.ndarray, k: int) -> np.ndarray:
    """Keys int64 [Q, k] by faiss's binary index.

    Which of the rows at the k-th distance it returns is its own affair: some more are asked for, and where
    even these don't reach the next distance, all rows up to that distance.
    """
    import faiss

    queries = np.ascontiguousarray(queries)
    best = np.empty((len(queries), 0), np.int64)
    rows_at_a_time = max(1, CHUNK_BYTES // database.shape[1])
    for first in range(0, len(database), rows_at_a_time):
        chunk = np.ascontiguousarray(database[first : first + rows_at_a_time])
        index = faiss.IndexBinaryFlat(8 * chunk.shape[1])
        index.add(chunk)
        wanted, asked = min(k, len(chunk)), min(k + SPARE, len(chunk))
        distances, rows = index.search(queries, asked)
        keys = np.sort((distances.astype(np.int64) << ROW_BITS) | (rows + first), axis=1)
        if asked < len(chunk):
            for i in np.flatnonzero(distances[:, asked - 1] == distances[:, wanted - 1]):
                _, near, found = index.range_search(queries[i : i + 1], int(distances[i, wanted - 1]) + 1)
                tied = (near.astype(np.int64) << ROW_BITS) | (found + first)
                keys[i, :wanted] = np.sort(tied)[:wanted]
        best = np.sort(np.concatenate([best, keys[:, :wanted]], axis=1), axis=1)[:, :k]
    return best


def with_numpy(queries: np.ndarray, database: np.ndarray, k: int) -> np.ndarray:
    """Keys int64 [Q, k] by NumPy's bit count: the reference."""
    best = np.full((len(queries), k), np.iinfo(np.int64).max)
    for rows, first, distances in distance_blocks(queries, database):
        keys = distances.astype(np.int64) << ROW_BITS
        keys += np.arange(first, first + keys.shape[1])
        both = np.concatenate([best[rows], keys], axis=1)
        best[rows] = np.partition(both, k - 1, axis=1)[:, :k]
    return np.sort(best, axis=1)


def distance_blocks(queries: np.ndarray, database: np.ndarray) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Yields (slice of queries, first database row, distances [q, n]).

    Word by word rather than all words at once: the xor of a whole block would be [q, n, words] and leave the
    cache.
    """
    query_words = words(queries).T
    for first in range(0, len(database), NUMPY_ROWS):
        chunk = np.ascontiguousarray(words(database[first : first + NUMPY_ROWS]).T)
        for rows in slices(len(queries), -(-len(queries) // NUMPY_QUERIES)):
            distances = np.zeros((rows.stop - rows.start, chunk.shape[1]), np.int32)
            for query_word, chunk_word in zip(query_words[:, rows], chunk):
                distances += np.bitwise_count(query_word[:, None] ^ chunk_word[None, :])
            yield rows, first, distances


# ---------------------------------------------------------------------------------------- parts of them


def split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64, distances int32) of keys."""
    return keys & ((1 << ROW_BITS) - 1), (keys >> ROW_BITS).astype(np.int32)


def chunks(database: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of its first row, uint64 [n, W]) of CHUNK_BYTES each; a view where rows are whole words."""
    size = max(1, CHUNK_BYTES // database.shape[1])
    for first in range(0, len(database), size):
        yield first, words(database[first : first + size])


def words(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, bytes] -> uint64 [N, ceil(bytes / 8)], padded with zeros, which differ from nothing.

    In the machine's byte order, which is all the same to xor and bit count."""
    padding = -packed.shape[1] % 8
    if padding:
        packed = np.pad(packed, ((0, 0), (0, padding)))
    packed = np.ascontiguousarray(packed)
    if packed.ctypes.data % 8:
        packed = packed.copy()
    return np.asarray(packed).view(np.uint64)


def slices(count: int, parts: int) -> list[slice]:
    """At most `parts` slices of 0..count-1, none of them empty, as equal as can be."""
    ends = [count * i // max(parts, 1) for i in range(max(parts, 1) + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def in_threads(call: Callable[[T], None], tasks: list[T]) -> None:
    """call(task) of each, side by side. The kernels release the GIL."""
    if len(tasks) < 2:
        for task in tasks:
            call(task)
        return
    with ThreadPoolExecutor(len(tasks)) as pool:
        list(pool.map(call, tasks))


def thread_count(threads: int) -> int:
    return threads or cores()


def check_packed(queries: np.ndarray, database: np.ndarray) -> None:
    for name, codes in (("queries", queries), ("database", database)):
        if codes.ndim != 2 or codes.dtype != np.uint8 or not codes.shape[1]:
            raise ValueError(
                f"{name}: packed codes are uint8 [N, bytes], not {codes.dtype} {list(codes.shape)}"
            )
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} bytes a code, the database {database.shape[1]}")


def check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"k must lie between 1 and the {count} codes there are, not {k}")
