"""RankMe and the online kNN against plain references, and where they stand in a run's log."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lvssl.runs.progress import read_metrics
from lvssl.settings.pretrain import PRESETS
from lvssl.training import features
from lvssl.training.features import online_knn, rankme
from lvssl.training.pretrain import pretrain


def rankme_by_svd(h: np.ndarray) -> float:
    """The paper's definition, without its 1e-7: the product of p^-p, p the singular values over their sum."""
    values = np.linalg.svd(h.astype(np.float64), compute_uv=False)
    p = values / values.sum()
    return float(np.prod([x**-x for x in p if x > 0]))


# wider than long, longer than wide, square, one image, one feature
@pytest.mark.parametrize(("count", "width"), [(30, 50), (200, 33), (64, 64), (1, 8), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rankme_is_that_of_the_singular_values(count, width, dtype):
    generator = torch.Generator().manual_seed(count)
    spread = torch.logspace(0, -2, width)  # of unequal directions, about a mean that isn't 0
    h = (torch.randn(count, width, generator=generator) * spread + 0.1).to(dtype)
    assert rankme(h) == pytest.approx(rankme_by_svd(h.double().numpy()), rel=1e-9)


def test_rankme_of_known_ranks():
    h = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(torch.randn(25, 25, generator=torch.Generator().manual_seed(1)))[0]
    of_three = torch.linalg.qr(h)[0] @ directions[:3]
    assert rankme(of_three) == pytest.approx(3, rel=1e-5)  # equal singular values, up to fp32's roundings
    assert rankme(torch.eye(12)) == pytest.approx(12, rel=1e-12)
    assert rankme(torch.ones(20, 9)) == pytest.approx(1, rel=1e-5)
    assert rankme(torch.zeros(20, 9)) == 1
    assert math.isnan(rankme(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))


@pytest.mark.parametrize("queries", [4096, 7])
def test_online_knn_is_the_share_of_nearest_images_of_the_same_class(queries, monkeypatch):
    monkeypatch.setattr(features, "QUERIES", queries)
    generator = np.random.default_rng(0)
    labels = np.arange(30) % 3
    h = generator.normal(size=(30, 5)) + np.eye(5)[labels]
    hits = []
    for i in range(min(queries, 30)):
        cosines = [-2.0 if i == j else h[i] @ h[j] / np.linalg.norm(h[j]) for j in range(30)]
        hits.append(labels[int(np.argmax(cosines))] == labels[i])
    assert 0 < np.mean(hits) < 1
    found = online_knn(torch.from_numpy(h), torch.from_numpy(labels))
    assert found == pytest.approx(100 * np.mean(hits), rel=1e-6)


def test_they_are_logged_at_the_end_of_each_epoch(digits, tmp_path):
    chosen = dataclasses.replace(PRESETS["digits"], data=digits["train"], out=tmp_path / "run", threads=1)
    pretrain(dataclasses.replace(chosen, epochs=3, log_every=4))  # of 10 steps
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "rankme" in row] == [12, 20, 30]
    for row in rows:
        assert ("online_knn" in row) == ("rankme" in row) and "h" not in row
    assert all(1 < row["rankme"] <= 64 and 0 < row["online_knn"] <= 100 for row in rows if "rankme" in row)
    assert rows[-1]["online_knn"] > 50  # chance is 10
