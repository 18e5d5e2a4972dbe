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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert.beton import LONGEST_NAME
from pipelines.convert.readers import Source, labelled, read_regular
from pipelines.errors import InputError

PATHS, LABELS = ("path", "file", "filename", "image"), ("label", "class")


def open_table(path: Path) -> Source:
    """Raises InputError, naming the line, if a row has no path, no label, or a label of another kind."""
    rows = _read(path)
    columns = list(rows[0])
    path_column = next((name for name in PATHS if name in columns), None)
    label_column = next((name for name in LABELS if name in columns), None)
    if path_column is None:
        raise InputError(f"{path}: no column {' or '.join(PATHS)} (its columns: {', '.join(columns)})")
    targets, notes = {}, []
    for name in columns:
        if name in (path_column, label_column):
            continue
        values = [_float(row.get(name)) for row in rows]
        if any(value is None for value in values):
            line = values.index(None) + (2 if path.suffix == ".csv" else 1)
            notes.append(f"column {name} is left out: no finite number in line {line}")
        elif len(name.encode()) > LONGEST_NAME or name == "image":
            raise InputError(f"{path}: column {name}: a target's name has at most {LONGEST_NAME} bytes")
        else:
            targets[name] = np.array(values, np.float64)
    if label_column is None and not targets:
        raise InputError(f"{path}: no column {' or '.join(LABELS)}, and no numbers to regress")
    labels, classes = _labels(path, rows, label_column)
    names = [_path(path, number, row, path_column) for number, row in enumerate(rows)]
    files = [str(path.parent / name) for name in names]
    opened = labelled(str(path), names, labels, classes, lambda index: read_regular(files[index]), None)
    return replace(opened, targets=targets, notes=notes)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not rows:
        raise InputError(f"{path}: no image in it")
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path}: every line must be an object, such as {{"path": "1.jpg", "label": 0}}')
    return rows


def _path(table: Path, number: int, row: dict[str, Any], column: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise InputError(f"{table}: row {number + 1} has no {column}")
    return name


def _labels(
    table: Path, rows: list[dict[str, Any]], column: str | None
) -> tuple[np.ndarray, list[str] | None]:
    if column is None:
        return np.zeros(len(rows), np.int64), None
    values = [row.get(column) for row in rows]
    for number, value in enumerate(values):
        if value is None or value == "" or isinstance(value, (bool, float, dict, list)):
            raise InputError(f"{table}: row {number + 1} has no class in its column {column}, but {value!r}")
    try:
        return np.array([int(value) for value in values], np.int64), None  # type: ignore[arg-type]
    except ValueError:
        pass
    classes = sorted({str(value) for value in values})
    if len(classes) > 2 and all(_float(name) is not None for name in classes):
        raise InputError(f"{table}: its column {column} holds fractions; call it otherwise to regress them")
    number_of = {name: i for i, name in enumerate(classes)}
    return np.array([number_of[str(value)] for value in values], np.int64), classes


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
