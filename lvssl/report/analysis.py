"""The report's sections on `lvssl analyse`: uncertainty, calibration and regression, with controls."""

from __future__ import annotations

from typing import Any

from lvssl.report.figures import Figure, Line, chart
from lvssl.report.template import finite, render
from lvssl.runs.rows import POINT, by_point

STYLES = {"features": "run", "latent mean": "code", "latent samples": "control"}


def uncertainty(analysis: dict[str, Any]) -> str:
    """Return the section with every score of every model, and the reliability diagram of the run's probes."""
    rows = by_point(analysis.get("rows") or [], representation="uncertainty")
    if not rows:
        return ""
    run = analysis["run"]["name"]
    columns = {key: title(key) for row in rows for key in row if key not in POINT}
    ranks = {c: head for c, head in columns.items() if c.startswith("rank ") or c == "crops less certain"}
    best = {}
    for column in columns:
        values = [row[column] for row in rows if finite(row.get(column))]
        best[column] = (min if column == "aurc" else max)(values, default=None)
    return render(
        "uncertainty.html",
        rows=rows,
        roles=roles(analysis),
        scores={c: head for c, head in columns.items() if c not in ranks},
        ranks=ranks,
        best=best,
        probes=by_point(analysis["rows"], representation="probe", run=run),
        reliability=reliability(analysis["reliability"].get(run) or {}),
        command=analysis.get("command"),
    )


def roles(analysis: dict[str, Any]) -> dict[str, str]:
    """Return the names of run and control mapped to what the tables call them."""
    return {analysis[role]["name"]: role for role in ("run", "control") if analysis.get(role)}


def title(column: str) -> str:
    names = {"r_auroc": "R-AUROC", "recall_at_1": "R@1", "aurc": "AURC"}
    return names.get(column, column.removeprefix("rank ").replace("ood ", "OOD "))


def reliability(probes: dict[str, list[dict[str, float]]]) -> Figure | None:
    """Return the reliability diagram of the probes from their bins; None unless a probe has two bins."""
    lines = [
        Line(name, STYLES.get(name, "run"), [(b["confidence"], b["accuracy"]) for b in bins])
        for name, bins in probes.items()
        if len(bins) > 1
    ]
    unit = "accuracy at the probe's confidence"
    return chart("Reliability", unit, lines, "confidence", last=False) if lines else None


def regression(analysis: dict[str, Any]) -> str:
    """Return the table of R^2 of ridge to known factors: a row per target, a column per representation."""
    called = roles(analysis)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in analysis.get("rows") or []:
        kind, _, target = row["metric"].partition("_r2: ")
        if target and row["run"] in called:
            column = f"{called[row['run']]}: {row['representation']}"
            found.setdefault((kind, target), {})[column] = row["value"]
    if not found:
        return ""
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = [
        {
            "set": kind,
            "target": target,
            "r2": [row.get(name) for name in columns],
            "best": max(filter(finite, row.values()), default=None),
        }
        for (kind, target), row in found.items()
    ]
    return render("regression.html", rows=rows, columns=columns, command=analysis.get("command"))
