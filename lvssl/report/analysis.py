"""What `lvssl analyse` measured: uncertainty, calibration, regression and disentanglement, with controls."""

from __future__ import annotations

from typing import Any

from lvssl.report.figures import Figure, Line, chart
from lvssl.report.template import finite, render

STYLES = {"features": "run", "latent mean": "code", "latent samples": "control"}


def uncertainty(analysis: dict[str, Any]) -> str:
    """Every score of every model, and the reliability diagram of the run's probes."""
    models = analysis.get("models") or {}
    rows = [(role, name, row) for role, model in models.items() for name, row in model["scores"].items()]
    if not rows:
        return ""
    columns = {key: title(key) for _, _, row in rows for key in row}
    ranks = {c: head for c, head in columns.items() if c.startswith("rank ") or c == "crops less certain"}
    best = {}
    for column in columns:
        values = [row[column] for _, _, row in rows if finite(row.get(column))]
        best[column] = (min if column == "aurc" else max)(values, default=None)
    return render(
        "uncertainty.html",
        rows=rows,
        scores={c: head for c, head in columns.items() if c not in ranks},
        ranks=ranks,
        best=best,
        probes=models["run"]["probes"],
        reliability=reliability(models["run"]["probes"]),
        command=analysis.get("command"),
    )


def title(column: str) -> str:
    names = {"r_auroc": "R-AUROC", "recall_at_1": "R@1", "aurc": "AURC"}
    return names.get(column, column.removeprefix("rank ").replace("ood ", "OOD "))


def reliability(probes: dict[str, dict[str, Any]]) -> Figure | None:
    """The diagram of each probe's probabilities; None where none has two bins."""
    lines = [
        Line(name, STYLES.get(name, "run"), [(b["confidence"], b["accuracy"]) for b in probe["bins"]])
        for name, probe in probes.items()
        if len(probe["bins"]) > 1
    ]
    unit = "accuracy at the probe's confidence"
    return chart("Reliability", unit, lines, "confidence", last=False) if lines else None


def regression(analysis: dict[str, Any]) -> str:
    """R^2 of ridge to known factors: one row a target, one column a representation."""
    models = analysis.get("models") or {}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for role in [role for role in ("run", "control") if role in models]:
        for row in models[role].get("regression", []):
            found.setdefault((row["set"], row["target"]), {})[f"{role}: {row['from']}"] = row["r2"]
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


def disentanglement(analysis: dict[str, Any]) -> str:
    """DCI and MIG: one row a model and representation."""
    rows = [
        (role, name, found)
        for role, model in (analysis.get("models") or {}).items()
        for name, found in (model.get("disentanglement") or {}).items()
    ]
    return render("disentanglement.html", rows=rows, command=analysis.get("command")) if rows else ""
