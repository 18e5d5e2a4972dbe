"""Tables with an image in each row: parquet files as on the Hugging Face Hub, and Arrow files as its library
`datasets` saves them (`save_to_disk`).

Where tables are in subfolders, the folders' names are splits: data/train-0.parquet, train/0.parquet,
default/train/0.parquet. The image column has one of the usual names, or is the only one that holds bytes.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.columns import IMAGES, LABELS, Columns, as_text, finite, numbered, unused
from pipelines.datasets.dataset import Dataset, by_name, check_labels, labelled
from pipelines.datasets.folders import files_of_split, is_folder
from pipelines.datasets.names import Names
from pipelines.datasets.recognise import ending_in, left_by_a_system, split_of_file
from pipelines.errors import InputError, first_line
from pipelines.formats import jpeg

ENDS = (".parquet", ".arrow")
DEEPEST = 3  # levels of folders between the given one and its tables
ENTRIES = 100  # entries of a folder that are looked at: one of images may have millions


def files_in(folder: Path) -> list[Path]:
    """The tables in a folder or its subfolders; empty if there are none. Raises InputError if they belong to
    several data sets."""
    if own := _tables(folder):
        return own
    below = _with_tables(folder, DEEPEST)
    sets = [name for name in below if split_of_file(name) is None]
    if len(sets) > 1 or (sets and len(below) > len(sets)):
        raise InputError(
            f"{folder}: holds several data sets ({', '.join(below)}); name one of them: {folder / sets[0]}"
        )
    return sorted(path for files in below.values() for path in files)


def _below(folder: Path, depth: int) -> list[Path]:
    own = _tables(folder)
    if own or depth == 1:
        return own
    return [path for files in _with_tables(folder, depth - 1).values() for path in files]


def _with_tables(folder: Path, depth: int) -> dict[str, list[Path]]:
    """The tables below each of a folder's folders. The first ENTRIES entries tell whether there are any."""
    found: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:
        for number, each in enumerate(entries):
            if number >= ENTRIES and not found:
                break
            own = not left_by_a_system(each.name) and is_folder(each)
            if own and (files := _below(folder / each.name, depth)):
                found[each.name] = files
    return dict(sorted(found.items()))


def _tables(folder: Path) -> list[Path]:
    """The tables right in a folder, without the cache-*.arrow files in which `datasets` keeps its results."""
    with os.scandir(folder) as entries:
        if not any(each.name.lower().endswith(ENDS) for each in islice(entries, ENTRIES)):
            return []
    return [path for path in ending_in(folder, *ENDS) if not path.name.startswith("cache-")]


def open_tables(
    source: Path, files: list[Path], split: str | None, columns: Columns, top: Path | None = None
) -> Dataset:
    """The rows of a split's tables. `top`: the folder whose subfolders may be splits. Raises InputError."""
    import pyarrow as pa

    files, split, notes = files_of_split(source, files, split, top=top)
    tables, names, path = [], Names(), files[0]
    try:
        for path in files:
            table = _Table.read(path, columns, path.name if top is None else str(path.relative_to(top)))
            tables.append(table)
            for row in range(sum(table.lengths)):
                names.append(f"{table.name}:{row}")
    except (pa.ArrowException, OSError) as error:
        kind = path.suffix.removeprefix(".")
        raise InputError(f"{path}: cannot be read as {kind} ({first_line(error)})") from error
    labels, classes = _one_numbering(str(source), tables)
    opened = labelled(
        str(source), names, labels, classes, _row_reader(tables), split, {"pyarrow": pa.__version__}
    )
    targets = {
        name: np.concatenate([table.targets[name] for table in tables])
        for name in tables[0].targets
        if all(name in table.targets for table in tables)
    }
    return replace(opened, targets=targets, notes=[*notes, *tables[0].notes])


