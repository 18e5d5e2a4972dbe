"""Measurements as rows, one a value, whichever command made them.

run             the name of the run, or of the arm of a study; "random encoder", "no encoder"
representation  what was measured: features, code, pixels; uncertainty, probe (its probabilities)
method          how it was obtained: code (the run's own), sign, ITQ ... for codes; the score for an
                uncertainty; empty where there is one way alone
bits            stored for an image; None where nothing is stored
metric          linear, knn (percent), map_over_hits, map_over_relevant, r_auroc ...
value           a number; None in a file where it isn't finite
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
FOREIGN = "ood "  # what the metric of an AUROC against foreign images starts with; then the set's name
POINT = ("run", "representation", "method", "bits", "seed")  # all but the metric and its value


def rows_of(metrics: Mapping[str, float], **point: Any) -> list[Row]:
    """A row for each metric of one point: run, representation, method, bits, seed."""
    each = [point | {"metric": metric, "value": value} for metric, value in metrics.items()]
    return [{column: row[column] for column in COLUMNS} for row in each]


def rows_of_points(run: str, seed: int, points: Iterable[Point]) -> list[Row]:
    """The rows of what was measured of one run."""
    return [
        row
        for representation, method, bits, metrics in points
        for row in rows_of(
            metrics, run=run, representation=representation, method=method, bits=bits, seed=seed
        )
    ]


def are_rows(found: Any) -> bool:
    """Whether a file's rows are of this format: results of an older version had a row for each point."""
    return isinstance(found, list) and all("metric" in row for row in found)


def by_point(rows: Iterable[Row], **where: Any) -> list[Row]:
    """The rows of each point joined in one: its POINT and every metric by name, in the order of the rows.
    `where`: of those points alone that have these values."""
    joined: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if any(row.get(name) != value for name, value in where.items()):
            continue
        key = {name: row.get(name) for name in POINT}
        joined.setdefault(tuple(key.values()), key)[row["metric"]] = row["value"]
    return list(joined.values())


def stored_as(point: Row) -> str:
    """What a table calls a point's representation."""
    if point["representation"] != "code" or point["method"] in ("", "code"):
        return str(point["representation"])
    return "sign bits" if point["method"] == "sign" else str(point["method"])


def as_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
