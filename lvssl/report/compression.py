"""The report's section on accuracy against bits stored: the code, its equal-bit controls, the features."""

from __future__ import annotations

import math
from typing import Any

from lvssl.report.figures import Figure, Line, line_chart
from lvssl.report.template import finite, render
from lvssl.runs.rows import by_point

MEASURES = {"linear": "linear probe, %", "knn": "kNN, %", "map_over_hits": "mAP, over the hits found"}
STYLES = {"code": "code", "features": "run", "control": "control"}


def compression(measured: dict[str, Any]) -> str:
    """Return the section on compression.json; "" if there is none."""
    rows = by_point(measured.get("rows") or [])
    if not rows:
        return ""
    charts = [rate_chart(rows, name, unit) for name, unit in MEASURES.items()]
    return render(
        "bits-stored.html",
        rows=rows,
        figures=[figure for figure in charts if figure],
        left_out=measured.get("left_out") or [],
        command=measured.get("command"),
        **{name: measured.get(name, 0) for name in ("queries", "database", "top_n")},
    )


def rate_chart(rows: list[dict[str, Any]], name: str, unit: str) -> Figure | None:
    """Plot one measure over the logarithm of the bits, with a line for each run and method."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["bits"] and finite(row.get(name)):
            method = "code" if row["method"].startswith("code") else row["method"] or "features"
            groups.setdefault((row["run"], method), []).append((math.log2(row["bits"]), row[name]))
    if not groups:
        return None
    lines = [
        Line(f"{run}: {method}", STYLES.get(method, "control"), sorted(points))
        for (run, method), points in sorted(groups.items(), key=lambda item: item[0][1] == "code")
    ]
    places = sorted({x for points in groups.values() for x, _ in points})
    powers = [x for x in places if x == int(x)]
    marked = [x for x in powers if int(x) % 2 == 0] or powers or places  # all of them may be crowded
    marks = [(x, f"{2**x:,.0f}") for x in marked]
    return Figure("", unit, [], line_chart(lines, "bits", f"{name} against bits", x_marks=marks))
