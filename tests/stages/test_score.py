"""Every figure against NumPy or scikit-learn."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score, top_k_accuracy_score

from lvssl.evaluation import score as score_module
from lvssl.evaluation.linear import ridge_probe
from lvssl.evaluation.score import RESAMPLES, classification, one_target, rank_of_label, score, wilson
from lvssl.runs.labels import LabelledDataset


def test_top_1_and_top_5_are_numpys_and_sklearns():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(500, 20)).astype(np.float32)
    labels = generator.integers(0, 20, 500)
    scores[np.arange(500), labels] += 1.0
    figures = score(torch.from_numpy(scores), torch.from_numpy(labels))
    order = np.argsort(-scores, axis=1)
    for k in (1, 5):
        by_numpy = 100 * (order[:, :k] == labels[:, None]).any(axis=1).mean()
        assert figures[f"top{k}"] == pytest.approx(by_numpy)
        assert figures[f"top{k}"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=k))
    assert figures["top1"] + 10 < figures["top5"] < 100


def test_equal_scores_favour_the_lower_class_and_few_classes_have_no_top_5():
    ranks = rank_of_label(torch.zeros(7, 7), torch.arange(7))
    assert ranks.tolist() == list(range(7))
    assert "top5" not in classification(torch.zeros(3, 5), torch.tensor([0, 1, 2]))
    assert classification(torch.zeros(6, 6), torch.arange(6))["top5"] == pytest.approx(100 * 5 / 6, abs=1e-3)


def test_a_class_without_a_score_is_never_right():
    """As in kNN if every training image of the last class is damaged."""
    for classes in (3, 6):
        figures = score(torch.eye(classes)[[0, 1, 0, 0]], torch.tensor([0, 1, classes, classes + 1]))
        assert figures["top1"] == 50 and figures.get("top5", 50) == 50


@pytest.mark.parametrize("right, count", [(0, 10), (10, 10), (7, 10), (1, 1), (9642, 10_000)])
def test_wilson_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx([100 * expected.low, 100 * expected.high], abs=1e-3)


def test_regression_figures_are_sklearns_and_the_interval_covers():
    generator = np.random.default_rng(0)
    answers = generator.normal(3, 2, (400, 2))
    predictions = answers + generator.normal(0, 1, (400, 2)) * [1, 5]
    figures = score(torch.from_numpy(predictions), torch.from_numpy(answers), ("age", "height"))
    for i, name in enumerate(("age", "height")):
        found = figures["targets"][name]
        assert found["mse"] == pytest.approx(mean_squared_error(answers[:, i], predictions[:, i]), rel=1e-4)
        assert found["mae"] == pytest.approx(mean_absolute_error(answers[:, i], predictions[:, i]), rel=1e-4)
        assert found["r2"] == pytest.approx(r2_score(answers[:, i], predictions[:, i]), rel=1e-4)
        assert found["r2_interval"][0] < found["r2"] < found["r2_interval"][1]
    true_r2 = 1 - 1 / 4
    assert figures["targets"]["age"]["r2_interval"][0] < true_r2 < figures["targets"]["age"]["r2_interval"][1]


def test_the_bootstrap_draws_one_resample_at_a_time():
    """A thousand at once are 8 kB an image; the resamples are those that one draw of all would give."""
    generator = np.random.default_rng(1)
    answers = generator.normal(size=20_000)
    predictions = answers + generator.normal(size=20_000)
    tracemalloc.start()
    found = one_target(predictions, answers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(answers)
    rows = np.random.default_rng(0).integers(0, 300, (RESAMPLES, 300))
    each = [r2_score(answers[:300][r], predictions[:300][r]) for r in rows]
    found = one_target(predictions[:300], answers[:300])
    assert found["r2_interval"] == pytest.approx(np.percentile(each, [2.5, 97.5]), abs=1e-12)


def test_predictions_that_are_not_finite_are_no_result():
    with pytest.raises(FloatingPointError, match="diverged"):
        score(torch.tensor([[0.0, float("nan")]]), torch.tensor([1]))


def test_the_bootstrap_draws_one_resample_at_a_time_and_the_same_as_all_at_once(monkeypatch):
    generator = np.random.default_rng(1)
    a = generator.normal(size=20_000)
    p = a + generator.normal(size=20_000)
    monkeypatch.setattr(score_module, "RESAMPLES", 50)
    tracemalloc.start()
    low, high = score_module.one_target(p, a)["r2_interval"]
    assert tracemalloc.get_traced_memory()[1] < 4e6, "half of what all indices at once take"
    tracemalloc.stop()
    drawn = np.random.default_rng(0).integers(0, 20_000, (50, 20_000))
    assert [low, high] == list(np.percentile([score_module.r2(p[i], a[i]) for i in drawn], [2.5, 97.5]))


@pytest.mark.parametrize("count", [2, 3, 4, 40])
def test_ridge_on_few_images_has_a_strength(count):
    """None of three images can be held out to choose it."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 4)).astype(np.float32)
    train = LabelledDataset(Path("train"), None, torch.from_numpy(x[:, :1]), 1, ("y",))
    predictions, strength = ridge_probe(x, train, x, 0)
    assert predictions.shape == (count, 1) and predictions.isfinite().all() and strength > 0
