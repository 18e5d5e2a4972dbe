"""mAP with ties against the mean over every order of the tied images, one after another."""

from itertools import chain, permutations, product

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lvssl.evaluation.retrieval import retrieval_map, similarity_map
from pipelines.kernels.pack import pack_bits


def plain(ranked, first):
    """(over hits, over relevant) of one ranking, relevant or not, by the definition."""
    hits, precisions = 0, []
    for place, relevant in enumerate(ranked[:first], 1):
        if relevant:
            hits += 1
            precisions.append(hits / place)
    return sum(precisions) / max(hits, 1), sum(precisions) / max(min(first, sum(ranked)), 1)


def over_all_orders(distances, relevant, first):
    """The mean of `plain` over every order of the images at each distance."""
    ties = [np.flatnonzero(distances == d) for d in np.unique(distances)]
    orders = [list(chain(*order)) for order in product(*(permutations(tie) for tie in ties))]
    return np.mean([plain(relevant[order].tolist(), first) for order in orders], axis=0)


def codes_at(distances):
    """A query of zeros and codes at these distances from it."""
    bits = np.arange(8)[None, :] < np.asarray(distances)[:, None]
    return pack_bits(np.zeros((1, 8), bool)), pack_bits(bits)


CASES = [
    ([0], [1]),
    ([3], [0]),
    ([1, 1, 1, 1], [1, 0, 0, 1]),  # one tie
    ([0, 1, 1, 1, 2, 2], [0, 1, 0, 1, 1, 0]),
    ([2, 0, 2, 1, 2, 2], [1, 1, 0, 0, 0, 1]),  # not in order
    ([0, 0, 0, 5, 5, 5], [0, 0, 0, 1, 1, 1]),
    ([4, 4, 4, 4, 4, 4], [1, 1, 1, 1, 1, 1]),
    ([0, 0, 3, 3], [0, 0, 0, 0]),  # no relevant image at all
]


@pytest.mark.parametrize(("distances", "relevant"), CASES)
def test_ties_count_as_the_mean_over_their_orders(distances, relevant):
    distances, relevant = np.array(distances), np.array(relevant)
    query, codes = codes_at(distances)
    unit = np.stack([np.cos(distances / 3), np.sin(distances / 3)], axis=1)
    for first in range(1, len(distances) + 2):  # the cut falls into ties, and beyond the end
        truth = over_all_orders(distances, relevant, first)
        for score in (
            retrieval_map(query, [1], codes, relevant, first),
            similarity_map([[1.0, 0.0]], [1], unit, relevant, first),
        ):
            assert (score.over_hits, score.over_relevant) == pytest.approx(tuple(truth), abs=1e-9), first


def test_without_ties_it_is_scikit_learns_average_precision():
    generator = np.random.default_rng(0)
    queries, database = generator.normal(size=(20, 6)), generator.normal(size=(300, 6))
    query_labels, labels = generator.integers(0, 3, 20), generator.integers(0, 3, 300)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, database)]
    truth = [
        average_precision_score(labels == label, similarity)
        for label, similarity in zip(query_labels, unit[0] @ unit[1].T)
    ]
    score = similarity_map(queries, query_labels, database, labels, top_n=300)
    assert score.over_hits == pytest.approx(np.mean(truth), abs=1e-6)
    assert score.over_relevant == pytest.approx(np.mean(truth), abs=1e-6)


@pytest.mark.parametrize("first", [1, 37, 1000, 5000])
def test_codes_agree_with_random_orders(first):
    """Short codes of many images, nearly all ties; the expectation against 300 shuffles of the database."""
    generator = np.random.default_rng(1)
    labels, query_labels = generator.integers(0, 4, 1500), np.array([0, 1, 3])
    bits = generator.random((1500, 4)) < 0.3 + 0.1 * labels[:, None]
    query_bits = generator.random((3, 4)) < 0.3 + 0.1 * query_labels[:, None]
    distances = (query_bits[:, None] != bits[None]).sum(axis=2)
    orders = []
    for _ in range(300):
        shuffled = generator.permutation(1500)
        ranks = np.argsort(distances[:, shuffled], axis=1, kind="stable")
        ranked = [labels[shuffled][r] == y for r, y in zip(ranks, query_labels)]
        orders.append(np.mean([plain(r.tolist(), first) for r in ranked], axis=0))
    score = retrieval_map(pack_bits(query_bits), query_labels, pack_bits(bits), labels, first)
    allowed = 4 * np.std(orders, axis=0) / np.sqrt(300) + 1e-9
    assert abs(score.over_hits - np.mean(orders, axis=0)[0]) <= allowed[0]
    assert abs(score.over_relevant - np.mean(orders, axis=0)[1]) <= allowed[1]


def test_threads_and_blocks_change_nothing(monkeypatch):
    generator = np.random.default_rng(2)
    queries, database = (pack_bits(generator.random((n, 100)) < 0.5) for n in (30, 400))
    labels = generator.integers(0, 3, 400)
    whole = retrieval_map(queries, labels[:30], database, labels, 50, threads=1)
    monkeypatch.setattr("lvssl.evaluation.retrieval.QUERIES", 7)
    monkeypatch.setattr("lvssl.codes.search.CHUNK_BYTES", 1000)
    assert retrieval_map(queries, labels[:30], database, labels, 50, threads=3) == whole


def test_what_does_not_match_is_refused():
    query, codes = codes_at([0, 1])
    for arguments, message in [
        ((query, [1, 1], codes, [1, 0]), "one label"),
        ((query, [1], codes, [1]), "one label"),
        ((query[:0], [], codes, [1, 0]), "at least one"),
        ((query, [1], codes[:0], []), "at least one"),
        ((query, [1], codes, [1, 0], 0), "top_n"),
    ]:
        with pytest.raises(ValueError, match=message):
            retrieval_map(*arguments)
