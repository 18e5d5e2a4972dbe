import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from lvssl.evaluation.calibration import calibration, predictive_entropy


@pytest.fixture(scope="module")
def drawn():
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(7, 0.3), size=3000)
    labels = np.array([generator.choice(7, p=row) for row in p**0.5 / (p**0.5).sum(axis=1, keepdims=True)])
    return p, labels


def test_against_torchmetrics_and_sklearn(drawn):
    p, labels = drawn
    found = calibration(p, labels)
    metric = MulticlassCalibrationError(7, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(float(metric(torch.from_numpy(p), torch.from_numpy(labels))), abs=1e-6)
    assert found.nll == pytest.approx(log_loss(labels, p, labels=range(7)), rel=1e-9)
    expected = sum(brier_score_loss(labels == c, p[:, c]) for c in range(7))
    assert found.brier == pytest.approx(expected, rel=1e-9)
    assert found.accuracy == pytest.approx(100 * (p.argmax(axis=1) == labels).mean())
    assert sum(b["count"] for b in found.bins) == len(p)


def test_a_case_solved_by_hand():
    # Two images at confidence 0.9, one right: |0.5 - 0.9|; two at 0.6, both right: |1 - 0.6|.
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    found = calibration(p, [0, 1, 0, 1])
    assert found.ece == pytest.approx(0.4)
    assert found.brier == pytest.approx((0.02 + 1.62 + 0.32 + 0.32) / 4)
    assert found.nll == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean())


def test_labels_that_are_no_positions():
    p = np.array([[0.2, 0.8], [0.7, 0.3]])
    assert calibration(p, [9, 4], classes=[4, 9]).accuracy == 100
    assert calibration(p[:, ::-1], [9, 4], classes=[9, 4]).accuracy == 100
    with pytest.raises(ValueError, match="label 5 has no column"):
        calibration(p, [4, 5], classes=[4, 9])


def test_certain_and_wrong_stays_finite():
    assert calibration(np.array([[1.0, 0.0]]), [1]).nll == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize("p", [[[0.5, 0.6]], [[np.nan, 1.0]], [[-0.1, 1.1]]])
def test_rows_that_are_no_distribution_are_named(p):
    with pytest.raises(ValueError, match="row 0"):
        calibration(np.array(p), [0])
    with pytest.raises(ValueError, match="labels"):
        calibration(np.array([[0.5, 0.5]]), [0, 1])


def test_a_confidence_on_a_border_falls_into_the_lower_bin():
    found = calibration(np.array([[0.6, 0.4], [0.59, 0.41], [0.61, 0.39]]), [0, 1, 0]).bins  # 0.6 = 9 / 15
    assert [b["count"] for b in found] == [2, 1]
    assert [b["confidence"] for b in found] == pytest.approx([0.595, 0.61])


def test_entropy_is_scipys(drawn):
    p = np.vstack([drawn[0], np.full(7, 1 / 7), np.eye(7)[3]])
    assert predictive_entropy(p) == pytest.approx(entropy(p, axis=1))
