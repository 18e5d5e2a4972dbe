"""Exact nearest neighbours in Hamming distance, and a two-stage search that is exact on few candidates.

The database is read once, chunk by chunk, so that a memory-mapped file may be larger than memory. Rows at the
same distance are ordered by their index, so the result is unique.
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
BUFFERS = 256 << 20  # bytes, at most, if threads take parts of the rows
SPARE = 64  # places of a buffer beyond 2 k, so that for a small k it isn't pruned all the time

T = TypeVar("T")


def hamming_search(
    queries: np.ndarray, database: np.ndarray, k: int, *, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest rows of `database` for each query: (rows int64 [Q, k], distances int32 [Q, k]),
    nearest first, ties by the lower row.

    Both are packed codes, uint8 [Q, bytes] and [N, bytes]; `database` may be a memmap. `threads`: 0 means one
    per core. Raises ValueError if widths differ or k is outside 1..N.
    """
    check_packed(queries, database)
    check_k(k, len(database))
    return split(nearest_keys(queries, database, k, database.shape[1], threads))


def staged_search(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    *,
    coarse_bits: int = 512,
    candidates: int = 0,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """As `hamming_search`, but only the rows nearest in the first `coarse_bits` bits are compared in full.

    `candidates`: number of these rows; 0 means the larger of 50 k and a thousandth of all rows. Distances are
    exact. A neighbour whose prefix is far away is missed, so measure the recall on your codes; a prefix
    represents the whole if all bits carry equally much, as a network's do (`benchmarks.search` measures it).
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
    rows = np.sort(split(keys)[0], axis=1)
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
    """Find the k most similar posteriors among each query's candidates, rows int64 [Q, C]: (rows [Q, k],
    cosines float32 [Q, k] of the posteriors' means), most similar first, ties in the candidates' order.

    query_means [Q, D], means [N, D] (may be a memmap of float16). For Bernoulli bits, whose means are 2p - 1,
    the inner product is D - 2 E[Hamming distance of two samples], so bits of which the encoder isn't sure
    count less. Raises ValueError if shapes don't match or k is outside 1..C.
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
    """Compute all distances, int32 [Q, N], for sets small enough to hold them: 4 Q N bytes."""
    check_packed(queries, database)
    out, query_words = np.empty((len(queries), len(database)), dtype=np.int32), words(queries)
    for first, chunk in chunks(database):
        block = out[:, first : first + len(chunk)]

        def fill(part: slice, chunk: np.ndarray = chunk, block: np.ndarray = block) -> None:
            hamming.distances_into(query_words[part], chunk, block[part])

        in_threads(fill, slices(len(queries), thread_count(threads)))
    return out


# ---------------------------------------------------------------------------------------- the search


def nearest_keys(queries: np.ndarray, database: np.ndarray, k: int, width: int, threads: int) -> np.ndarray:
    """Return the sorted keys, int64 [Q, k], of the k nearest rows by the first `width` bytes.

    The queries are divided among the threads. If there are fewer queries than threads, the rows are divided,
    too, into as many parts as have room for buffers of their own, which are merged.
    """
    workers, places = thread_count(threads), 2 * k + SPARE
    room = BUFFERS // (8 * places * len(queries) or 1)
    parts = 1 if len(queries) >= workers else min(workers, max(1, room))
    query_words = words(queries[:, :width])
    best = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = query_words[start : start + QUERY_BLOCK]
        keys = np.full((parts, len(block), places), np.iinfo(np.int64).max)
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
            tasks = [
                (part, some, first + rows.start, chunk[rows])
                for part, rows in enumerate(slices(len(chunk), parts))
                for some in slices(len(block), workers // parts)
            ]
            in_threads(take, tasks)
        for part in range(parts):  # keys that were pruned from a buffer lie behind its end
            keys[part][np.arange(keys.shape[2]) >= held[part][:, None]] = np.iinfo(np.int64).max
        joined = np.concatenate(list(keys), axis=1)
        best[start : start + QUERY_BLOCK] = np.sort(np.partition(joined, k - 1, axis=1)[:, :k], axis=1)
    return best


# ---------------------------------------------------------------------------------------- its parts


def split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split keys into (rows int64, distances int32)."""
    return keys & ((1 << ROW_BITS) - 1), (keys >> ROW_BITS).astype(np.int32)


def chunks(database: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first row, uint64 [n, W]) for each CHUNK_BYTES; a view if rows are whole words."""
    size = max(1, CHUNK_BYTES // database.shape[1])
    for first in range(0, len(database), size):
        yield first, words(database[first : first + size])


def words(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, bytes] -> uint64 [N, ceil(bytes / 8)], padded with zeros, which add nothing to distances.

    The byte order is the machine's, which makes no difference to xor and bit count."""
    padding = -packed.shape[1] % 8
    if padding:
        packed = np.pad(packed, ((0, 0), (0, padding)))
    packed = np.ascontiguousarray(packed)
    if packed.ctypes.data % 8:
        packed = packed.copy()
    return np.asarray(packed).view(np.uint64)


def slices(count: int, parts: int) -> list[slice]:
    """Cut 0..count-1 into at most `parts` slices, none of them empty, as equal as possible."""
    ends = [count * i // max(parts, 1) for i in range(max(parts, 1) + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def in_threads(call: Callable[[T], None], tasks: list[T]) -> None:
    """Run call(task) for all tasks in parallel; the kernels release the GIL."""
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
