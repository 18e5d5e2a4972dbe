"""Paired differences: one side's values minus the other's, seed by seed, with an interval and a verdict."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from scipy.stats import t as student


class Strongest(NamedTuple):
    method: str
    values: list[float]  # by seed


def strongest(methods: list[dict[str, float]], higher_is_better: bool) -> Strongest:
    """Return the method with the best mean among those that all seeds have; a mean of NaN is the worst.

    Taking the best method of each seed would select on the test set's noise.
    """
    shared = [method for method in methods[0] if all(method in of_seed for of_seed in methods)]
    found = [Strongest(method, [of_seed[method] for of_seed in methods]) for method in shared]

    def merit(one: Strongest) -> float:
        mean = statistics.fmean(one.values)
        return -math.inf if math.isnan(mean) else mean if higher_is_better else -mean

    return max(found, key=merit)


def interval(
    each: list[float], higher_is_better: bool = True, sampling_error: float | None = None
) -> dict[str, Any]:
    """Return mean, standard error, 95 % interval, and verdict, which is `level` unless 0 is outside.

    For several seeds it is Student's interval. For one seed it is two standard errors on either side, those
    of the test set, in `sampling_error`; without them there is no interval, and the verdict is `one seed`. If
    a value is NaN (such as an R-AUROC where every neighbour is right), so are all figures.
    """
    mean = statistics.mean(each)
    if len(each) < 2 and sampling_error is None:
        return {"mean": mean, "standard_error": None, "interval": None, "verdict": "one seed"}
    if len(each) < 2:
        assert sampling_error is not None
        error, half = sampling_error, 2 * sampling_error
    else:  # stdev can't take NaN
        error = math.nan if not math.isfinite(mean) else statistics.stdev(each) / math.sqrt(len(each))
        half = float(student.ppf(0.975, len(each) - 1)) * error
    low, high = mean - half, mean + half
    if low > 0 or high < 0:
        verdict = "better" if (mean > 0) == higher_is_better else "worse"
    else:
        verdict = "level"
    return {"mean": mean, "standard_error": error, "interval": [low, high], "verdict": verdict}
