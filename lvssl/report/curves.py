"""The report's curves of a training run, next to those of its control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvssl.report.figures import Line, chart
from lvssl.report.template import finite, render
from lvssl.runs.progress import read_metrics


def curves(run_dir: Path, evaluation: dict[str, Any], command: str) -> str:
    """Return the section on metrics.jsonl; "" if there is nothing to draw."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    path = (evaluation.get("control") or {}).get("path")
    control = read_metrics(Path(path) / "metrics.jsonl") if path else []

    def both(key: str) -> list[tuple[str, Any, str, str]]:
        return [("run", rows, key, "run"), ("control", control, key, "control")]

    probes = [("features", rows, "probe_features", "run"), ("code", rows, "probe_code", "code")]
    probes += [("control's features", control, "probe_features", "control")]
    distortion = ("Contrastive loss", "NT-Xent, nats", both("ntxent"))
    if not any("ntxent" in row for row in rows):  # another objective is drawn alone, without the control
        distortion = ("Distortion", "of the run's objective", both("distortion")[:1])
    panels = [
        distortion,
        ("Rate", "KL to the prior, bits per image", both("rate_bits")[:1]),
        ("Online probes", "accuracy on the training views, %", probes),
        ("Online kNN", "images whose nearest in the batch has the same class, %", both("online_knn")),
        ("Effective rank", "RankMe of a batch's features", both("rankme")),
        ("Speed", "images per second", both("images_per_second")[:1]),
    ]
    figures = []
    for title, unit, wanted in panels:
        lines = [Line(label, style, series(source, key)) for label, source, key, style in wanted]
        lines = [line for line in lines if len(line.points) > 1]
        # A rate that is always 0 belongs to a family without a latent, and is not drawn.
        if lines and not (title == "Rate" and all(v == 0 for line in lines for _, v in line.points)):
            figures.append(chart(title, unit, lines))
    return render("curves.html", figures=figures, command=command) if figures else ""


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[key])) for r in rows if finite(r.get("step")) and finite(r.get(key))]
