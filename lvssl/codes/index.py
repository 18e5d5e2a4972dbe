"""An index of codes under the caller's own ids, which can be searched, added to, deleted from and saved."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lvssl.codes.asymmetric import table_search
from lvssl.codes.file import CodeFile, CodeFileError, decode_name, encode_name
from lvssl.codes.quantiser import Quantiser
from lvssl.codes.search import check_packed, hamming_search, staged_search
from pipelines.files import write_atomically, written_aside
from pipelines.kernels.pack import as_array, packed_bytes

KIND, VERSION = "lvssl index", "1"
CHUNK = 1 << 20  # codes at a time
QUERIES = 256  # whose tables are held at a time, B KiB each


class Index:
    """Codes uint8 [N, B] and their ids, which are hashable and distinct, such as names or numbers. Codes and
    queries are arrays or tensors.

    `Index(quantiser=q)` starts empty. `Index.of_file` takes a code file's codes under their names, mapped
    until something is added or deleted. Without a quantiser, Hamming distance alone compares codes.
    """

    def __init__(self, rows: Any = None, ids: Sequence[Any] = (), quantiser: Quantiser | None = None) -> None:
        self.quantiser, self.ids = quantiser, ids
        if rows is None:
            rows = np.empty((0, packed_bytes(quantiser.bits) if quantiser else 0), np.uint8)
        rows = as_array(rows)
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
        """Map of id -> row. Raises ValueError if two rows have the same id."""
        if self._place is None:
            self._place = {one: row for row, one in enumerate(self.ids)}
            if len(self._place) < len(self.ids):
                self._place = None
                raise ValueError("two codes have the same id: they can't be told apart")
        return self._place

    def add(self, rows: Any, ids: Iterable[Hashable]) -> None:
        """Add codes uint8 [n, B] under n ids. Raises ValueError, and adds nothing, if shapes don't match or
        an id is in the index already."""
        new, rows = list(ids), as_array(rows)
        width = self.rows.shape[1] or rows.shape[-1]
        if rows.dtype != np.uint8 or rows.shape != (len(new), width):
            raise ValueError(
                f"{len(new)} ids need codes uint8 [{len(new)}, {width}], not {rows.dtype} {list(rows.shape)}"
            )
        known = {one for one in new if one in self.place}
        if known or len(set(new)) < len(new):
            raise ValueError(f"id {next(iter(known), 'twice in one call')!r} is in the index already")
        self._replace(np.concatenate([self.rows.reshape(-1, width), rows]), [*self.ids, *new])

    def delete(self, ids: Iterable[Hashable]) -> None:
        """Delete the codes with these ids. Raises KeyError, and deletes nothing, if an id isn't there."""
        stays = np.ones(len(self), bool)
        stays[[self.place[one] for one in ids]] = False
        self._replace(self.rows[stays], [self.ids[row] for row in np.flatnonzero(stays).tolist()])

    def _replace(self, rows: np.ndarray, ids: list[Any]) -> None:
        self.rows, self.ids, self._place = rows, ids, None

    def search(
        self, queries: Any, k: int, only: Iterable[Hashable] | None = None, threads: int = 0
    ) -> tuple[list[list[Any]], np.ndarray]:
        """Return (ids of the k nearest codes of each query, nearest first; their distances [Q, k]).

        `queries` and distances are as for `nearest_rows`. `only`: search among these ids alone. Raises
        ValueError if shapes don't match, k is outside 1..N, there is no code or a query isn't finite, and
        KeyError for an unknown id in `only`.
        """
        rows, among = self.rows, None
        if only is not None:
            among = np.unique(np.array([self.place[one] for one in only], np.int64))
            rows = rows[among]
        if not len(rows):
            raise ValueError(
                "the index is empty: add codes first" if among is None else "`only` names no code"
            )
        found, distances = nearest_rows(as_array(queries), rows, k, self.quantiser, threads=threads)
        if among is not None:
            found = among[found]
        return [[self.ids[row] for row in of_query] for of_query in found.tolist()], distances

    def save(self, path: str | Path) -> None:
        """Write codes, ids and quantiser to a safetensors file for `Index.open`, atomically. Raises
        ValueError unless the ids are all strings, or all 64-bit integers."""
        arrays = {"rows": np.ascontiguousarray(self.rows)}
        if (numbers := whole_numbers(self.ids)) is not None:
            arrays["numbers"] = numbers
        elif all(isinstance(one, str) for one in self.ids):
            texts = [encode_name(one) for one in self.ids]
            arrays["ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
            arrays["texts"] = np.frombuffer(b"".join(texts), np.uint8)
        else:
            raise ValueError("ids can be saved if they are all texts or all whole numbers of 64 bits")
        if self.quantiser is not None:
            arrays |= {f"quantiser.{name}": array for name, array in asdict(self.quantiser).items()}
        about = {KIND: f"{VERSION} {digest(arrays)}"}  # one field: safetensors writes several in any order
        write_atomically(Path(path), save(arrays, about))

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Read what `save` wrote, into memory. Raises CodeFileError if there is no such file, or it isn't an
        index, is truncated, damaged, or of another version."""
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CodeFileError(f"{path}: can't be read as an index ({error})") from error
        version, _, sha256 = about.get(KIND, "").partition(" ")
        if not version:
            raise CodeFileError(f"{path}: not an index; `Index.save` writes one")
        if version != VERSION:
            raise CodeFileError(
                f"{path}: format version {version}, this release reads {VERSION}; save the index again"
            )
        if sha256 != digest(arrays):
            raise CodeFileError(f"{path}: damaged: its contents aren't those that were saved; save it again")
        if "numbers" in arrays:
            ids: list[Any] = arrays["numbers"].tolist()
        else:
            text, ends = arrays["texts"].tobytes(), arrays["ends"].tolist()
            ids = [decode_name(text[start:end]) for start, end in zip([0, *ends], ends)]
        start = "quantiser."
        fitted = {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}
        return cls(arrays["rows"], ids, Quantiser(**fitted) if fitted else None)

    def write_faiss(self, path: str | Path) -> None:
        """As the function `write_faiss`, under these ids if they are integers, else under row numbers."""
        write_faiss(Path(path), self.rows, self.quantiser, whole_numbers(self.ids))


def whole_numbers(ids: Sequence[Any]) -> np.ndarray | None:
    """Return the ids as int64 [N], or None if one is anything else, or there are none."""
    whole = (isinstance(one, int | np.integer) and not isinstance(one, bool) for one in ids)
    if not len(ids) or not all(whole):
        return None
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        return None


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256, in hex, of arrays and their names."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def nearest_rows(
    queries: np.ndarray,
    rows: np.ndarray,
    k: int,
    quantiser: Quantiser | None = None,
    staged: bool = False,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows int64 [Q, k], distances [Q, k]), nearest first, ties by the lower row.

    Queries uint8 [Q, B] are codes. Their distances are Hamming distances, int32, or for a product code, which
    has none, squared Euclidean distances between decoded codes, float32. Queries float32 [Q, D] are features
    that the quantiser encodes; their distances are squared Euclidean ones to the decoded codes, float32.
    `staged`: search by Hamming distance in two stages (`staged_search`). Raises ValueError if shapes don't
    match, k is outside 1..N, or a distance isn't finite.
    """
    if queries.dtype == np.uint8 and (quantiser is None or quantiser.hamming):
        return (staged_search if staged else hamming_search)(queries, rows, k, threads=threads)
    if quantiser is None:
        raise ValueError("real-valued queries need the quantiser that made the codes")
    if queries.dtype == np.uint8:
        check_packed(queries, rows)
    found = []
    for start in range(0, len(queries), QUERIES):
        part = queries[start : start + QUERIES]
        real = quantiser.decode(part) if part.dtype == np.uint8 else quantiser.project(part)
        found.append(table_search(quantiser.tables(real), rows, k, threads))
    if not found:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def write_faiss(
    path: Path, rows: np.ndarray, quantiser: Quantiser | None = None, ids: np.ndarray | None = None
) -> None:
    """Write codes uint8 [N, B] as an index for `faiss.read_index` (a product code) or
    `faiss.read_index_binary` (bits).

    The index of a product code takes real-valued queries, the features that the quantiser encodes, and
    returns the distances of `nearest_rows`; that of bits takes packed codes. `ids`, int64 [N]: faiss returns
    these (by an IndexIDMap2) instead of row numbers. faiss's `reconstruct` of a product code is wrong,
    because faiss has no transform that undoes the standardisation; use `Quantiser.decode`. Raises ImportError
    without faiss.
    """
    faiss: Any = importlib.import_module("faiss")  # its types lack its writers
    binary = quantiser is None or quantiser.hamming
    index = codes = faiss.IndexBinaryFlat(8 * rows.shape[1])
    if quantiser is not None and not binary:
        parts, _, width = quantiser.words.shape
        matrix = quantiser.projection / quantiser.scale[:, None]
        turn = faiss.LinearTransform(len(quantiser.mean), parts * width, True)
        faiss.copy_array_to_vector(np.ascontiguousarray(matrix.T).ravel(), turn.A)
        faiss.copy_array_to_vector(-(quantiser.mean @ matrix), turn.b)
        turn.is_trained = True
        codes = faiss.IndexPQ(parts * width, parts, 8)
        faiss.copy_array_to_vector(quantiser.words.ravel(), codes.pq.centroids)
        codes.is_trained = True
        index = faiss.IndexPreTransform(turn, codes)
    named = index
    if ids is not None:
        named = (faiss.IndexBinaryIDMap2 if binary else faiss.IndexIDMap2)(index)
        faiss.copy_array_to_vector(np.ascontiguousarray(ids, np.int64), named.id_map)
    add = codes.add if binary else codes.add_sa_codes
    for start in range(0, len(rows), CHUNK):
        add(np.ascontiguousarray(rows[start : start + CHUNK]))
    for each in (index, named):
        each.ntotal, each.is_trained = codes.ntotal, True
    with written_aside(path) as file:
        write = faiss.write_index_binary if binary else faiss.write_index
        write(named, faiss.PyCallbackIOWriter(file.write))
