"""Scores of predictions, with a confidence interval for each figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

RESAMPLES = 1000  # of the bootstrap


def score(predictions: Tensor, answers: Tensor, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Score predictions [N, C] against classes int64 [N], or [N, T] against targets [N, T].

    Raises FloatingPointError if a prediction isn't finite: compared with NaN, every rank looks right.
    """
    predictions, answers = predictions.detach().float().cpu(), answers.cpu()
    if not bool(predictions.isfinite().all()):
        raise FloatingPointError("predictions are not finite: the training diverged; lower --lr")
    return regression(predictions, answers.float(), names) if names else classification(predictions, answers)


def classification(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return top-1 and, for C > 5, top-5 accuracy of scores [N, C] in percent, with Wilson intervals. Classes
    from C on, whose training images may all be damaged, are never right."""
    classes = scores.shape[1]
    ranks = rank_of_label(scores, labels.clamp(max=classes - 1))
    ranks[labels >= classes] = classes
    figures: dict[str, Any] = {"count": len(labels), "interval": "Wilson, 95 %"}
    for k in (1, 5):
        if k == 1 or scores.shape[1] > k:
            right = int((ranks < k).sum())
            figures[f"top{k}"] = round(100 * right / len(labels), 4)
            figures[f"top{k}_interval"] = wilson(right, len(labels))
    return figures


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Count the classes ranked before the right one, int64 [N]; ties go to the lower class."""
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(dim=1)


def wilson(right: int, count: int) -> list[float]:
    """Return Wilson's 95 % interval of a share, in percent (Wilson 1927)."""
    return [round(100 * bound, 4) for bound in binomtest(right, count).proportion_ci(method="wilson")]


def regression(predictions: Tensor, answers: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Return MSE, MAE and R^2 of each target, in its unit; R^2 with a bootstrap interval over images."""
    each = {name: one_target(p, a) for name, p, a in zip(names, predictions.T.numpy(), answers.T.numpy())}
    mean = sum(figures["r2"] for figures in each.values()) / len(each)
    return {"count": len(answers), "interval": "bootstrap, 95 %", "r2": round(mean, 6), "targets": each}


def one_target(predicted: np.ndarray, answers: np.ndarray) -> dict[str, Any]:
    p, a = predicted.astype(np.float64), answers.astype(np.float64)
    generator = np.random.default_rng(0)
    drawn = (generator.integers(0, len(a), len(a)) for _ in range(RESAMPLES))  # all at once would take 8 N kB
    low, high = np.percentile([r2(p[rows], a[rows]) for rows in drawn], [2.5, 97.5])
    return {
        "mse": float(((p - a) ** 2).mean()),
        "mae": float(np.abs(p - a).mean()),
        "r2": r2(p, a),
        "r2_interval": [float(low), float(high)],
    }


def r2(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Return 1 - residual / total sum of squares; 0 if the answers are all equal.

    scikit-learn's r2_score gives 1 if they are equal and predicted exactly, and takes 14 times as long (0.225
    ms for 10,000 images); the bootstrap calls this a thousand times.
    """
    total = ((answers - answers.mean()) ** 2).sum()
    return float(1 - ((predicted - answers) ** 2).sum() / total) if total > 0 else 0.0
