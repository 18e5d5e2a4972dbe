"""Measurements as rows, one for each value, whichever command made them.

run             the name of the run, or of the arm of a study; "random encoder", "no encoder"
representation  what was measured: features, code, pixels; uncertainty, probe (its probabilities)
method          how it was obtained: code (the run's own), sign, ITQ ... for codes; the score for an
                uncertainty; empty if there is only one method
bits            stored per image; None if nothing is stored
metric          linear, knn (percent), map_over_hits, map_over_relevant, r_auroc ...
value           a number; None in a file if it isn't finite
seed            of the run
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
Point = tuple[str, str, int | None, Mapping[str, Any]]  # representation, method, bits, its metrics
COLUMNS = ("run", "representation", "method", "bits", "metric", "value", "seed")
FOREIGN = "ood "  # prefix of the metric of an AUROC for out-of-distribution images; then the set's name
POINT = ("run", "representation", "method", "bits", "seed")  # all but the metric and its value


def rows_of_points(run: str, seed: int, points: Iterable[Point]) -> list[Row]:
    """Return the rows of one run's measurements."""
    return [
        dict(zip(COLUMNS, (run, representation, method, bits, metric, value, seed)))
        for representation, method, bits, metrics in points
        for metric, value in metrics.items()
    ]


def are_rows(found: Any) -> bool:
    """Whether a file's rows have this format; results of an older version had a row for each point."""
    return isinstance(found, list) and all(isinstance(row, dict) and "metric" in row for row in found)


def wrong_row(rows: Iterable[Row]) -> str:
    """Describe the first row that lacks a column or has a value of another kind; "" if none does."""
    kinds = {"bits": int | float | None, "value": int | float | None, "seed": int}
    for number, row in enumerate(rows, 1):
        for column in COLUMNS:
            if not isinstance(row.get(column, ...), kinds.get(column, str)):
                return f"row {number} has no {column}"
    return ""


def by_point(rows: Iterable[Row], **where: Any) -> list[Row]:
    """Join the rows of each point into one with its POINT and every metric by name, in the order of the rows.
    `where` selects the points that have these values."""
    joined: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if any(row.get(name) != value for name, value in where.items()):
            continue
        key = {name: row.get(name) for name in POINT}
        joined.setdefault(tuple(key.values()), key)[row["metric"]] = row["value"]
    return list(joined.values())


def stored_as(point: Row) -> str:
    """Name of a point's representation in tables."""
    if point["representation"] != "code" or point["method"] in ("", "code"):
        return str(point["representation"])
    return "sign bits" if point["method"] == "sign" else str(point["method"])


def as_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
