"""A CSV or JSONL file of paths, optionally with class labels, regression targets or both.

    path,label                  path,age,height            {"path": "a.jpg", "label": 3, "age": 41.5}
    cats/1.jpg,cat              1.jpg,41.5,1.78            {"path": "b.jpg", "label": 0, "age": 29}

Columns are found by their usual names (`columns`), in any case. Paths are relative to the table. Classes are
numbers from 0, or names, which are sorted and numbered. A column requested as a target must have a number in
every row; it becomes an FFCV FloatField in the beton.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.columns import NONE, PATHS, RESERVED, Columns, as_text, finite, numbered, unused
from pipelines.datasets.dataset import Dataset, labelled
from pipelines.datasets.folders import read_regular
from pipelines.datasets.names import Names
from pipelines.errors import InputError, first_line


def open_table(path: Path, columns: Columns) -> Dataset:
    """Open a table. Raises InputError, naming the row, if a row has no path, no label though others have one,
    or no number for a requested target."""
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: contains no images")
    path_column = columns.image_among(first, PATHS, str(path))
    if path_column is None and len(first) == 1 and re.search("[;\t]", next(iter(first))):
        raise InputError(
            f"{path}: its columns are separated by semicolons or tabs: save it as a .csv with commas"
        )
    if path_column is None:
        raise InputError(
            f"{path}: no column of paths by a usual name ({', '.join(PATHS)}); choose one of its "
            f"columns with --image-column: {', '.join(first)}"
        )
    label_column = columns.label_among((name for name in first if name != path_column), str(path))
    names, texts, notes = Names(), Names(), list[str]()
    values = {name: array("d") for name in _target_columns(path, first, columns, (path_column, label_column))}
    if columns.targets is not None:
        notes += unused(name for name in first if name not in (path_column, label_column, *values))
    for number, row in enumerate(chain([first], rows)):
        names.append(_path(path, number, row, path_column))
        if label_column is None and columns.label is None and row.keys() != first.keys():
            _require_no_class(path, number, row, path_column, columns)
        texts.append("" if label_column is None else _class(path, number, row, label_column))
        for name in list(values):
            value = finite(row.get(name))
            if value is not None:
                values[name].append(value)
            elif columns.targets is None:
                notes.append(f"ignored column {name}: no finite number in row {number + 1}")
                del values[name]
            else:
                raise InputError(f"{path}: row {number + 1}: no finite number in column {name} (--targets)")
    labels, classes = numbered(texts, str(path), lambda row: f"row {row + 1}")
    folder = str(path.parent.absolute())  # the working folder may change before an image is read

    def read(index: int) -> bytes:
        try:
            return read_regular(os.path.join(folder, names[index]))
        except FileNotFoundError as error:
            if os.path.isabs(names[index]):
                raise
            why = f"no such file next to {path.name}, where paths are looked up"
            raise FileNotFoundError(errno.ENOENT, why, names[index]) from error

    opened = labelled(str(path), names, labels, classes, read, None)
    return replace(
        opened,
        targets={name: np.array(column, np.float64) for name, column in values.items()},
        notes=notes,
        size_of=lambda index: os.stat(os.path.join(folder, names[index])).st_size,
    )


def _target_columns(
    path: Path, row: dict[str, Any], columns: Columns, others: tuple[str | None, ...]
) -> list[str]:
    """The requested target columns, or else all eligible ones. A column without a name is pandas' index."""
    if columns.targets is None:
        return [name for name in row if name and name not in (*others, *RESERVED)]
    for name in columns.targets:
        if name not in row:
            raise InputError(f"{path}: no column '{name}' (--targets); its columns: {', '.join(row)}")
    return list(columns.targets)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows one by one: all at once would take more memory than the rest of a conversion."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                table = csv.DictReader(file, skipinitialspace=True)
                table.fieldnames = [name.strip() for name in table.fieldnames or ()]
                for number, row in enumerate(table, 1):
                    if beyond := [text for text in row.pop(None, ()) if text.strip()]:
                        raise InputError(
                            f"{path}: row {number} has more fields than there are columns "
                            f"({beyond[0][:30]!r}); put a field that has commas in double quotes"
                        )
                    yield row
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", None) or first_line(error)
                    raise InputError(f"{path}: line {number} is not JSON ({why})") from error
                if not isinstance(row, dict):
                    raise InputError(
                        f'{path}: line {number} must be an object, such as {{"path": "1.jpg", "label": 0}}'
                    )
                yield row
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def _path(table: Path, number: int, row: dict[str, Any], column: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise InputError(f"{table}: row {number + 1} has no {column}")
    return name


def _require_no_class(
    table: Path, number: int, row: dict[str, Any], path_column: str, columns: Columns
) -> None:
    """Raise InputError if a row of a .jsonl has a class although the first row has none."""
    if column := columns.label_among((name for name in row if name != path_column), str(table)):
        raise InputError(
            f"{table}: row {number + 1} has a {column}, row 1 has none; add it, or leave the classes out "
            f"(convert-beton --label-column {NONE})"
        )


def _class(table: Path, number: int, row: dict[str, Any], column: str) -> str:
    try:
        return as_text(row.get(column))
    except ValueError as error:
        raise InputError(f"{table}: row {number + 1}: no class in its column {column} ({error})") from error
