"""Measurements as rows, one a value, whichever command made them.

run             the name of the run, or of the arm of a study
representation  what was measured: features, code; uncertainty, probe (its probabilities)
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
COLUMNS = ("run", "representation", "method", "bits", "metric", "value", "seed")
POINT = ("run", "representation", "method", "bits", "seed")  # all but the metric and its value


def rows_of(metrics: Mapping[str, float], **point: Any) -> list[Row]:
    """A row for each metric of one point: run, representation, method, bits, seed."""
    each = [point | {"metric": metric, "value": value} for metric, value in metrics.items()]
    return [{column: row[column] for column in COLUMNS} for row in each]


def are_rows(found: Any) -> bool:
    """Whether a file's rows are of this format: results of an older version had a row for each point."""
    return isinstance(found, list) and all("metric" in row for row in found)


def by_point(rows: Iterable[Row]) -> list[Row]:
    """The rows of each point joined in one: its POINT and every metric by name, in the order of the rows."""
    joined: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = {name: row.get(name) for name in POINT}
        joined.setdefault(tuple(key.values()), key)[row["metric"]] = row["value"]
    return list(joined.values())


def as_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
