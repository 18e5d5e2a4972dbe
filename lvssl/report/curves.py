"""The curves of a training run, beside its control's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvssl.report.figures import Line, chart
from lvssl.report.template import finite, render
from lvssl.runs.progress import read_metrics


def curves(run_dir: Path, evaluation: dict[str, Any], command: str) -> str:
    """The section of metrics.jsonl; "" where there is nothing to draw."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    path = (evaluation.get("control") or {}).get("path")
    control = read_metrics(Path(path) / "metrics.jsonl") if path else []
    panels = [
        (
            "Contrastive loss",
            "NT-Xent, nats",
            [("run", rows, "ntxent", "run"), ("control", control, "ntxent", "control")],
        ),
        ("Rate", "KL to the prior, bits an image", [("run", rows, "rate_bits", "run")]),
        (
            "Online probes",
            "accuracy on the training views, %",
            [
                ("features", rows, "probe_features", "run"),
                ("code", rows, "probe_code", "code"),
                ("control's features", control, "probe_features", "control"),
            ],
        ),
        (
            "Online kNN",
            "images whose nearest in the batch is of their class, %",
            [("run", rows, "online_knn", "run"), ("control", control, "online_knn", "control")],
        ),
        (
            "Effective rank",
            "RankMe of a batch's features",
            [("run", rows, "rankme", "run"), ("control", control, "rankme", "control")],
        ),
        ("Speed", "images a second", [("run", rows, "images_per_second", "run")]),
    ]
    if not any(
        "ntxent" in row for row in rows
    ):  # another objective: its own distortion, no control beside it
        panels[0] = ("Distortion", "of the run's objective", [("run", rows, "distortion", "run")])
    figures = []
    for title, unit, wanted in panels:
        lines = [Line(label, style, series(source, key)) for label, source, key, style in wanted]
        lines = [line for line in lines if len(line.points) > 1]
        # A rate that is 0 throughout is that of a family without a latent: nothing to draw.
        if lines and not (title == "Rate" and all(v == 0 for line in lines for _, v in line.points)):
            figures.append(chart(title, unit, lines))
    return render("curves.html", figures=figures, command=command) if figures else ""


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[key])) for r in rows if finite(r.get("step")) and finite(r.get(key))]
