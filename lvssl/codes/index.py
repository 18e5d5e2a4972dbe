"""Codes as an index: searched again and again, added to and deleted from, under the caller's own ids."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvssl.codes.asymmetric import table_search
from lvssl.codes.file import CodeFile
from lvssl.codes.quantiser import Quantiser
from lvssl.codes.search import hamming_search, staged_search
from pipelines.files import written_aside

CHUNK = 1 << 20  # codes at a time
QUERIES = 256  # of which tables are held, B KiB each


class Index:
    """Codes uint8 [N, B] and their ids, which are hashable and differ: names, numbers.

    `Index(quantiser=q)` begins empty; `Index.of_file` takes a code file's codes under their names, mapped
    until something is added or deleted. Without a quantiser codes are compared by Hamming distance alone.
    """

    def __init__(
        self,
        rows: np.ndarray | None = None,
        ids: Sequence[Any] = (),
        quantiser: Quantiser | None = None,
    ) -> None:
        self.quantiser, self.ids = quantiser, ids
        if rows is None:
            rows = np.empty(
                (0, quantiser.encode(quantiser.mean[None]).shape[1] if quantiser else 0), np.uint8
            )
        if rows.ndim != 2 or rows.dtype != np.uint8 or len(rows) != len(ids):
            raise ValueError(f"codes uint8 [{len(ids)}, B] are needed, not {rows.dtype} {list(rows.shape)}")
        self.rows = rows
        self._place: dict[Hashable, int] | None = None

    @classmethod
    def of_file(cls, codes: CodeFile, quantiser: Quantiser | None = None) -> Index:
        return cls(codes.rows, codes.names, quantiser)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> dict[Hashable, int]:
        """id -> row. Raises ValueError where two rows have one id."""
        if self._place is None:
            self._place = {one: row for row, one in enumerate(self.ids)}
            if len(self._place) < len(self.ids):
                self._place = None
                raise ValueError("two codes have the same id: they can't be told apart")
        return self._place

    def add(self, rows: np.ndarray, ids: Iterable[Hashable]) -> None:
        """Codes uint8 [n, B] and their n ids. Raises ValueError for shapes that don't match, and for an id
        that is there already; then nothing is added."""
        new = list(ids)
        width = self.rows.shape[1] or rows.shape[-1]
        if rows.dtype != np.uint8 or rows.shape != (len(new), width):
            raise ValueError(f"{len(new)} ids need codes uint8 [{len(new)}, {width}], not {list(rows.shape)}")
        known = {one for one in new if one in self.place}
        if known or len(set(new)) < len(new):
            raise ValueError(f"id {next(iter(known), 'twice in one call')!r} is in the index already")
        self._replace(np.concatenate([self.rows.reshape(-1, width), rows]), [*self.ids, *new])

    def delete(self, ids: Iterable[Hashable]) -> None:
        """Raises KeyError for an id that isn't there; then nothing is deleted."""
        stays = np.ones(len(self), bool)
        stays[[self.place[one] for one in ids]] = False
        self._replace(self.rows[stays], [self.ids[row] for row in np.flatnonzero(stays).tolist()])

    def _replace(self, rows: np.ndarray, ids: list[Any]) -> None:
        self.rows, self.ids, self._place = rows, ids, None

    def search(
        self, queries: np.ndarray, k: int, only: Iterable[Hashable] | None = None, threads: int = 0
    ) -> tuple[list[list[Any]], np.ndarray]:
        """(ids of the k nearest codes of each query, nearest first; their distances [Q, k]).

        `queries` and distances: as `nearest_rows`. `only`: the ids among which is searched. Raises ValueError
        for shapes that don't match and for k outside 1..N, KeyError for an unknown id in `only`.
        """
        rows, among = self.rows, None
        if only is not None:
            among = np.unique(np.array([self.place[one] for one in only], np.int64))
            rows = rows[among]
        found, distances = nearest_rows(queries, rows, k, self.quantiser, threads=threads)
        if among is not None:
            found = among[found]
        return [[self.ids[row] for row in of_query] for of_query in found.tolist()], distances

    def write_faiss(self, path: Path) -> None:
        """As `write_faiss`; there, ids are row numbers."""
        write_faiss(path, self.rows, self.quantiser)


def nearest_rows(
    queries: np.ndarray,
    rows: np.ndarray,
    k: int,
    quantiser: Quantiser | None = None,
    staged: bool = False,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [Q, k], distances [Q, k]), nearest first, ties by the lower row.

    Queries uint8 [Q, B] are codes: Hamming distances int32, or of a product code, which has none, squared
    Euclidean distances float32 of the decoded codes. Queries float32 [Q, D] are what the quantiser encodes:
    squared distances to the decoded codes. `staged`: Hamming distance in two stages (`staged_search`).
    """
    if queries.dtype == np.uint8 and (quantiser is None or quantiser.hamming):
        return (staged_search if staged else hamming_search)(queries, rows, k, threads=threads)
    if quantiser is None:
        raise ValueError("real-valued queries need the quantiser that made the codes")
    found = []
    for start in range(0, len(queries), QUERIES):
        part = queries[start : start + QUERIES]
        real = quantiser.decode(part) if part.dtype == np.uint8 else quantiser.project(part)
        found.append(table_search(quantiser.tables(real), rows, k, threads))
    if not found:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def write_faiss(path: Path, rows: np.ndarray, quantiser: Quantiser | None = None) -> None:
    """Codes uint8 [N, B] as an index that `faiss.read_index` (a product code) or `faiss.read_index_binary`
    (bits) reads.

    A product code's index takes real-valued queries, the features that the quantiser encodes, and gives the
    distances of `nearest_rows`; one of bits takes packed codes. Raises ImportError without faiss.
    """
    faiss: Any = importlib.import_module("faiss")  # whose types know nothing of its writers
    with written_aside(path) as file:
        writer = faiss.PyCallbackIOWriter(file.write)
        if quantiser is None or quantiser.hamming:
            binary = faiss.IndexBinaryFlat(8 * rows.shape[1])
            for start in range(0, len(rows), CHUNK):
                binary.add(np.ascontiguousarray(rows[start : start + CHUNK]))
            faiss.write_index_binary(binary, writer)
            return
        parts, _, width = quantiser.words.shape
        matrix = quantiser.projection / quantiser.scale[:, None]
        turn = faiss.LinearTransform(len(quantiser.mean), parts * width, True)
        faiss.copy_array_to_vector(np.ascontiguousarray(matrix.T).ravel(), turn.A)
        faiss.copy_array_to_vector(-(quantiser.mean @ matrix), turn.b)
        turn.is_trained = True
        product = faiss.IndexPQ(parts * width, parts, 8)
        faiss.copy_array_to_vector(quantiser.words.ravel(), product.pq.centroids)
        product.is_trained = True
        index = faiss.IndexPreTransform(turn, product)
        for start in range(0, len(rows), CHUNK):
            product.add_sa_codes(np.ascontiguousarray(rows[start : start + CHUNK]))
        index.ntotal, index.is_trained = product.ntotal, True
        faiss.write_index(index, writer)
