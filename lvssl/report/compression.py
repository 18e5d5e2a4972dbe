"""Accuracy against bits stored: the code, its controls of equal bits, and the features it is made from."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from lvssl.report.figures import Line, line_chart
from lvssl.report.tables import below, cell, finite, table

MEASURES = {"linear": "linear probe, %", "knn": "kNN, %", "map_over_hits": "mAP, over the hits found"}
STYLES = {"code": "code", "features": "run", "control": "control"}


def compression(measured: dict[str, Any]) -> str:
    """The section of compression.json; "" without one."""
    rows = measured.get("rows") or []
    if not rows:
        return ""
    charts = "".join(rate_chart(rows, name, unit) for name, unit in MEASURES.items())
    legend = "".join(
        f'<li><svg viewBox="0 0 26 10"><path class="line {style}" d="M1 5H25"/></svg>{escape(text)}</li>'
        for style, text in (
            ("code", "the latent's code, and its first bits"),
            ("control", "controls: sign, PCA + sign, ITQ, LSH, int8, PQ of the control's features"),
            ("run", "fp32 features"),
        )
    )
    header = "".join(
        f"<th{' class=n' if i > 1 else ''}>{name}</th>"
        for i, name in enumerate(
            (
                "Model",
                "Method",
                "Bits",
                "Linear %",
                "kNN %",
                "mAP",
                "\N{MULTIPLICATION SIGN} smaller than pixels",
            )
        )
    )
    body = [
        f"<tr{' class=ours' if row['method'] == 'code' else ''}>{cell(row['model'])}{cell(row['method'])}"
        f"{cell(row['bits'], ',')}{cell(row['linear'], '.1f')}{cell(row['knn'], '.1f')}"
        f"{cell(row['map_over_hits'], '.3f')}{cell(row.get('raw_pixels'), ',.1f')}</tr>"
        for row in rows
    ]
    left_out = "; ".join(measured.get("left_out") or [])
    return (
        '<section id="bits-stored"><h2>Accuracy against bits stored</h2><p class="soft">'
        f"{measured.get('queries', 0):,} test images against {measured.get('database', 0):,} training "
        f"images. mAP over the first {measured.get('first', 0):,}, ties by expectation. Controls are fitted "
        "on the training features alone.</p>"
        f'<ul class="legend">{legend}</ul><div class="charts">{charts}</div>'
        f"<details><summary>All {len(rows)} points</summary>"
        + table("rate-accuracy", f"<tr>{header}</tr>", body)
        + (f'<p class="soft small">Left out: {escape(left_out)}.</p>' if left_out else "")
        + "</details>"
        + below(measured.get("command"), "rate-accuracy")
        + "</section>"
    )


def rate_chart(rows: list[dict[str, Any]], name: str, unit: str) -> str:
    """One measure over the logarithm of the bits; a line for each model and method."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if finite(row.get(name)):
            method = "code" if row["method"].startswith("code") else row["method"]
            groups.setdefault((row["model"], method), []).append((math.log2(row["bits"]), row[name]))
    if not groups:
        return ""
    lines = [
        Line(f"{model}: {method}", STYLES.get(method, "control"), sorted(points))
        for (model, method), points in sorted(groups.items(), key=lambda item: item[0][1] == "code")
    ]
    places = sorted({x for points in groups.values() for x, _ in points})
    marks = [(x, f"{2**x:,.0f}") for x in places if x == int(x) and int(x) % 2 == 0]
    drawing = line_chart(lines, "bits", f"{name} against bits", x_marks=marks)
    return (
        f'<figure><h3><span class="soft" style="font-weight:400">{escape(unit)}</span></h3>{drawing}</figure>'
    )
