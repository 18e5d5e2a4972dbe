"""What `lvssl analyse` measured: uncertainty, calibration, regression and disentanglement, with controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lvssl.report.curves import chart
from lvssl.report.figures import Line
from lvssl.report.tables import below, cell, finite, table

STYLES = {"features": "run", "latent mean": "code", "latent samples": "control"}


def uncertainty(analysis: dict[str, Any]) -> str:
    """Every score of every model, and the reliability diagram of the run's probes."""
    models = analysis.get("models") or {}
    rows = [(role, name, row) for role, model in models.items() for name, row in model["scores"].items()]
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for _, _, row in rows for key in row))
    ranks = [c for c in columns if c.startswith("rank ") or c == "crops less certain"]
    first = [c for c in columns if c not in ranks]
    command = analysis.get("command")
    return (
        '<section id="uncertainty"><h2>Does it know when it is wrong?</h2><p class="soft">R-AUROC: the score '
        "tells images whose nearest neighbour has another class (0.5: chance); read it beside R@1, for a "
        "collapsed model can score well on it alone. AURC: the probe's error averaged over coverage, lower "
        "is better. OOD: AUROC against images from elsewhere. Posterior, rate, norm and distance have seen "
        "no label; samples and probe have.</p>"
        + scores_table("scores", rows, first)
        + below(command, "scores")
        + '<p class="soft">Rank correlation of the score with the severity of a corruption (1: rises with '
        "every step), and the share of crops that are less certain than the whole image.</p>"
        + scores_table("corruptions", rows, ranks)
        + below(command, "corruptions")
        + reliability(models["run"]["probes"], command)
        + "</section>"
    )


def scores_table(name: str, rows: Sequence[tuple[str, str, dict[str, Any]]], columns: Sequence[str]) -> str:
    best = {}
    for column in columns:
        values = [row[column] for _, _, row in rows if finite(row.get(column))]
        best[column] = (min if column == "aurc" else max)(values, default=None)
    body = [
        f"<tr{' class=ours' if role == 'run' else ''}>{cell(role)}{cell(score)}"
        + "".join(
            cell(row.get(c), ".3f", "n best" if finite(row.get(c)) and row[c] == best[c] else "n")
            for c in columns
        )
        + "</tr>"
        for role, score, row in rows
    ]
    header = "".join(f"<th class=n>{escape(title(c))}</th>" for c in columns)
    return table(name, f"<tr><th>Model</th><th>Score</th>{header}</tr>", body)


def title(column: str) -> str:
    names = {"r_auroc": "R-AUROC", "recall_at_1": "R@1", "aurc": "AURC"}
    return names.get(column, column.removeprefix("rank ").replace("ood ", "OOD "))


def reliability(probes: dict[str, dict[str, Any]], command: str | None) -> str:
    """The diagram, and the scores of each probe's probabilities."""
    lines = [
        Line(name, STYLES.get(name, "run"), [(b["confidence"], b["accuracy"]) for b in probe["bins"]])
        for name, probe in probes.items()
        if len(probe["bins"]) > 1
    ]
    header = "".join(f"<th class=n>{name}</th>" for name in ("Accuracy %", "NLL", "Brier", "ECE"))
    body = [
        f"<tr>{cell(name)}{cell(probe['accuracy'], '.1f')}"
        + "".join(cell(probe[key], ".3f") for key in ("nll", "brier", "ece"))
        + "</tr>"
        for name, probe in probes.items()
    ]
    drawing = ""
    if lines:
        drawing = chart("Reliability", "accuracy at the probe's confidence", lines, "confidence", last=False)
    return (
        f'<div class="columns"><div>{drawing}</div><div>'
        + table("probes", f"<tr><th>Probe of</th>{header}</tr>", body)
        + below(command, "probes")
        + "</div></div>"
    )


def regression(analysis: dict[str, Any]) -> str:
    """R^2 of ridge to known factors: one row a target, one column a representation."""
    models = analysis.get("models") or {}
    cells: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for role in [role for role in ("run", "control") if role in models]:
        for row in models[role].get("regression", []):
            cells.setdefault((row["set"], row["target"]), {})[role, row["from"]] = row
    if not cells:
        return ""
    columns = list(dict.fromkeys(key for row in cells.values() for key in row))
    header = "".join(f"<th class=n>{escape(f'{role}: {name}')}</th>" for role, name in columns)
    body = []
    for (kind, target), row in cells.items():
        values = [row[c]["r2"] for c in columns if c in row and finite(row[c]["r2"])]
        body.append(
            f"<tr>{cell(kind)}{cell(target)}"
            + "".join(
                cell(row[c]["r2"], ".2f", "n best" if row[c]["r2"] == max(values, default=math.inf) else "n")
                if c in row
                else cell(None)
                for c in columns
            )
            + "</tr>"
        )
    return (
        '<section id="regression"><h2>What can be read from it</h2><p class="soft">R<sup>2</sup> of ridge '
        "regression from features and code to the augmentation's own parameters (of a view), and to the "
        "exact factors of procedural shapes that the model never saw. 1: all of it, 0: nothing. The mean "
        "absolute errors are in analysis.json.</p>"
        + table("regression-table", f"<tr><th>Set</th><th>Target</th>{header}</tr>", body)
        + below(analysis.get("command"), "regression-table")
        + "</section>"
    )


def disentanglement(analysis: dict[str, Any]) -> str:
    models = analysis.get("models") or {}
    rows = [
        f"<tr>{cell(role)}{cell(name)}" + "".join(cell(value, ".3f") for value in found.values()) + "</tr>"
        for role, model in models.items()
        for name, found in (model.get("disentanglement") or {}).items()
    ]
    if not rows:
        return ""
    names = ("Disentanglement", "Completeness", "Informativeness", "MIG")
    header = "".join(f"<th class=n>{name}</th>" for name in names)
    return (
        '<section id="disentanglement"><h2>Disentanglement</h2><p class="soft">DCI (importances of extremely '
        "randomised trees) and mutual information gap for the shapes' six factors, 0 to 1.</p>"
        + table("dci", f"<tr><th>Model</th><th>Representation</th>{header}</tr>", rows)
        + below(analysis.get("command"), "dci")
        + "</section>"
    )
