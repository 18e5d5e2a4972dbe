"""How much of a known quantity a linear read-out finds in a representation: ridge regression."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import RidgeCV

from lvssl.codes.pack import as_array
from lvssl.evaluation.probe import standardise

STRENGTHS = tuple(float(a) for a in np.logspace(-1, 5, 13))


class Regression(NamedTuple):
    r2: float  # 1: perfect, 0: the training mean; averaged over the target's columns
    mae: float  # in the target's unit, averaged over its columns
    strength: float


def ridge(train_x: Any, train_t: Any, test_x: Any, test_t: Any) -> Regression:
    """Ridge from features x [N, D] to targets t [N] or [N, T], its strength by leave-one-out on the training
    set alone (scikit-learn's RidgeCV over STRENGTHS); R^2 and mean absolute error on the test set.

    Features are standardised by the training set. R^2 is against the test targets' own mean, as
    scikit-learn's r2_score; a column that is constant on the test set is left out of it (nan where all are).
    Raises ValueError for shapes that don't match or values that aren't finite.
    """
    x = [as_array(a).astype(np.float32) for a in (train_x, test_x)]
    t = [as_array(a).astype(np.float64).reshape(len(a), -1) for a in (train_t, test_t)]
    for name, features, targets in zip(("train", "test"), x, t):
        if features.ndim != 2 or len(features) != len(targets) or not len(targets):
            raise ValueError(f"{name}: features [N, D] and as many targets, N >= 1, are needed")
        if not (np.isfinite(features).all() and np.isfinite(targets).all()):
            raise ValueError(f"{name}: a feature or target isn't finite")
    x = list(standardise(*x))
    model = RidgeCV(alphas=STRENGTHS).fit(x[0].astype(np.float64), t[0])
    predicted = model.predict(x[1].astype(np.float64)).reshape(t[1].shape)
    total = ((t[1] - t[1].mean(axis=0)) ** 2).sum(axis=0)
    varies = total > 1e-12 * len(t[1])
    explained = 1 - ((t[1] - predicted) ** 2).sum(axis=0)[varies] / total[varies]
    r2 = float(explained.mean()) if varies.any() else float("nan")
    return Regression(r2, float(abs(t[1] - predicted).mean()), float(model.alpha_))
