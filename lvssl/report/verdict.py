"""Verdicts in words: a run against its control, and how certain the difference is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvssl.report.template import finite
from lvssl.runs.differences import interval, strongest
from lvssl.runs.rows import FOREIGN, Row, by_point
from lvssl.settings.fields import shell_line


@dataclass(frozen=True)
class Comparison:
    """One measure of a run next to its control's, in percent unless stated otherwise."""

    measure: str
    run: float
    control: float
    noise: float  # two standard errors of the difference, points
    method: str = field(default="", kw_only=True)  # the control's method that was compared, if it has several

    @property
    def difference(self) -> float:
        return self.run - self.control

    @property
    def outcome(self) -> str:
        """Return better, worse, or level: within the sampling error of the test set."""
        return str(interval([self.difference], sampling_error=self.noise / 2)["verdict"])


def sampling_noise(run: float, control: float, images: int) -> float:
    """Return two standard errors, in points, of the difference of two accuracies in percent.

    It is computed from the binomial variances as if the two were independent. They are measured on the same
    images and mostly agree, so the true error is smaller; the variation between seeds is not included.
    """
    variance = sum(p / 100 * (1 - p / 100) for p in (run, control)) / images
    return 200 * math.sqrt(variance)


def compare(evaluation: dict[str, Any]) -> dict[str, list[Comparison]]:
    """Return {"code": [...], "features": [...]}: the run's code against the strongest of the control's codes
    with as many bits, and its features against the control's. The lists are empty without a control."""
    images = (evaluation.get("data") or {}).get("test", 0)
    rows = evaluation.get("rows") or []
    control = (evaluation.get("control") or {}).get("name")
    code, features = (measured_of(evaluation, "run", name) for name in ("code", "features"))
    codes = by_point(rows, run=control, representation="code", bits=code.get("bits"))
    theirs = by_point(rows, run=control, representation="features")
    return {
        "code": against_strongest(code, codes, images),
        "features": against_strongest(features, theirs, images),
    }


def against_strongest(run: Row, controls: list[Row], images: int) -> list[Comparison]:
    """Compare a point's accuracies with the strongest control's, measure by measure. The control is chosen on
    the test images, which favours the controls. Empty without a control or the number of images."""
    found = []
    for measure, key in (("kNN", "knn"), ("linear probe", "linear")):
        known = {row["method"]: row[key] for row in controls if finite(row.get(key))}
        if known and images and finite(run.get(key)):
            mine, best = float(run[key]), strongest([known], higher_is_better=True)
            noise = sampling_noise(mine, best.values[0], images)
            found.append(Comparison(measure, mine, best.values[0], noise, method=best.method))
    return found


def measured_of(result: dict[str, Any], side: str, representation: str) -> Row:
    """Return a result's first point of "run" or "control"; for the code, the one with the accuracies. {} if
    there is none."""
    name = (result.get(side) or {}).get("name")
    points = by_point(result.get("rows") or [], run=name, representation=representation)
    return points[0] if points else {}


@dataclass(frozen=True)
class UncertaintyComparison(Comparison):
    """R-AUROC (0..1) of the posterior's own uncertainty next to the control's best label-free score, which
    `measure` names."""

    recall: float
    control_recall: float


LABEL_FREE = {"norm": "feature norm", "distance": "distance to its neighbour", "density": "density"}


def compare_uncertainty(analysis: dict[str, Any]) -> UncertaintyComparison | None:
    """Compare the posterior with the control's best label-free score; None if either is missing."""
    sides = [(analysis.get(side) or {}).get("name") for side in ("run", "control")]
    scores = by_point(analysis.get("rows") or [], representation="uncertainty")
    run = next((row for row in scores if (row["run"], row["method"]) == (sides[0], "posterior")), None)
    control = {row["method"]: row for row in scores if row["run"] == sides[1] and row["method"] in LABEL_FREE}
    if not run or not control:
        return None
    if not all(finite(row.get(c)) for row in (*control.values(), run) for c in ("r_auroc", "recall_at_1")):
        return None
    best = max(control, key=lambda name: control[name]["r_auroc"])
    images, theirs = analysis["images"]["test"], control[best]
    errors = [auroc_error(row["r_auroc"], row["recall_at_1"], images) for row in (run, theirs)]
    noise, recalls = 2 * math.hypot(*errors), (run["recall_at_1"], theirs["recall_at_1"])
    return UncertaintyComparison(best, run["r_auroc"], theirs["r_auroc"], noise, *recalls)


USEFUL = 0.6  # minimum AUROC of a score that is recommended; 0.5 is chance


ENCODED = {"sign": "bits", "PCA + sign": "pca", "ITQ": "itq", "OPQ": "opq"}  # method -> `encode --code`


