import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, roc_auc_score

from lvssl.evaluation import bit_analysis
from lvssl.evaluation.bit_analysis import (
    class_auroc,
    counted_information,
    dci,
    dci_of_importances,
    flip_bits,
    mig,
    mutual_information,
    sparse_probe,
)


@pytest.fixture(scope="module")
def coded():
    """64 random bits of which the first three spell the class (0..7), and 3 % of all are flipped."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 8, 1600)
    bits = generator.integers(0, 2, (1600, 64))
    bits[:, :3] = (labels[:, None] >> np.arange(3)) & 1
    return bits ^ (generator.random(bits.shape) < 0.03), labels


def test_information_against_sklearn(coded):
    bits, labels = coded
    expected = [mutual_info_score(labels, column) / np.log(2) for column in bits.T]
    assert mutual_information(bits, labels) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(bits[:, :0], labels).shape == (0,)


def test_auroc_against_sklearn_with_and_without_ties(coded):
    bits, labels = coded
    scores = bits[:, :6] + np.random.default_rng(1).normal(size=(len(bits), 6)).round(1)
    for values in (bits[:, :6], scores):
        found = class_auroc(values, labels)
        expected = [[roc_auc_score(labels == c, column) for c in range(8)] for column in values.T]
        assert found == pytest.approx(np.array(expected), abs=1e-12)
    assert np.isnan(class_auroc(bits[:, :2], np.zeros(len(bits)))).all()


def test_flipping_a_bit_moves_the_neighbours_that_way(coded):
    bits, labels = coded
    found = flip_bits(bits[:40], labels[:40], bits[40:], labels[40:], k=10, bits=[0, 1, 2, 40])
    assert found.replaced.shape == (4,) and (found.replaced > 0.1).all()
    assert (found.follows > 0.5).all()  # most neighbours now carry the flipped value
    assert found.same_class[:3].mean() < found.same_class[3] - 0.05  # class bits cost the class, others don't
    one = flip_bits(bits[:5], labels[:5], bits[:1], labels[:1], k=10, bits=[0])
    assert one.replaced == pytest.approx([0])  # nothing else to find


def test_three_bits_are_found_to_be_enough(coded):
    bits, labels = coded
    found = sparse_probe(bits[:1200], labels[:1200], bits[1200:], labels[1200:])
    assert set(found) == set(range(8))
    assert all(0 < probe.bits_needed <= 4 and probe.auroc > 0.9 for probe in found.values()), found


def factors_and_codes():
    generator = np.random.default_rng(2)
    factors = np.stack([generator.integers(0, 2, 3000), generator.integers(0, 4, 3000)], axis=1)
    pure = np.stack([factors[:, 0], factors[:, 1] & 1, factors[:, 1] >> 1], axis=1)
    mixed = np.stack([pure[:, 0] ^ pure[:, 1], pure[:, 1] ^ pure[:, 2], pure.sum(axis=1) & 1], axis=1)
    return factors, pure, mixed


def test_dci_and_mig_know_pure_codes_from_mixed_ones():
    factors, pure, mixed = factors_and_codes()
    one_each = np.column_stack([factors, np.random.default_rng(3).integers(0, 2, 3000)])
    best = dci(one_each[:2000], factors[:2000], one_each[2000:], factors[2000:], categorical=(0, 1))
    assert best.disentanglement > 0.98 and best.completeness > 0.98 and best.informativeness == 1
    worst = dci(mixed[:2000], factors[:2000], mixed[2000:], factors[2000:], categorical=(0, 1))
    assert worst.disentanglement < best.disentanglement - 0.3 and worst.informativeness == 1
    assert mig(one_each, factors, (0, 1)) == pytest.approx([1, 1], abs=0.01)
    assert mig(pure, factors, (0, 1)) == pytest.approx([1, 0], abs=0.01)  # two bits share the second factor
    assert mig(mixed, factors, (0, 1)) == pytest.approx([0, 0.5], abs=0.01)  # the second: a function of it


def test_the_trees_answers_are_added_in_one_order(monkeypatch):
    """Several threads add them in the order they come, and the last bit of the informativeness is another."""
    threads = []

    class Forest(bit_analysis.ExtraTreesRegressor):
        def predict(self, x):
            threads.append(self.n_jobs)
            return super().predict(x)

    monkeypatch.setattr(bit_analysis, "ExtraTreesRegressor", Forest)
    z = np.random.default_rng(0).normal(size=(200, 3))
    dci(z[:100], z[:100, :2], z[100:], z[100:, :2])
    assert threads == [1, 1]


def test_dci_of_a_table_solved_by_hand():
    table = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = dci_of_importances(table, 0.7)
    assert found.disentanglement == pytest.approx(0.5)  # one pure row, one of no preference, equal weight
    h = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(2)
    assert found.completeness == pytest.approx(0.75 * (1 - h) + 0.25)
    assert dci_of_importances(np.zeros((3, 2)), 0.1) == (0, 0, 0.1)


def test_counted_information_of_continuous_columns_is_near_the_truth():
    generator = np.random.default_rng(4)
    x = generator.normal(size=20_000)
    y = 0.8 * x + 0.6 * generator.normal(size=20_000)
    gap = mig(np.stack([y, generator.normal(size=20_000)], axis=1), x[:, None])
    assert gap[0] * np.log(20) == pytest.approx(-0.5 * np.log(1 - 0.64), abs=0.06)
    assert counted_information(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])) == pytest.approx(np.log(2))
