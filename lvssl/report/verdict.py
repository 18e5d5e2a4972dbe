"""What the figures say, in words: a run against its control, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lvssl.report.template import finite
from lvssl.runs.differences import interval, strongest
from lvssl.runs.rows import FOREIGN, Row, by_point


@dataclass(frozen=True)
class Comparison:
    """One measure of the run minus that of its control: percent, unless it says otherwise."""

    measure: str
    run: float
    control: float
    noise: float | None  # two standard errors of the difference, points; None: test set of unknown size

    @property
    def difference(self) -> float:
        return self.run - self.control

    @property
    def outcome(self) -> str:
        """better, worse, or level: within the sampling error of the test set."""
        error = (0.05 if self.noise is None else self.noise) / 2
        return str(interval([self.difference], sampling_error=error)["verdict"])


def sampling_noise(run: float, control: float, images: int) -> float:
    """Two standard errors, in points, of the difference of two accuracies (percent) on `images` test images.

    From the binomial variances, as if the two were independent. They see the same images and mostly agree,
    so the truth is less; what several seeds would add is not in it.
    """
    variance = sum(p / 100 * (1 - p / 100) for p in (run, control)) / images
    return 200 * math.sqrt(variance)


def compare(evaluation: dict[str, Any]) -> dict[str, list[Comparison]]:
    """{"code": [...], "features": [...]}: the run's code against the control's sign bits where both have the
    same number of bits, and its features against the control's. Empty lists where there is no control."""
    images = (evaluation.get("data") or {}).get("test")

    def pairs(representation: str, names: dict[str, str]) -> list[Comparison]:
        run, control = (measured_of(evaluation, side, representation) for side in ("run", "control"))
        if run.get("bits") != control.get("bits") and representation == "code":
            return []
        return [
            Comparison(name, a, b, sampling_noise(a, b, images) if images else None)
            for name, key in names.items()
            if (a := run.get(key)) is not None and (b := control.get(key)) is not None
        ]

    return {
        "code": pairs("code", {"Hamming kNN": "knn", "linear probe": "linear"}),
        "features": pairs("features", {"linear probe": "linear", "kNN": "knn"}),
    }


def measured_of(result: dict[str, Any], side: str, representation: str) -> Row:
    """The first point that a result has of "run" or "control": of its code that of the accuracies. {} without
    one."""
    name = (result.get(side) or {}).get("name")
    points = by_point(result.get("rows") or [], run=name, representation=representation)
    return points[0] if points else {}


@dataclass(frozen=True)
class UncertaintyComparison(Comparison):
    """R-AUROC (0..1) of the posterior's own uncertainty against the control's best label-free score, which
    `measure` names."""

    recall: float
    control_recall: float


LABEL_FREE = {"norm": "feature norm", "distance": "distance to its neighbour", "density": "density"}


def compare_uncertainty(analysis: dict[str, Any]) -> UncertaintyComparison | None:
    """The posterior against the control's best score among those that saw no label; None without either."""
    sides = [(analysis.get(side) or {}).get("name") for side in ("run", "control")]
    scores = by_point(analysis.get("rows") or [], representation="uncertainty")
    run = next((row for row in scores if (row["run"], row["method"]) == (sides[0], "posterior")), None)
    control = {row["method"]: row for row in scores if row["run"] == sides[1] and row["method"] in LABEL_FREE}
    if not run or not control or not all(finite(row.get("r_auroc")) for row in (*control.values(), run)):
        return None
    best = max(control, key=lambda name: control[name]["r_auroc"])
    images = analysis["images"]["test"]
    errors = [auroc_error(row["r_auroc"], row["recall_at_1"], images) for row in (run, control[best])]
    return UncertaintyComparison(
        best,
        run["r_auroc"],
        control[best]["r_auroc"],
        2 * math.hypot(*errors),
        run["recall_at_1"],
        control[best]["recall_at_1"],
    )


USEFUL = 0.6  # the least AUROC of a score that is recommended; 0.5 is a coin


def advice(code: list[Comparison], bits: int, analysis: dict[str, Any]) -> str:
    """What to do with a run, in one sentence; "" where nothing was measured.

    Args:
        code: the code against its control, empty without one.
        bits: length of the code, 0: there is none.
        analysis: analysis.json; its scores of the run are compared, those that saw no label.
    """
    parts = []
    if bits and code:
        behind = [c.measure for c in code if c.outcome == "worse"]
        better = f"prefer the control: the {bits:,}-bit code is behind it in {' and '.join(behind)}"
        parts.append(better if behind else f"use the {bits:,}-bit code")
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
    """Standard error of an AUROC (Hanley & McNeil 1982, eq. 1)."""
    positive = max(1.0, positive_share * count)
    negative = max(1.0, count - positive)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positive - 1) * (q1 - area**2) + (negative - 1) * (q2 - area**2)
    return math.sqrt(max(variance, 0.0) / (positive * negative))


def uncertainty_in_words(found: UncertaintyComparison) -> str:
    where = WORDS[found.outcome]
    return (
        f"The posterior's uncertainty is {where} the control's best label-free score, its "
        f"{LABEL_FREE[found.measure]}, in telling wrong neighbours from right."
    )


def compare_codes(rates: dict[str, Any]) -> tuple[list[Comparison], str]:
    """The run's whole code against the strongest control of as many bits, measure by measure, from
    compression.json; and the controls' names. Empty where there is no such pair.

    The best control is chosen on the test images, which favours the controls.
    """
    rows = by_point(rates.get("rows") or [])
    code = next((row for row in rows if row["method"] == "code"), None)
    if code is None:
        return [], ""
    controls = [
        row
        for row in rows
        if (row["representation"], row["bits"]) == ("code", code["bits"])
        and not row["method"].startswith("code")
    ]
    found, names = [], []
    for measure, key in (("Hamming kNN", "knn"), ("linear probe", "linear")):
        if controls:
            best = strongest([{row["method"]: row[key] for row in controls}], higher_is_better=True)
            noise = sampling_noise(code[key], best.values[0], rates["queries"])
            found.append(Comparison(measure, code[key], best.values[0], noise))
            names.append(best.method)
    return found, " and ".join(dict.fromkeys(names))


WORDS = {"better": "ahead of", "level": "level with", "worse": "behind"}
NAMES = {"linear probe": "the linear probe"}  # within a sentence


def in_words(comparisons: list[Comparison], what: str, against: str) -> str:
    """One sentence, such as "The code is ahead of the control's sign bits in Hamming kNN (+1.2 points) and
    level in the linear probe (+0.1)."."""
    if not comparisons:
        return ""
    parts: list[str] = []
    for outcome, verb in WORDS.items():
        those = [c for c in comparisons if c.outcome == outcome]
        if those:
            measures = " and ".join(
                f"{NAMES.get(c.measure, c.measure)} ({signed(c.difference)})" for c in those
            )
            parts.append(f"{verb} {against if not parts else 'them'} in {measures}")
    verb = "is" if what.endswith("code") else "are"
    return f"{what} {verb} " + " and ".join(parts) + "."


def signed(points: float, digits: int = 1) -> str:
    """+1.2, −0.3 (with the minus sign), 0.0."""
    text = f"{abs(points):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if points > 0 else "\N{MINUS SIGN}") + text
