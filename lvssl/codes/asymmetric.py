"""Exact nearest codes of real-valued queries. What each byte of a code adds to the distance is looked up.

    Q  queries   N  codes   B  bytes of a code

The same search serves binary and product codes (`lvssl.codes.quantiser`). The tables of one query take B KiB
and stay in the cache. The codes are read chunk by chunk, so that a mapped file may be larger than memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lvssl.codes.search import CHUNK_BYTES, check_k, in_threads, slices, thread_count
from pipelines.kernels.compiled import compiled


def table_search(
    tables: np.ndarray, database: np.ndarray, k: int, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows with the smallest sums of table entries: (rows int64 [Q, k], sums float32 [Q, k]),
    smallest first, ties by the lower row.

    tables float32 [Q, B, 256] (`Quantiser.tables`), database uint8 [N, B], which may be mapped. Raises
    ValueError if shapes don't match, k is outside 1..N, or a query's sums aren't finite.
    """
    if tables.ndim != 3 or database.ndim != 2 or tables.shape[1:] != (database.shape[1], 256):
        raise ValueError(
            f"tables [Q, {database.shape[-1]}, 256] are needed for these codes, not {list(tables.shape)}"
        )
    check_k(k, len(database))
    tables, workers = np.ascontiguousarray(tables, np.float32), thread_count(threads)
    parts = 1 if len(tables) >= workers else workers  # of a chunk; if 1, the queries are divided
    sums = np.full((parts, len(tables), k), np.inf, np.float32)
    rows = np.full((parts, len(tables), k), -1, np.int64)
    size = max(1, CHUNK_BYTES // database.shape[1])
    for first in range(0, len(database), size):
        chunk = np.ascontiguousarray(database[first : first + size])

        def take(task: tuple[int, slice, slice], chunk: np.ndarray = chunk, first: int = first) -> None:
            part, of_queries, of_rows = task
            start = first + of_rows.start
            scan(tables[of_queries], chunk[of_rows], start, sums[part, of_queries], rows[part, of_queries])

        everything, everyone = slice(0, len(chunk)), slice(0, len(tables))
        if parts == 1:
            in_threads(take, [(0, some, everything) for some in slices(len(tables), workers)])
        else:
            in_threads(take, [(p, everyone, some) for p, some in enumerate(slices(len(chunk), parts))])
    joined_sums, joined_rows = np.concatenate(list(sums), axis=1), np.concatenate(list(rows), axis=1)
    order = np.lexsort((joined_rows, joined_sums))[:, :k]
    found = np.take_along_axis(joined_rows, order, axis=1)
    if (lost := found.min(axis=1, initial=0) < 0).any():  # NaN and infinity are never among the smallest
        raise ValueError(f"query {int(lost.argmax())}: its distances aren't finite")
    return found, np.take_along_axis(joined_sums, order, axis=1)


@compiled()
def scan(tables: Any, database: Any, first: int, sums: Any, rows: Any) -> None:
    """Merge the rows of `database`, whose row 0 is number `first`, into the k best of each query, the ordered
    sums and rows [Q, k]. Rows come in ascending order over the calls, so ties keep the lower row."""
    k = sums.shape[1]
    for q in range(tables.shape[0]):
        table, best, found = tables[q], sums[q], rows[q]
        limit = best[k - 1]
        for r in range(database.shape[0]):
            total = np.float32(0)
            for b in range(database.shape[1]):
                total += table[b, database[r, b]]
            if total < limit:
                place = k - 1
                while place > 0 and best[place - 1] > total:
                    best[place], found[place] = best[place - 1], found[place - 1]
                    place -= 1
                best[place], found[place] = total, first + r
                limit = best[k - 1]
