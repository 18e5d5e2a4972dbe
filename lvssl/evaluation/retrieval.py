"""Mean average precision of a ranking with ties, in expectation over their order (McSherry & Najork 2008).

Hamming distances are small integers: thousands of images have the same distance, and the order in which a
sort leaves them can move the mAP of a short code by tens of points. Here every order of images at one
distance is equally likely, and the figure is the exact mean over all orders.

    s  images nearer than the tie   r  relevant ones among them   N, R  images of the tie, relevant ones
    P(position t of the tie is relevant) = R / N
    E[relevant before it | it is relevant] = r + (t - 1) (R - 1) / (N - 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma
from typing import Any

import numpy as np

from lvssl.codes import hamming
from lvssl.codes.search import check_packed, chunks, in_threads, slices, thread_count, words
from pipelines.kernels.compiled import compiled
from pipelines.kernels.pack import as_array

QUERIES = 1024  # queries at a time: two tables of counts [Q, distances + 1]


@dataclass(frozen=True)
class RetrievalScore:
    """mAP@n in [0, 1], averaged over the queries, with both denominators in use.

    - `over_hits`: the precisions at the hits within the first n, divided by the number of those hits; a query
      without a hit counts as 0. This is the denominator of the hashing literature's CIFAR-10 protocols.
    - `over_relevant`: the same sum divided by min(n, relevant images in the database), so that
      missing hits lower it.
    """

    over_hits: float
    over_relevant: float


def retrieval_map(
    queries: np.ndarray,
    query_labels: Any,
    database: np.ndarray,
    labels: Any,
    top_n: int = 1000,
    threads: int = 0,
) -> RetrievalScore:
    """Return mAP@`top_n` of packed codes, uint8 [Q, bytes] against [N, bytes]; images with the query's label
    are relevant. Ties count in expectation. Raises ValueError for shapes that don't match, no query or no
    row, top_n < 1.
    """
    check_packed(queries, database)
    query_labels, labels = checked(queries, query_labels, database, labels, top_n)
    query_words = words(queries)
    scores = np.empty((len(queries), 2))
    levels = 64 * query_words.shape[1] + 1
    for start in range(0, len(queries), QUERIES):
        block = slice(start, start + QUERIES)
        counts = np.zeros((2, len(query_words[block]), levels), np.int32)

        def count(part: slice, block: slice = block, counts: np.ndarray = counts) -> None:
            mine = query_words[block][part], query_labels[block][part]
            for row, chunk in chunks(database):
                those = labels[row : row + len(chunk)]
                hamming.count_distances(mine[0], chunk, mine[1], those, counts[0, part], counts[1, part])
            average_precisions(counts[0, part], counts[1, part], top_n, scores[block][part])

        in_threads(count, slices(counts.shape[1], thread_count(threads)))
    return RetrievalScore(*scores.mean(axis=0).tolist())


def similarity_map(
    queries: Any, query_labels: Any, database: Any, labels: Any, top_n: int = 1000
) -> RetrievalScore:
    """Return mAP as `retrieval_map` does, for vectors [Q, D] against [N, D] by cosine similarity in float32;
    equal similarities tie. For features, and for codes that are not made of bits."""
    import torch

    vectors = [torch.nn.functional.normalize(torch.as_tensor(x).float(), dim=1) for x in (queries, database)]
    query_labels, labels = checked(vectors[0], query_labels, vectors[1], labels, top_n)
    scores = np.empty((len(vectors[0]), 2))
    for start in range(0, len(scores), QUERIES):
        similarity = (vectors[0][start : start + QUERIES] @ vectors[1].T).numpy()
        for i, row in enumerate(similarity, start):
            same = labels == query_labels[i]
            near = row >= np.partition(row, max(len(row) - top_n, 0))[max(len(row) - top_n, 0)]
            _, level = np.unique(-row[near], return_inverse=True)
            counts, relevant = np.bincount(level), np.bincount(level, weights=same[near])
            counts, relevant = np.append(counts, (~near).sum()), np.append(relevant, same[~near].sum())
            both = [a.astype(np.int32)[None] for a in (counts, relevant)]
            average_precisions(both[0], both[1], top_n, scores[i : i + 1])
    return RetrievalScore(*scores.mean(axis=0).tolist())


@compiled()
def average_precisions(counts, relevant, top_n, scores):
    """Write scores [Q, 2] = (over hits, over relevant), given counts and relevant int32 [Q, L]: the images,
    and the relevant ones, at each distance, nearest first."""
    for i in range(counts.shape[0]):
        seen, hits, total, by_hits = 0, 0, 0.0, 0.0
        for level in range(counts.shape[1]):
            n, r = counts[i, level], relevant[i, level]
            if n == 0 or seen >= top_n:
                continue
            here = min(n, top_n - seen)
            places, gaps = 0.0, 0.0  # sums over positions t of 1 / (s + t), and of (t - 1) / (s + t)
            for t in range(1, here + 1):
                places += 1.0 / (seen + t)
                gaps += (t - 1.0) / (seen + t)
            if here == n:
                total += tie_precision(n, r, hits, places, gaps)
                by_hits = total / max(hits + r, 1)
            else:
                by_hits = cut_tie(n, r, here, hits, total, places, gaps)
                total += tie_precision(n, r, hits, places, gaps)
            seen += here
            hits += r
        everything = relevant[i].sum()
        scores[i, 0] = by_hits
        scores[i, 1] = total / min(top_n, everything) if everything else 0.0


@compiled()
def tie_precision(n, r, hits, places, gaps):
    """Return the expected sum of precisions at the relevant positions of n tied images, r relevant."""
    if r == 0:
        return 0.0
    later = (r - 1.0) / (n - 1.0) * gaps if n > 1 else 0.0
    return r / n * ((hits + 1.0) * places + later)


@compiled()
def cut_tie(n, r, here, hits, total, places, gaps):
    """Return the expected precision over hits if only `here` of the tie's n images are within the first n.
    The number h of relevant ones among them is hypergeometric; given h, every order is equally likely."""
    expected = 0.0
    for h in range(max(0, here - (n - r)), min(r, here) + 1):
        log_p = log_choose(r, h) + log_choose(n - r, here - h) - log_choose(n, here)
        if hits + h:
            expected += exp(log_p) * (total + tie_precision(here, h, hits, places, gaps)) / (hits + h)
    return expected


@compiled()
def log_choose(n, k):
    return lgamma(n + 1.0) - lgamma(k + 1.0) - lgamma(n - k + 1.0)


def checked(queries: Any, query_labels: Any, database: Any, labels: Any, top_n: int) -> tuple[Any, Any]:
    query_labels, labels = as_array(query_labels), as_array(labels)
    if query_labels.shape != (len(queries),) or labels.shape != (len(database),):
        raise ValueError("one label is needed for each query and for each row of the database")
    if not len(queries) or not len(database):
        raise ValueError("mAP needs at least one query and one image in the database")
    if top_n < 1:
        raise ValueError(f"top_n must be at least 1, not {top_n}")
    return query_labels.astype(np.int64), labels.astype(np.int64)
