"""Weighted nearest-neighbour classification (Wu et al. 2018), on features and on packed codes.

Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvssl.codes.search import hamming_distances
from lvssl.runs.progress import with_progress
from pipelines.kernels.compiled import compiled
from pipelines.kernels.pack import as_array

QUERIES = 512  # test images a chunk: [512, N] similarities at a time


def weighted_knn(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> float:
    """Accuracy in percent of cosine kNN on features [N, D], labels [N] in 0..C-1. k is cut to N.

    Equal sums of votes go to the lower class. Computed on `device`; left out: where train_x lies. Raises
    ValueError for shapes that don't match.
    """
    train_y, test_y = (torch.as_tensor(as_array(y)).long() for y in (train_y, test_y))
    check(train_x.shape, train_y, test_x.shape, test_y, k)
    train_x = torch.as_tensor(train_x).to(device)
    votes = weighted_votes(train_x, train_y, test_x, k, temperature)
    return round(100 * float((votes.argmax(dim=1) == test_y).float().mean()), 4)


def weighted_votes(
    train_x: Any, answers: Tensor, test_x: Any, k: int, temperature: float, title: str = ""
) -> Tensor:
    """Sums of the k nearest training images' weights exp((cosine - 1) / T), on the CPU; works where train_x
    lies. For `answers` int64 [N] (classes) by class, [M, C]; for float [N, T] (targets) times these, [M, T].
    `title`: of the progress shown; empty: none.
    """
    train_x, test_x = (torch.as_tensor(x).float() for x in (train_x, test_x))
    train_x, test_x = (torch.nn.functional.normalize(x, dim=1) for x in (train_x, test_x.to(train_x.device)))
    answers, votes = answers.to(train_x.device), []
    width = answers.shape[1] if answers.is_floating_point() else int(answers.max()) + 1
    for queries in with_progress(test_x.split(QUERIES), title, len(test_x), len):
        similarity, nearest = (queries @ train_x.T).topk(min(k, len(train_x)), dim=1)
        # exp((s - 1) / T) instead of exp(s / T): the same ranking, and it stays within (0, 1].
        weights = torch.exp((similarity - 1) / temperature)
        sums = torch.zeros(len(queries), width, device=train_x.device)
        if answers.is_floating_point():
            sums = (weights[:, :, None] * answers[nearest]).sum(dim=1)
        else:
            sums.scatter_add_(1, answers[nearest], weights)
        votes.append(sums.cpu())
    return torch.cat(votes)


def hamming_knn(
    train_codes: np.ndarray,
    train_y: Any,
    test_codes: np.ndarray,
    test_y: Any,
    bits: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in percent of kNN on packed codes uint8 [N, ceil(bits / 8)]; similarity 1 - 2 * distance /
    bits, the cosine of the +-1 codes, so that the figure can stand beside `weighted_knn`'s.

    Distances are small integers and many training images tie at the k-th place. Taking those that come first
    would favour the classes that come first in the data set (on data sorted by class, always the low ones),
    so they share the places left: each tied image votes with (places left) / (images tied) of its weight,
    the expectation over a random order. The result doesn't depend on the order of the training set.
    """
    train_y, test_y = (torch.as_tensor(as_array(y)).long() for y in (train_y, test_y))
    check(train_codes.shape, train_y, test_codes.shape, test_y, k)
    votes = hamming_votes(train_codes, train_y, test_codes, bits, k, temperature)
    return round(100 * float((votes.argmax(dim=1) == test_y).float().mean()), 4)


def hamming_votes(
    train_codes: np.ndarray,
    answers: Tensor,
    test_codes: np.ndarray,
    bits: int,
    k: int,
    temperature: float,
    title: str = "",
) -> Tensor:
    """As `weighted_votes`, on packed codes: [M, C] for classes, [M, T] for targets."""
    k = min(k, len(answers))
    table = answers if answers.is_floating_point() else torch.nn.functional.one_hot(answers)
    weights = torch.exp(-2 * torch.arange(bits + 1) / bits / temperature).numpy()
    parts, votes = [test_codes[start : start + QUERIES] for start in range(0, len(test_codes), QUERIES)], []
    for queries in with_progress(parts, title, len(test_codes), len):
        votes.append(np.zeros((len(queries), table.shape[1]), np.float32))
        distances = hamming_distances(queries, train_codes)
        count_votes(distances, table.float().numpy(), weights, k, votes[-1])
    return torch.from_numpy(np.concatenate(votes))


@compiled()
def count_votes(distances, table, weights, k, votes):
    """Adds to votes float32 [Q, T] for distances int32 [Q, N], answers table float32 [N, T] and the weight of
    each distance: images nearer than the k-th count whole, those as far by their share of the places left.
    """
    for q in range(distances.shape[0]):
        counts = np.zeros(len(weights), np.int64)
        for n in range(distances.shape[1]):
            counts[distances[q, n]] += 1
        last, nearer = 0, 0
        while nearer + counts[last] < k:
            nearer += counts[last]
            last += 1
        share = (k - nearer) / counts[last]
        for n in range(distances.shape[1]):
            d = distances[q, n]
            if d <= last:
                weight = weights[d] if d < last else weights[d] * share
                for t in range(table.shape[1]):
                    votes[q, t] += weight * table[n, t]


def check(train_shape: Any, train_y: Any, test_shape: Any, test_y: Any, k: int) -> None:
    if len(train_shape) != 2 or len(test_shape) != 2 or train_shape[1] != test_shape[1]:
        raise ValueError(
            f"train and test need one width: [N, D] and [M, D], not {list(train_shape)}, {list(test_shape)}"
        )
    if len(train_y) != train_shape[0] or len(test_y) != test_shape[0] or not len(train_y) or not len(test_y):
        raise ValueError("one label is needed for each row, and at least one row in train and in test")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
