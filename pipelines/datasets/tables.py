"""A CSV or JSONL of paths: with class labels, with regression targets, or with both.

    path,label                  path,age,height            {"path": "a.jpg", "label": 3, "age": 41.5}
    cats/1.jpg,cat              1.jpg,41.5,1.78            {"path": "b.jpg", "label": 0, "age": 29}

The path column is `path`, `file`, `filename` or `image`, relative to the table; the class column is `label`
or `class`: numbers from 0, or names, which are sorted and numbered. Every other column with a number in every
row is a regression target, and FFCV's FloatField in the beton.
"""

from __future__ import annotations

import csv
import json
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.dataset import Dataset, labelled
from pipelines.datasets.folders import read_regular
from pipelines.datasets.names import Names
from pipelines.errors import InputError, first_line
from pipelines.formats.beton import LONGEST_NAME

PATHS, LABELS = ("path", "file", "filename", "image"), ("label", "class")


def open_table(path: Path) -> Dataset:
    """Raises InputError, naming the line, if a row has no path, no label, or a label of another kind."""
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: no image in it")
    columns = list(first)
    path_column = next((name for name in PATHS if name in columns), None)
    label_column = next((name for name in LABELS if name in columns), None)
    if path_column is None:
        raise InputError(f"{path}: no column {' or '.join(PATHS)} (its columns: {', '.join(columns)})")
    names, labels, notes = Names(), Names(), []
    values = {name: array("d") for name in columns if name not in (path_column, label_column)}
    for number, row in enumerate(chain([first], rows)):
        names.append(_path(path, number, row, path_column))
        if label_column is not None:
            labels.append(_label(path, number, row, label_column))
        for name in list(values):
            value = _float(row.get(name))
            if value is None:
                line = number + (2 if path.suffix == ".csv" else 1)
                notes.append(f"column {name} is left out: no finite number in line {line}")
                del values[name]
            else:
                values[name].append(value)
    for name in values:
        if len(name.encode()) > LONGEST_NAME or name == "image":
            raise InputError(f"{path}: column {name}: a target's name has at most {LONGEST_NAME} bytes")
    if label_column is None and not values:
        raise InputError(f"{path}: no column {' or '.join(LABELS)}, and no numbers to regress")
    numbers, classes = _numbered(path, labels, label_column, len(names))
    folder = str(path.parent)

    def read(index: int) -> bytes:
        return read_regular(os.path.join(folder, names[index]))

    opened = labelled(str(path), names, numbers, classes, read, None)
    return replace(
        opened,
        targets={name: np.array(column, np.float64) for name, column in values.items()},
        notes=notes,
        size_of=lambda index: os.stat(os.path.join(folder, names[index])).st_size,
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """One after the other: all at once, they would take more memory than all else in a conversion."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", None) or first_line(error)
                    raise InputError(f"{path}: line {number} is no JSON ({why})") from error
                if not isinstance(row, dict):
                    raise InputError(
                        f'{path}: line {number} must be an object, such as {{"path": "1.jpg", "label": 0}}'
                    )
                yield row
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def _path(table: Path, number: int, row: dict[str, Any], column: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise InputError(f"{table}: row {number + 1} has no {column}")
    return name


def _label(table: Path, number: int, row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value == "" or isinstance(value, (bool, float, dict, list)):
        raise InputError(f"{table}: row {number + 1} has no class in its column {column}, but {value!r}")
    return str(value)


def _numbered(
    table: Path, labels: Names, column: str | None, count: int
) -> tuple[np.ndarray, list[str] | None]:
    """Labels as numbers, int64 [N]; and the classes, where they are names."""
    if column is None:
        return np.zeros(count, np.int64), None
    try:
        return np.fromiter((int(label) for label in labels), np.int64, count), None
    except OverflowError as error:
        row = next(row for row, label in enumerate(labels) if not -(2**63) <= int(label) < 2**63)
        raise InputError(f"{table}: row {row + 1} has label {labels[row]}, over 64 bits") from error
    except ValueError:
        pass
    classes = sorted(set(labels))
    if len(classes) > 2 and all(_float(name) is not None for name in classes):
        raise InputError(f"{table}: its column {column} holds fractions; call it otherwise to regress them")
    number_of = {name: i for i, name in enumerate(classes)}
    return np.fromiter((number_of[label] for label in labels), np.int64, count), classes


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
