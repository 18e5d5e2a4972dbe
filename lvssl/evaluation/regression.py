"""Ridge regression: how much of a known quantity a linear read-out recovers from a representation.

N  images   D  features   T  columns of the target
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from lvssl.evaluation.probe import standardise
from pipelines.kernels.pack import as_array

STRENGTHS = tuple(float(a) for a in np.logspace(-1, 5, 13))


class Regression(NamedTuple):
    r2: float  # 1 is perfect, 0 no better than the mean; averaged over the target's columns
    mae: float  # in the target's unit, averaged over its columns
    strength: float


def ridge_each(
    train_x: Any, train_t: Mapping[str, Any], test_x: Any, test_t: Mapping[str, Any]
) -> dict[str, Regression]:
    """Fit ridge regression from features x [N, D] to each target t [N] or [N, T] by name. Returns R^2 and
    mean absolute error on the test set. The strength (of STRENGTHS) is chosen by leave-one-out on the
    training set alone. Targets with one column share a decomposition, so they cost as much as one.

    Features are standardised by the training set. R^2 is relative to the test targets' own mean, as in
    scikit-learn's r2_score; a column that is constant on the test set is left out (nan if all are). Raises
    ValueError for shapes that don't match or values that aren't finite.
    """
    x = [as_array(a).astype(np.float32) for a in (train_x, test_x)]
    targets = [
        {name: as_array(t).astype(np.float64).reshape(len(t), -1) for name, t in these.items()}
        for these in (train_t, test_t)
    ]
    for part, features, these in zip(("train", "test"), x, targets):
        check(part, features, these)
    train, test = (s.astype(np.float64) for s in standardise(*x))
    found = {}
    for names in together(targets[0]):
        columns = np.concatenate([targets[0][name] for name in names], axis=1)
        model = RidgeCV(STRENGTHS, alpha_per_target=len(names) == columns.shape[1]).fit(train, columns)
        predicted = model.predict(test).reshape(len(test), -1)  # a single target gives a vector
        for i, name in enumerate(names):
            its = predicted[:, [i]] if len(names) > 1 else predicted
            found[name] = scored(its, float(np.broadcast_to(model.alpha_, len(names))[i]), targets[1][name])
    return {name: found[name] for name in targets[0]}


def together(targets: dict[str, np.ndarray]) -> list[list[str]]:
    """Group the targets that are fitted at once: all those with one column, each with its own strength. The
    columns of any other target share one strength."""
    single = [name for name, t in targets.items() if t.shape[1] == 1]
    return [*([single] if single else []), *([name] for name in targets if name not in single)]


def scored(predicted: np.ndarray, strength: float, truth: np.ndarray) -> Regression:
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    varies = total > 1e-12 * len(truth)
    r2 = r2_score(truth[:, varies], predicted[:, varies]) if varies.any() else float("nan")
    return Regression(float(r2), float(abs(truth - predicted).mean()), strength)


def check(part: str, x: np.ndarray, targets: dict[str, np.ndarray]) -> None:
    for t in targets.values():
        if x.ndim != 2 or len(x) != len(t) or not len(t):
            raise ValueError(f"{part}: features [N, D] and as many targets, N >= 1, are needed")
        if not (np.isfinite(x).all() and np.isfinite(t).all()):
            raise ValueError(f"{part}: a feature or target isn't finite")
