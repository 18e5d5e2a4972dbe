"""The linear probe: how much of the label a linear read-out recovers from a representation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lvssl.evaluation.knn import WHY_NOT_FINITE
from lvssl.runs.progress import with_progress
from pipelines.errors import InputError
from pipelines.kernels.pack import as_array

HELD_OUT = 0.15  # share of the training set used to choose the regularisation
# Maximum number of L-BFGS steps per fit; each fit starts from the previous one. On CIFAR-10 images (N =
# 10,000, D = 256 features), 200 steps moved the accuracy by at most 0.7 points, in either direction;
# torch.optim.LBFGS gave the same and was no faster.
STEPS = 50
STRENGTHS = (1e-1, 1e-2, 1e-3)  # regularisation strengths


@dataclass(frozen=True)
class ProbeResult:
    accuracy: float  # percent of the test set
    regularisation: float  # the chosen strength
    classes: np.ndarray  # [C], the labels seen in training: the columns of `probabilities`
    predictions: np.ndarray  # [test], labels
    probabilities: np.ndarray  # [test, C] float32

    def scores(self, classes: int) -> np.ndarray:
        """Return probabilities by label, float32 [test, classes]; 0 for classes not in the training set."""
        scores = np.zeros((len(self.probabilities), classes), np.float32)
        scores[:, self.classes] = self.probabilities
        return scores


@dataclass(frozen=True)
class Probe:
    """A fitted read-out, for use on any number of sets."""

    regularisation: float
    classes: np.ndarray  # [C]
    mean: np.ndarray  # [D], mean of the training set
    scale: np.ndarray  # [D]
    model: LogisticRegression

    def probabilities(self, x: Any) -> np.ndarray:
        """Return probabilities float32 [N, C] for features [N, D], with the columns of `classes`."""
        standardised = (as_array(x).astype(np.float32, copy=False) - self.mean) * self.scale
        return self.model.predict_proba(standardised).astype(np.float32)


def fit_probe(
    train_x: Any, train_y: Any, *, regularisation: Sequence[float] = STRENGTHS, seed: int = 0, title: str = ""
) -> Probe:
    """Fit the read-out of `linear_probe`."""
    train_x, train_y = checked("train", train_x, train_y)
    if len(np.unique(train_y)) < 2:
        raise InputError("a probe needs training labels of at least two classes")
    mean, scale = standardisation(train_x)
    train_x = (train_x - mean) * scale
    chosen, start = choose_regularisation(train_x, train_y, sorted(regularisation, reverse=True), seed, title)
    model = fit(train_x, train_y, chosen, start)
    return Probe(chosen, model.classes_, mean, scale, model)


def linear_probe(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    *,
    regularisation: Sequence[float] = STRENGTHS,
    seed: int = 0,
    title: str = "",
) -> ProbeResult:
    """Fit L2 logistic regression on standardised features, choosing its strength without the test set.

    Minimises mean cross entropy + regularisation / 2 * |W|^2 by L-BFGS over x [N, D] and labels y [N]
    (integers). Features are standardised with the training set's mean and deviation; a constant column
    becomes 0. Each strength is fitted on 85 % of the training set and scored on the remaining 15 %, a split
    that is balanced over classes and drawn from `seed`. The best (the stronger one if equal) is fitted again
    on the whole set. Bits are features like any other. Inputs are arrays or torch tensors. `title` is that of
    the progress bar over the strengths; there is none if it is empty. Raises ValueError for shapes that don't
    match or fewer than two classes, FloatingPointError for values that are not finite.
    """
    train_x, train_y = checked("train", train_x, train_y)
    test_x, test_y = checked("test", test_x, test_y)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"train_x has {train_x.shape[1]} features, test_x {test_x.shape[1]}")
    probe = fit_probe(train_x, train_y, regularisation=regularisation, seed=seed, title=title)
    probabilities = probe.probabilities(test_x)
    predictions = probe.classes[probabilities.argmax(axis=1)]
    accuracy = round(100 * float((predictions == test_y).mean()), 4)
    return ProbeResult(accuracy, probe.regularisation, probe.classes, predictions, probabilities)


def choose_regularisation(
    x: np.ndarray, y: np.ndarray, strengths: Sequence[float], seed: int, title: str = ""
) -> tuple[float, LogisticRegression | None]:
    """Return (the best strength on held-out images, its model as a start for the last fit)."""
    held = held_out(y, seed)
    if len(strengths) == 1 or not held.any():  # too few labels to choose with: take the middle one
        return strengths[len(strengths) // 2], None
    best, scores, model = strengths[0], [], None
    models: dict[float, LogisticRegression] = {}
    fitted = int((~held).sum())
    # From strong to weak: each solution is a good start for the next.
    for strength in with_progress(strengths, title, len(strengths) * fitted, lambda _: fitted):
        model = models[strength] = fit(x[~held], y[~held], strength, model)
        scores.append(float((model.predict(x[held]) == y[held]).mean()))
    best = strengths[int(np.argmax(scores))]
    return best, models[best]


def fit(
    x: np.ndarray, y: np.ndarray, strength: float, start: LogisticRegression | None
) -> LogisticRegression:
    model = LogisticRegression(C=1 / (strength * len(x)), max_iter=STEPS, tol=1e-3, warm_start=True)
    if start is not None:
        model.coef_, model.intercept_ = start.coef_.copy(), start.intercept_.copy()
        model.classes_ = start.classes_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # see STEPS on why it may stop early
        return model.fit(x, y)


def held_out(y: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask [N] over HELD_OUT of every class, drawn from `seed`; one image of each class is left.

    scikit-learn's StratifiedShuffleSplit refuses a class with a single image.
    """
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = np.flatnonzero(y == label)
        mask[generator.permutation(members)[: round(HELD_OUT * len(members))]] = True
    return mask


def standardise(train_x: np.ndarray, test_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, scale = standardisation(train_x)
    return (train_x - mean) * scale, (test_x - mean) * scale


def standardisation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean, scale) [D], fp32: (x - mean) * scale has deviation 1; a constant column becomes 0."""
    mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    # A column that is constant up to rounding would be scaled up to noise of size 1.
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation)).astype(np.float32)
    return mean.astype(np.float32), scale


def checked(name: str, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_array(x).astype(np.float32, copy=False), as_array(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(
            f"{name}: features [N, D] and labels [N] are needed, not {list(x.shape)} and {list(y.shape)}"
        )
    if not np.isfinite(x).all():
        row = int(np.argmin(np.isfinite(x).all(axis=1)))
        raise FloatingPointError(f"{name}: row {row} holds a value that isn't finite: {WHY_NOT_FINITE}")
    return x, y
