"""Exact nearest neighbours in Hamming distance, by NumPy's bit count over 64-bit words.

The database is read once, chunk by chunk, so that a memory-mapped file larger than memory streams through;
what is held is one chunk, one block of distances, and the k best of every query.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# 8,192 rows x 64 queries: the block of distances (1 MB of int16) and its two buffers stay in the cache.
DATABASE_CHUNK = 8192
QUERY_BLOCK = 64

# A key is distance << 40 | row: one integer whose order is "nearer first, then the lower row".
ROW_BITS = 40


def hamming_search(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of `database` for each query: (rows int64 [Q, k], distances int32 [Q, k]), nearest
    first.

    Both are packed codes, uint8 [Q, bytes] and [N, bytes]; `database` may be a memmap. Rows at the same
    distance come in the order of their index, so the answer is unique. Raises ValueError for widths that
    differ, and for k outside 1..N.
    """
    check_packed(queries, database)
    count = len(database)
    if not 1 <= k <= count:
        raise ValueError(f"k must lie between 1 and the {count} codes there are, not {k}")
    best_Qk = np.full((len(queries), k), np.iinfo(np.int64).max)
    for rows, first, distances_qn in distance_blocks(queries, database):
        keys_qn = distances_qn.astype(np.int64) << ROW_BITS
        keys_qn += np.arange(first, first + keys_qn.shape[1])
        both = np.concatenate([best_Qk[rows], keys_qn], axis=1)
        best_Qk[rows] = np.partition(both, k - 1, axis=1)[:, :k]
    best_Qk.sort(axis=1)
    return best_Qk & ((1 << ROW_BITS) - 1), (best_Qk >> ROW_BITS).astype(np.int32)


def hamming_distances(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """All distances, int32 [Q, N]. For sets small enough to hold them: 4 Q N bytes."""
    check_packed(queries, database)
    distances_QN = np.empty((len(queries), len(database)), dtype=np.int32)
    for rows, first, distances_qn in distance_blocks(queries, database):
        distances_QN[rows, first : first + distances_qn.shape[1]] = distances_qn
    return distances_QN


def distance_blocks(queries: np.ndarray, database: np.ndarray) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Yields (slice of queries, first database row, distances [q, n]); the array is reused by the next block.

    Word by word rather than all words at once: the xor of a whole block would be [q, n, words] and leave the
    cache.
    """
    queries_WQ = words(queries).T
    xor = np.empty((QUERY_BLOCK, DATABASE_CHUNK), dtype=np.uint64)
    ones = np.empty((QUERY_BLOCK, DATABASE_CHUNK), dtype=np.uint8)
    distances = np.empty((QUERY_BLOCK, DATABASE_CHUNK), dtype=np.int32)
    for first in range(0, len(database), DATABASE_CHUNK):
        chunk_Wn = np.ascontiguousarray(words(database[first : first + DATABASE_CHUNK]).T)
        n = chunk_Wn.shape[1]
        for start in range(0, len(queries), QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, len(queries)))
            q = rows.stop - rows.start
            xor_qn, ones_qn, distances_qn = xor[:q, :n], ones[:q, :n], distances[:q, :n]
            distances_qn[...] = 0
            for query_word, chunk_word in zip(queries_WQ[:, rows], chunk_Wn):
                np.bitwise_xor(query_word[:, None], chunk_word[None, :], out=xor_qn)
                np.add(distances_qn, np.bitwise_count(xor_qn, out=ones_qn), out=distances_qn)
            yield rows, first, distances_qn


def words(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, bytes] -> uint64 [N, ceil(bytes / 8)], padded with zeros, which differ from nothing."""
    padding = -packed.shape[1] % 8
    if padding:
        packed = np.pad(packed, ((0, 0), (0, padding)))
    return np.ascontiguousarray(packed).view(np.uint64)


def check_packed(queries: np.ndarray, database: np.ndarray) -> None:
    for name, codes in (("queries", queries), ("database", database)):
        if codes.ndim != 2 or codes.dtype != np.uint8:
            raise ValueError(
                f"{name}: packed codes are uint8 [N, bytes], not {codes.dtype} {list(codes.shape)}"
            )
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} bytes a code, the database {database.shape[1]}")
