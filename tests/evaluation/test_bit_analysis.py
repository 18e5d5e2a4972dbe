import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, roc_auc_score

from lvssl.evaluation import analyse
from lvssl.evaluation.bit_analysis import class_auroc, flip_bits, mutual_information, sparse_probe
from lvssl.evaluation.outputs import NetworkOutputs
from lvssl.evaluation.sets import Sets


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
    found = flip_bits(bits[:40], labels[:40], bits[40:], labels[40:], bits=[0, 1, 2, 40])
    assert found.replaced.shape == (4,) and (found.replaced > 0.1).all()
    assert (found.follows > 0.5).all()  # most neighbours now carry the flipped value
    assert found.same_class[:3].mean() < found.same_class[3] - 0.05  # class bits cost the class, others don't
    one = flip_bits(bits[:5], labels[:5], bits[:1], labels[:1], bits=[0])
    assert one.replaced == pytest.approx([0])  # nothing else to find


def test_three_bits_are_found_to_be_enough(coded):
    bits, labels = coded
    found = sparse_probe(bits[:1200], labels[:1200], bits[1200:], labels[1200:])
    assert set(found) == set(range(8))
    assert all(0 < probe.bits_needed <= 4 and probe.auroc > 0.9 for probe in found.values()), found


def test_bits_needed_are_found_of_a_set_that_is_sorted_by_class(coded):
    bits, labels = coded
    order = np.argsort(labels, kind="stable")[::4]
    bits, labels, none = bits[order], labels[order], np.zeros((len(order), 0), np.float32)
    pixels = np.zeros((len(order), 8, 8, 3), np.uint8)
    sets = Sets(pixels, labels, pixels, labels, {}, (None, None), {}, order)
    outputs = NetworkOutputs(none, bits.astype(bool), none, none, none[:, 0:0], none[:, 0:0], none)
    few = analyse.bits(sets, outputs, [f"class {c}" for c in range(8)])[0]["few"]
    assert set(few) == {f"class {c}" for c in range(8)}
    assert all(found["auroc_all"] > 0.8 for found in few.values())
