"""Arms compared seed by seed: what a study concludes from.

Where a measure is obtained by several methods (`lvssl.evaluation.measures`), each side has its strongest:
the one of the best mean over the shared seeds. The best of each seed would be chosen on the test set's noise.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from scipy.stats import t as student

from lvssl.evaluation.measures import MEASURES, OF_CODE, OF_UNCERTAINTY, ByMethod

# Arms that others are compared with, and in what; each with those before it, too.
CONTROLS = {"none": tuple(MEASURES), "sign": tuple(MEASURES), "mcinfonce": OF_UNCERTAINTY}

Row = dict[str, Any]


class Strongest(NamedTuple):
    method: str
    values: list[float]  # by seed


def strongest(methods: list[ByMethod], higher_is_better: bool) -> Strongest:
    """Of the methods that all seeds have, that of the best mean; a mean that isn't a number is the worst."""
    shared = [method for method in methods[0] if all(method in of_seed for of_seed in methods)]
    found = [Strongest(method, [of_seed[method] for of_seed in methods]) for method in shared]

    def merit(one: Strongest) -> float:
        mean = statistics.fmean(one.values)
        return -math.inf if math.isnan(mean) else mean if higher_is_better else -mean

    return max(found, key=merit)


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Each arm with its strongest method of each measure, and that method's values by seed."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        those = [row for row in rows if row["arm"] == arm]
        measures = {
            name: strongest([row["measures"][name] for row in those], higher)._asdict()
            for name, (_, higher) in MEASURES.items()
        }
        same = {name: those[0][name] for name in ("arm", "family", "bits", "features")}
        found.append(same | {"seeds": [row["seed"] for row in those], "measures": measures})
    return found


def pairs(rows: list[Row]) -> list[dict[str, Any]]:
    """Every arm minus each control, seed by seed: mean, standard error, 95 % interval, verdict.

    `of`, `against`: the methods that were compared. An arm's code is compared with the strongest code of the
    *same number of bits* that is made from the control's features.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    of = {(row["arm"], row["seed"]): row for row in rows}
    found = []
    for place, (control, compared) in enumerate(CONTROLS.items()):
        for arm in arms:
            seeds = [seed for name, seed in of if name == arm and (control, seed) in of]
            if arm in list(CONTROLS)[: place + 1] or not seeds:
                continue
            for name in compared:
                sides = [of[arm, s] for s in seeds], [of[control, s] for s in seeds]
                if pair := difference(*sides, name):
                    found.append({"arm": arm, "control": control, "measure": name, "seeds": seeds} | pair)
    return found


def difference(mine: list[Row], theirs: list[Row], name: str) -> dict[str, Any] | None:
    """One measure of an arm and a control, row by row; None where the control has nothing to compare with."""
    other = [methods_against(row, name, mine[0]["bits"]) for row in theirs]
    if not all(other):
        return None
    higher = MEASURES[name][1]
    ours, best = strongest([row["measures"][name] for row in mine], higher), strongest(other, higher)
    each = [a - b for a, b in zip(ours.values, best.values)]
    return {"of": ours.method, "against": best.method, "each": each} | interval(each, higher)


def methods_against(control: Row, name: str, bits: int) -> ByMethod:
    """A control's methods; those of a code at the other's number of bits."""
    if name not in OF_CODE:
        return control["measures"][name]
    equal = control["controls"].get(str(bits), {}).get(name, {})
    return equal | (control["measures"][name] if control["bits"] == bits else {})


def interval(each: list[float], higher_is_better: bool) -> dict[str, Any]:
    """Mean, its standard error and Student's 95 % interval; the verdict is `level` unless 0 is outside."""
    mean = statistics.mean(each)
    if len(each) < 2:
        return {"mean": mean, "standard_error": None, "interval": None, "verdict": "one seed"}
    error = statistics.stdev(each) / math.sqrt(len(each))
    half = float(student.ppf(0.975, len(each) - 1)) * error
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        verdict = "level"
    else:
        verdict = "better" if (mean > 0) == higher_is_better else "worse"
    return {"mean": mean, "standard_error": error, "interval": [low, high], "verdict": verdict}
