"""Calibration of a probe: scores of the predicted probabilities against the true labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipelines.kernels.pack import as_array

BINS = 15


class Calibration(NamedTuple):
    accuracy: float  # percent
    nll: float  # nats; a probability of 0 for the true class counts as 1e-12
    brier: float  # 0..2: squared error, summed over classes
    ece: float  # 0..1
    bins: list[dict[str, float]]  # the non-empty ones: confidence, accuracy (0..1), count


def calibration(probabilities: Any, labels: Any, classes: Any = None) -> Calibration:
    """Score probabilities [N, C] (rows sum to 1) against labels [N].

    The expected calibration error (Naeini et al. 2015; Guo et al. 2017) sorts images into BINS equal
    intervals (low, high] of the highest probability and averages |accuracy - mean confidence|, weighted by
    their counts. scikit-learn has no such error, and its Brier score supports several classes only from 1.7
    on. `classes` [C] gives the label of each column, by default 0..C-1. Raises ValueError for shapes that
    don't match, rows that are not distributions, or a label without a column.
    """
    p_NC, labels = as_array(probabilities).astype(np.float64), as_array(labels)
    if p_NC.ndim != 2 or labels.shape != p_NC.shape[:1] or not len(labels):
        raise ValueError(f"probabilities [N, C] and labels [N], not {list(p_NC.shape)}, {list(labels.shape)}")
    wrong = ~(np.isfinite(p_NC).all(axis=1) & (p_NC >= 0).all(axis=1) & (abs(p_NC.sum(axis=1) - 1) < 1e-4))
    if wrong.any():
        raise ValueError(f"row {int(np.argmax(wrong))} of the probabilities is not a distribution")
    columns = column_of(labels, np.arange(p_NC.shape[1]) if classes is None else as_array(classes))
    of_truth = p_NC[np.arange(len(columns)), columns]
    confidence, right = p_NC.max(axis=1), p_NC.argmax(axis=1) == columns
    brier = (p_NC**2).sum(axis=1) - 2 * of_truth + 1
    made = confidence_bins(confidence, right)
    error = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in made) / len(columns)
    nll = -np.log(np.maximum(of_truth, 1e-12)).mean()
    return Calibration(100 * float(right.mean()), float(nll), float(brier.mean()), float(error), made)


def column_of(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the column of each label in the distinct `classes`. Raises ValueError for a label without."""
    order = np.argsort(classes)
    place = np.searchsorted(classes, labels, sorter=order).clip(max=len(classes) - 1)
    columns = order[place]
    missing = classes[columns] != labels
    if missing.any():
        raise ValueError(f"label {labels[np.argmax(missing)]} has no column of probabilities")
    return columns


def confidence_bins(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    place = np.ceil(confidence * BINS).astype(int).clip(1, BINS) - 1
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right)]
    return [
        {"confidence": sums[0][b] / counts[b], "accuracy": sums[1][b] / counts[b], "count": int(counts[b])}
        for b in np.flatnonzero(counts)
    ]


def predictive_entropy(probabilities: Any) -> np.ndarray:
    """Return the entropy of each row of probabilities [N, C] in nats: [N]."""
    p_NC = as_array(probabilities).astype(np.float64)
    return -(p_NC * np.log(np.maximum(p_NC, 1e-300))).sum(axis=1)