def best_code(code: list[Comparison], bits: int, control: str) -> str:
    """Recommend a code of this many bits: the run's own or, for measures in which it is behind, that of the
    control, whose folder is `control`. "" without a comparison."""
    behind: dict[str, list[str]] = {}
    for each in code:
        if each.outcome == "worse":
            behind.setdefault(each.method, []).append(NAMES.get(each.measure, each.measure))
    if not behind:
        return f"use the run's own {bits:,}-bit code" if code else ""
    folder, here = Path(control), Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    typed = f" ({shell_line('lvssl', 'encode', shown)} --images DIR --bits {bits} --code "
    taken = [
        f"{method} for {' and '.join(measures)}" + (f"{typed}{ENCODED[method]})" if method in ENCODED else "")
        for method, measures in behind.items()
    ]
    return f"take the control's {' and '.join(taken)}: the run's own {bits:,}-bit code is behind"


def added(comparisons: dict[str, list[Comparison]]) -> str:
    """Say in a sentence what the latent adds over the best control, and its cost; "" without a control."""
    found = {}
    for outcome in ("better", "worse"):
        parts = [
            f"{abs(c.difference):.1f} points in {NAMES.get(c.measure, c.measure)} of the {what}"
            for what in ("features", "code")
            for c in comparisons[what]
            if c.outcome == outcome
        ]
        found[outcome] = " and ".join(parts)
    if not any(comparisons.values()):
        return ""
    lost = f"; it costs {found['worse']}" if found["worse"] else ""
    return f"Over the best control the latent adds {found['better'] or 'nothing'}{lost}."


def advice(code: str, analysis: dict[str, Any]) -> str:
    """Say in one sentence what to do with a run; "" if nothing was measured.

    Args:
        code: from `best_code`.
        analysis: analysis.json; the run's scores that have seen no labels are compared.
    """
    parts = [code] if code else []
    name = (analysis.get("run") or {}).get("name")
    points = by_point(analysis.get("rows") or [], run=name, representation="uncertainty")
    scores = {row["method"]: row for row in points if row["method"] in (*LABEL_FREE, "posterior")}
    for what, columns in (("foreign images", FOREIGN), ("wrong neighbours", "r_auroc")):
        means = {}
        for name, row in scores.items():
            values = [value for key, value in row.items() if key.startswith(columns) and finite(value)]
            if values:
                means[name] = sum(values) / len(values)
        if means:
            best = max(means, key=lambda name: means[name])
            how = f"trust the {LABEL_FREE.get(best, best)} for" if means[best] >= USEFUL else "no score finds"
            parts.append(f"{how} {what} (AUROC {means[best]:.2f})")
    said = "; ".join(parts)
    return said[:1].upper() + said[1:] + "." if said else ""


def auroc_error(area: float, positive_share: float, count: int) -> float:
    """Return the standard error of an AUROC (Hanley & McNeil 1982, eq. 1)."""
    positive = max(1.0, positive_share * count)
    negative = max(1.0, count - positive)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positive - 1) * (q1 - area**2) + (negative - 1) * (q2 - area**2)
    return math.sqrt(max(variance, 0.0) / (positive * negative))


def uncertainty_in_words(found: UncertaintyComparison) -> str:
    where = WORDS[found.outcome]
    return (
        f"The posterior's uncertainty is {where} the control's best label-free score, its "
        f"{LABEL_FREE[found.measure]}, in detecting wrong neighbours."
    )


def compare_codes(rates: dict[str, Any]) -> list[Comparison]:
    """Compare the run's whole code by compression.json, as `against_strongest` does."""
    rows, code = by_point(rates.get("rows") or [], representation="code"), whole_code(rates)
    controls = [
        row for row in rows if row["bits"] == code.get("bits") and not row["method"].startswith("code")
    ]
    return against_strongest(code, controls, rates.get("queries", 0))


def whole_code(rates: dict[str, Any]) -> Row:
    """Return the run's whole code in compression.json; {} without one."""
    rows = by_point(rates.get("rows") or [], representation="code", method="code")
    return rows[0] if rows else {}


WORDS = {"better": "ahead of", "level": "level with", "worse": "behind"}
NAMES = {"linear probe": "the linear probe"}  # names within a sentence


def in_words(comparisons: list[Comparison], what: str, against: str) -> str:
    """Say it in one sentence, such as "The code is ahead of the control's codes in kNN (+1.2, against ITQ)
    and level with them in the linear probe (+0.1, against OPQ)."."""
    if not comparisons:
        return ""
    parts: list[str] = []
    for outcome, verb in WORDS.items():
        those = [c for c in comparisons if c.outcome == outcome]
        if those:
            measures = " and ".join(
                f"{NAMES.get(c.measure, c.measure)} ({signed(c.difference)}"
                f"{f', against {c.method}' if c.method else ''})"
                for c in those
            )
            parts.append(f"{verb} {against if not parts else 'them'} in {measures}")
    verb = "is" if what.endswith("code") else "are"
    return f"{what} {verb} " + " and ".join(parts) + "."


def signed(points: float, digits: int = 1) -> str:
    """Format as +1.2, −0.3 (with the minus sign) or 0.0."""
    text = f"{abs(points):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if points > 0 else "\N{MINUS SIGN}") + text
