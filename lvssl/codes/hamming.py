"""Hamming distances in numba, by tiles of the database that stay in the cache for one query after another.

    q  queries   W  64-bit words of a code   R = TILE  rows of a tile   k  neighbours

A tile is the words of R rows, transposed to [W, R], so that R distances are summed side by side in vector
registers. LLVM makes AVX2 shuffles of `popcount`; carry-save adders in front of it halve their number (8
words -> 4 counts). Also tried: row by row without transposing (0.8 of the speed), and adder trees of 16 words
(no difference). All distances would not fit in memory: a query keeps the k nearest so far and a few more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from pipelines.kernels.compiled import compiled

TILE = 256  # rows: 64 KB of 2,048-bit codes beside the queries in a 512 KB cache
ONE, TWO = np.uint64(1), np.uint64(2)

# A key is distance << 40 | row: one integer whose order is "nearer first, then the lower row".
ROW_BITS = 40


def ctpop(typing_context: Any, word: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


popcount: Any = intrinsic(ctpop)  # number of bits that are on in a uint64


@njit(inline="always")
def full_add(a, b, c):
    """Return (sum, carry) of three bits, in each of 64 places."""
    half = a ^ b
    return half ^ c, (a & b) | (half & c)


@compiled()
def add_eight(q, tile, distances):
    """distances [R] += popcount(q [8] ^ tile [8, R])."""
    q0, q1, q2, q3, q4, q5, q6, q7 = q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]
    for r in range(distances.shape[0]):
        s1, c1 = full_add(q0 ^ tile[0, r], q1 ^ tile[1, r], q2 ^ tile[2, r])
        s2, c2 = full_add(q3 ^ tile[3, r], q4 ^ tile[4, r], s1)
        ones, c3 = full_add(q5 ^ tile[5, r], q6 ^ tile[6, r], s2)
        twos, fours = full_add(c1, c2, c3)
        distances[r] += popcount(ones) + popcount(q7 ^ tile[7, r])
        distances[r] += (popcount(twos) << ONE) + (popcount(fours) << TWO)


@compiled()
def add_one(q, tile, distances):
    """distances [R] += popcount(q ^ tile [R])."""
    for r in range(distances.shape[0]):
        distances[r] += popcount(q ^ tile[r])


@compiled()
def tile_distances(q, tile, distances):
    """distances uint64 [R] = the distances between q [W] and tile [W, R]."""
    distances[:] = 0
    w = 0
    while w + 8 <= q.shape[0]:
        add_eight(q[w : w + 8], tile[w : w + 8], distances)
        w += 8
    while w < q.shape[0]:
        add_one(q[w], tile[w], distances)
        w += 1


@compiled()
def transpose(rows, tile):
    """Fill tile [W, R] from the first W words of rows [R, >= W]."""
    for r in range(rows.shape[0]):
        for w in range(tile.shape[0]):
            tile[w, r] = rows[r, w]


@compiled()
def scan(queries, database, first, keys, held, limits, k):
    """Merge the rows of `database` into the k nearest of each query.

    queries uint64 [Q, W]; database uint64 [N, >= W], whose row 0 is number `first`; keys int64 [Q, > k], the
    buffers; held int64 [Q], how much of each is in use; limits uint64 [Q], the distance from which on a row
    is too far. Rows must come in ascending order over the calls, so that a later tie never counts.
    """
    counts = np.zeros(64 * queries.shape[1] + 1, np.int64)
    tile = np.empty((queries.shape[1], TILE), np.uint64)
    distances = np.empty(TILE, np.uint64)
    for start in range(0, database.shape[0], TILE):
        rows = database[start : start + TILE]
        n = rows.shape[0]
        transpose(rows, tile)
        for i in range(queries.shape[0]):
            tile_distances(queries[i], tile, distances)
            limit, used = limits[i], held[i]
            for r in range(n):
                if distances[r] < limit:
                    keys[i, used] = (np.int64(distances[r]) << ROW_BITS) | (first + start + r)
                    used += 1
                    if used == keys.shape[1]:
                        limit = keep_nearest(keys[i], k, counts)
                        used = k
            limits[i], held[i] = limit, used


@compiled()
def keep_nearest(keys, k, counts):
    """Move the k smallest keys to the front, in their order, and return the distance of the farthest of them.

    Distances are counted, not compared. Ties go to the lower row, because keys come in the order of rows.
    """
    for i in range(keys.shape[0]):
        counts[keys[i] >> ROW_BITS] += 1
    last, room = 0, k
    while counts[last] < room:
        room -= counts[last]
        last += 1
    counts[:] = 0
    used = 0
    for i in range(keys.shape[0]):
        distance = keys[i] >> ROW_BITS
        if distance < last or (distance == last and room > 0):
            if distance == last:
                room -= 1
            keys[used] = keys[i]
            used += 1
    return np.uint64(last)


@compiled()
def distances_into(queries, database, out):
    """out int32 [Q, N] = the distances between queries uint64 [Q, W] and database uint64 [N, W]."""
    tile = np.empty((queries.shape[1], TILE), np.uint64)
    distances = np.empty(TILE, np.uint64)
    for start in range(0, database.shape[0], TILE):
        rows = database[start : start + TILE]
        transpose(rows, tile)
        for i in range(queries.shape[0]):
            tile_distances(queries[i], tile, distances)
            for r in range(rows.shape[0]):
                out[i, start + r] = distances[r]


@compiled()
def count_distances(queries, database, query_labels, labels, counts, relevant):
    """Add to counts and relevant, int32 [Q, 64 W + 1], how many rows lie at each distance, and how many of
    them have the query's label."""
    tile = np.empty((queries.shape[1], TILE), np.uint64)
    distances = np.empty(TILE, np.uint64)
    for start in range(0, database.shape[0], TILE):
        rows = database[start : start + TILE]
        transpose(rows, tile)
        for i in range(queries.shape[0]):
            tile_distances(queries[i], tile, distances)
            for r in range(rows.shape[0]):
                counts[i, distances[r]] += 1
                relevant[i, distances[r]] += labels[start + r] == query_labels[i]
