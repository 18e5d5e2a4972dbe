"""How much of a known quantity a linear read-out finds in a representation: ridge regression.

N  images   D  features   T  columns of the target
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lvssl.evaluation.probe import standardise
from pipelines.kernels.pack import as_array

STRENGTHS = tuple(float(a) for a in np.logspace(-1, 5, 13))


class Regression(NamedTuple):
    r2: float  # 1: perfect, 0: the training mean; averaged over the target's columns
    mae: float  # in the target's unit, averaged over its columns
    strength: float


def ridge(train_x: Any, train_t: Any, test_x: Any, test_t: Any) -> Regression:
    """Ridge from features x [N, D] to targets t [N] or [N, T], its strength by leave-one-out on the training
    set alone (of STRENGTHS); R^2 and mean absolute error on the test set.

    Features are standardised by the training set. R^2 is against the test targets' own mean, as
    scikit-learn's r2_score; a column that is constant on the test set is left out of it (nan where all are).
    Raises ValueError for shapes that don't match or values that aren't finite.
    """
    return ridge_each(train_x, {"": train_t}, test_x, {"": test_t})[""]


def ridge_each(
    train_x: Any, train_t: Mapping[str, Any], test_x: Any, test_t: Mapping[str, Any]
) -> dict[str, Regression]:
    """`ridge` to several targets, each with a strength of its own, for the price of one decomposition."""
    x = [as_array(a).astype(np.float32) for a in (train_x, test_x)]
    targets = [
        {name: as_array(t).astype(np.float64).reshape(len(t), -1) for name, t in these.items()}
        for these in (train_t, test_t)
    ]
    for part, features, these in zip(("train", "test"), x, targets):
        check(part, features, these)
    fit = LeaveOneOut(*(s.astype(np.float64) for s in standardise(*x)))
    return {name: scored(*fit.predict(t), targets[1][name]) for name, t in targets[0].items()}


class LeaveOneOut:
    """Ridge with an intercept for all STRENGTHS at once, from one singular value decomposition of the centred
    training features: with U, s, the prediction of t is mean + U f U't, f = s^2 / (s^2 + a), and the error
    without image i is its residual / (1 - h_i), h_i = 1/N + sum_j U_ij^2 f_j (Golub et al. 1979)."""

    def __init__(self, train_x: np.ndarray, test_x: np.ndarray) -> None:
        mean = train_x.mean(axis=0)
        self.u, self.s, self.v = np.linalg.svd(train_x - mean, full_matrices=False)
        self.test = (test_x - mean) @ self.v.T

    def predict(self, t: np.ndarray) -> tuple[np.ndarray, float]:
        """(the test set's predictions [M, T], the strength of least leave-one-out error) for t [N, T]."""
        centred = t - t.mean(axis=0)
        along = self.u.T @ centred
        errors = []
        for strength in STRENGTHS:
            kept = self.s**2 / (self.s**2 + strength)
            leverage = 1 / len(t) + self.u**2 @ kept
            residual = centred - self.u @ (kept[:, None] * along)
            errors.append(float(((residual / (1 - leverage)[:, None]) ** 2).mean()))
        best = STRENGTHS[int(np.argmin(errors))]
        weights = (self.s / (self.s**2 + best))[:, None] * along
        return t.mean(axis=0) + self.test @ weights, best


def scored(predicted: np.ndarray, strength: float, truth: np.ndarray) -> Regression:
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    varies = total > 1e-12 * len(truth)
    explained = 1 - ((truth - predicted) ** 2).sum(axis=0)[varies] / total[varies]
    r2 = float(explained.mean()) if varies.any() else float("nan")
    return Regression(r2, float(abs(truth - predicted).mean()), strength)


def check(part: str, x: np.ndarray, targets: dict[str, np.ndarray]) -> None:
    for t in targets.values():
        if x.ndim != 2 or len(x) != len(t) or not len(t):
            raise ValueError(f"{part}: features [N, D] and as many targets, N >= 1, are needed")
        if not (np.isfinite(x).all() and np.isfinite(t).all()):
            raise ValueError(f"{part}: a feature or target isn't finite")
