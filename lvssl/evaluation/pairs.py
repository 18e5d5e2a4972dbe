"""Compare arms seed by seed; a study's conclusions rest on this.

If several methods obtain a measure (`lvssl.evaluation.measures`), each side is represented by its strongest,
the one with the best mean over the shared seeds.
"""

from __future__ import annotations

from typing import Any

from lvssl.evaluation.measures import MEASURES, OF_LATENT, OF_UNCERTAINTY
from lvssl.runs.differences import interval, strongest
from lvssl.runs.rows import Row

# The arms that others are compared with, and the measures. Each is also compared with those before it.
CONTROLS = {"none": tuple(MEASURES), "sign": tuple(MEASURES), "mcinfonce": OF_UNCERTAINTY}
BEST = "the best control"  # among all deterministic arms, in features and codes
OF_BEST = tuple(name for name in MEASURES if name not in OF_UNCERTAINTY)

Runs = list[dict[str, Any]]
ByMethod = dict[str, float]  # method -> value


class Measured:
    """The rows of a study by arm and seed."""

    def __init__(self, runs: Runs, rows: list[Row]) -> None:
        self.runs = {(run["arm"], run["seed"]): run for run in runs}
        self.arms = list(dict.fromkeys(run["arm"] for run in runs))
        self.deterministic = [arm for arm in self.arms if self.first(arm)["deterministic"]]
        self.found: dict[tuple[Any, ...], ByMethod] = {}
        for row in rows:
            bits = row["bits"] if row["representation"] == "code" else None
            key = row["run"], row["seed"], row["representation"], row["metric"], bits
            self.found.setdefault(key, {})[row["method"]] = row["value"]

    def first(self, arm: str) -> dict[str, Any]:
        return next(run for (name, _), run in self.runs.items() if name == arm)

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds that all of the arms have."""
        return [
            seed for arm, seed in self.runs if arm == arms[0] and all((a, seed) in self.runs for a in arms)
        ]

    def of(self, arm: str, seed: int, name: str, bits: int) -> ByMethod:
        """Return the values of one of MEASURES by method; for codes, only those of `bits` bits. Empty if
        there are none.

        A deterministic run is represented by all its scores where the latent's own score is asked for.
        """
        measure = MEASURES[name]
        length = bits if measure.representation == "code" else None
        values = self.found.get((arm, seed, measure.representation, measure.metric, length), {})
        own = {method: value for method, value in values.items() if method in OF_LATENT}
        return own or values if measure.own_score else values


def summary(runs: Runs, rows: list[Row]) -> list[dict[str, Any]]:
    """Return for each arm and measure the strongest method and its values by seed."""
    measured, found = Measured(runs, rows), []
    for arm in measured.arms:
        first, seeds = measured.first(arm), measured.seeds(arm)
        all_of = {name: [measured.of(arm, s, name, first["bits"]) for s in seeds] for name in MEASURES}
        measures = {
            name: strongest(methods, MEASURES[name].higher)._asdict()
            for name, methods in all_of.items()
            if all(methods)
        }
        same = {name: first[name] for name in ("arm", "family", "bits", "features")}
        found.append(same | {"seeds": seeds, "measures": measures})
    return found


def pairs(runs: Runs, rows: list[Row]) -> list[dict[str, Any]]:
    """Compare every arm with each control, seed by seed: mean, standard error, 95 % interval, verdict.

    `of` and `against` name the methods compared. An arm's code is compared with the strongest code of the
    *same number of bits* made from the control's features; for BEST, with the strongest code of any
    deterministic arm, named "ARM, METHOD".
    """
    measured, found = Measured(runs, rows), []
    for place, (control, compared) in enumerate(CONTROLS.items()):
        for arm in measured.arms:
            if control in measured.arms and arm not in list(CONTROLS)[: place + 1]:
                found += differences(measured, arm, control, [control], compared)
    if len(measured.deterministic) > 1:
        for arm in measured.arms:
            if arm not in measured.deterministic:
                found += differences(measured, arm, BEST, measured.deterministic, OF_BEST)
    return found


def differences(
    measured: Measured, arm: str, name: str, controls: list[str], compared: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Subtract from an arm's measures the strongest control's; what either side lacks is left out."""
    seeds, bits, found = measured.seeds(arm, *controls), measured.first(arm)["bits"], []
    for measure in compared if seeds else ():
        mine = [measured.of(arm, seed, measure, bits) for seed in seeds]
        theirs = [against(measured, controls, seed, measure, bits) for seed in seeds]
        if not (all(mine) and all(theirs)):
            continue
        higher = MEASURES[measure].higher
        ours, best = strongest(mine, higher), strongest(theirs, higher)
        each = [a - b for a, b in zip(ours.values, best.values)]
        sides = {"of": ours.method, "against": best.method, "each": each}
        start = {"arm": arm, "control": name, "measure": measure, "seeds": seeds}
        found.append(start | sides | interval(each, higher))
    return found


def against(measured: Measured, controls: list[str], seed: int, measure: str, bits: int) -> ByMethod:
    """Return the values of the controls by method; with several controls, names include the arm."""
    if len(controls) == 1:
        return measured.of(controls[0], seed, measure, bits)
    found: ByMethod = {}
    for control in controls:
        methods = measured.of(control, seed, measure, bits)
        found |= {f"{control}, {method}" if method else control: v for method, v in methods.items()}
    return found