def _opened(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(path) if path.suffix.lower() == ".parquet" else _Arrow(pa, path)


class _Arrow:
    """An Arrow file with the methods of a ParquetFile that are needed here; it is one row group."""

    def __init__(self, pa: Any, path: Path):
        data = pa.memory_map(str(path))
        try:
            self.table = pa.ipc.open_stream(data).read_all()
        except pa.ArrowInvalid:
            self.table = pa.ipc.open_file(data).read_all()
        self.schema_arrow = self.table.schema

    def read(self, columns: list[str]) -> Any:
        return self.table.select(columns)

    def read_row_group(self, _: int, columns: list[str]) -> Any:
        return self.read(columns)


@dataclass(frozen=True)
class _Table:
    """The parts of a table that are read at once."""

    path: Path
    name: str
    image: str  # name of the image column
    label: str | None
    values: Any  # the labels, a pyarrow ChunkedArray
    classes: list[str] | None  # class names, if the file has them
    lengths: list[int]  # rows per row group
    targets: dict[str, np.ndarray]
    notes: list[str]

    @staticmethod
    def read(path: Path, columns: Columns, name: str) -> _Table:
        import pyarrow as pa

        file = _opened(path)
        schema = file.schema_arrow
        image = _image_column(path, schema, columns)
        others = [each for each in schema.names if each != image]
        nested = [each for each in others if pa.types.is_nested(schema.field(each).type)]
        label = columns.label_among((e for e in others if e == columns.label or e not in nested), str(path))
        if isinstance(file, _Arrow):
            lengths = [file.table.num_rows]
        else:
            lengths = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        values = None if label is None else file.read([label])[label]
        others = [each for each in others if each != label]
        targets = _targets(path, file, others, columns)
        notes = [] if columns.targets is None else unused(each for each in others if each not in targets)
        if nested and columns.targets is None and label is None and columns.label is None:
            notes += [
                f"ignored column '{e}': it holds no single class" for e in nested if e.lower() in LABELS
            ]
        return _Table(path, name, image, label, values, _class_names(schema, label), lengths, targets, notes)

    def has_integers(self) -> bool:
        import pyarrow as pa

        return self.label is not None and pa.types.is_integer(self.values.type) and not self.values.null_count

    def texts(self) -> list[str]:
        """The labels as they are written, "" for none. Raises InputError, naming the row."""
        if self.label is None:
            return [""] * sum(self.lengths)
        texts: list[str] = []
        try:
            for value in self.values.to_pylist():
                texts.append(as_text(value))
        except ValueError as error:
            raise InputError(
                f"{self.name}:{len(texts)}: its column '{self.label}' must hold a class ({error}); choose "
                "another with convert-beton --label-column, or none"
            ) from error
        return texts

    def numbers(self) -> np.ndarray:
        """int64 [n], for a column of integers. Raises InputError, naming the row, if one doesn't fit."""
        numbers = self.values.to_numpy()
        if len(numbers) and numbers.max() > np.iinfo(np.int64).max:
            raise InputError(f"{self.path}:{int(numbers.argmax())} has label {numbers.max()}, over 2^63")
        return numbers.astype(np.int64)


def _image_column(path: Path, schema: Any, columns: Columns) -> str:
    """Find the image column. Raises InputError, listing the columns, if none is found or it has no bytes."""
    name = columns.image_among(schema.names, IMAGES, str(path))
    holding = [each for each in schema.names if _holds_bytes(schema.field(each).type)]
    if name is None and len(holding) == 1:
        return holding[0]
    if name is None:
        raise InputError(
            f"{path}: no column of images by a usual name ({', '.join(IMAGES)}); choose one of its "
            f"columns with --image-column: {', '.join(schema.names)}"
        )
    if name not in holding:
        raise InputError(
            f"{path}: its column '{name}' holds no image files ({schema.field(name).type}); columns that do: "
            f"{', '.join(holding) or 'none'}"
        )
    return name


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _targets(path: Path, file: Any, names: list[str], columns: Columns) -> dict[str, np.ndarray]:
    """Numeric columns, float64 [n]: the requested ones, or all that have a number in each row."""
    found = {}
    for name in names if columns.targets is None else columns.targets:
        if name not in names:
            raise InputError(f"{path}: no column '{name}' (--targets); its columns: {', '.join(names)}")
        if columns.targets is None and not _is_numeric(file.schema_arrow.field(name).type):
            continue
        numbers = [finite(value) for value in file.read([name])[name].to_pylist()]
        if None in numbers and columns.targets is not None:
            row = numbers.index(None)
            raise InputError(f"{path}:{row}: no finite number in column '{name}' (--targets)")
        if None not in numbers:
            found[name] = np.array(numbers, np.float64)
    return found


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The class names that `datasets` writes into the schema, or None."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _one_numbering(source: str, tables: list[_Table]) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 [N] of all tables and their classes, in the first table's order if it names them. Raises
    InputError if another table names a class that the first one lacks, or if only some tables have class
    names."""
    if not all(table.has_integers() for table in tables):
        texts = [text for table in tables for text in table.texts()]
        rows = [f"{table.name}:{row}" for table in tables for row in range(sum(table.lengths))]
        return numbered(texts, source, rows.__getitem__)
    first, parts = tables[0], []
    for table in tables:
        numbers = table.numbers()
        if (table.classes is None) != (first.classes is None):
            named, unnamed = (table, first) if first.classes is None else (first, table)
            raise InputError(f"{unnamed.path}: its labels have no names, those of {named.path.name} have")
        if table.classes != first.classes and len(numbers):
            assert table.classes is not None and first.classes is not None
            rows = [f"{table.name}:{row}" for row in range(len(numbers))]
            check_labels(str(table.path), numbers, table.classes, rows.__getitem__)
            numbers = by_name(numbers, table.classes, first.classes, str(table.path), str(first.path))
        parts.append(numbers)
    return np.concatenate(parts), first.classes


def _row_reader(tables: list[_Table]) -> Callable[[int], bytes]:
    """Return a function index -> image of that row."""
    import pyarrow as pa

    groups = [(table, number) for table in tables for number in range(len(table.lengths))]
    places = {table.path: table.path.absolute() for table in tables}  # the working folder may change
    lengths = [length for table in tables for length in table.lengths]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    lock = threading.Lock()  # a ParquetFile isn't thread-safe

    opened = functools.lru_cache(maxsize=8)(_opened)

    @functools.lru_cache(maxsize=8)  # so that a row group is read once for all its images
    def images_of(group: int) -> Any:
        table, number = groups[group]
        return opened(places[table.path]).read_row_group(number, [table.image])[table.image]

    def read(index: int) -> bytes:
        group = int(np.searchsorted(starts, index, side="right")) - 1
        with lock:
            try:
                cell = images_of(group)[index - int(starts[group])].as_py()
            except (pa.ArrowException, OSError) as error:
                kind = groups[group][0].path.suffix.removeprefix(".")
                raise jpeg.DamagedImage(f"the {kind} is damaged: {first_line(error)}") from error
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            path = cell.get("path") if isinstance(cell, dict) else None
            raise jpeg.DamagedImage("no bytes in this row" + (f", only the path {path}" if path else ""))
        return data

    return read
