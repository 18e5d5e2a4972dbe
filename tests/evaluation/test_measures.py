import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from lvssl.evaluation import knn
from lvssl.evaluation.knn import hamming_knn, hamming_votes, nearest_by_cosine, weighted_knn
from lvssl.evaluation.probe import held_out, linear_probe, standardise
from lvssl.evaluation.uncertainty import auroc, nearest_other, r_auroc, risk_coverage_area
from pipelines.kernels.pack import pack_bits


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


# --- the linear probe -----------------------------------------------------------------------------


def test_probe_agrees_with_a_converged_pipeline_of_sklearn(digits):
    train_x, train_y, test_x, test_y = digits
    strength = 1e-2
    result = linear_probe(*digits, regularisation=(strength,))
    scaler = StandardScaler().fit(train_x)
    oracle = LogisticRegression(C=1 / (strength * len(train_x)), max_iter=5000, tol=1e-8)
    oracle.fit(scaler.transform(train_x), train_y)
    assert result.accuracy == pytest.approx(100 * oracle.score(scaler.transform(test_x), test_y), abs=0.35)
    # It stops after STEPS: probabilities are near the optimum's, not equal to them.
    assert np.abs(result.probabilities - oracle.predict_proba(scaler.transform(test_x))).mean() < 0.005
    assert result.accuracy == pytest.approx(100 * (result.predictions == test_y).mean())
    assert result.probabilities.shape == (len(test_y), 10) and np.allclose(
        result.probabilities.sum(1), 1, atol=1e-5
    )


def test_probe_is_repeatable_takes_tensors_and_never_sees_the_test_labels(digits):
    train_x, train_y, test_x, test_y = digits
    first = linear_probe(*digits)
    again = linear_probe(*(torch.as_tensor(a) for a in digits))
    shuffled = linear_probe(train_x, train_y, test_x, np.zeros_like(test_y))
    assert np.array_equal(first.probabilities, again.probabilities)
    assert np.array_equal(first.probabilities, shuffled.probabilities)
    assert first.accuracy > 95


def test_probe_chooses_strong_regularisation_where_features_are_noise():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 200))
    y = np.tile([0, 1, 2], 100)
    x[:, 0] += 2 * y
    result = linear_probe(x[:150], y[:150], x[150:], y[150:], regularisation=(1e-6, 1e-3, 1.0))
    weak = linear_probe(x[:150], y[:150], x[150:], y[150:], regularisation=(1e-6,))
    log_likelihood = [np.log(r.probabilities[np.arange(150), y[150:]]).mean() for r in (result, weak)]
    assert result.regularisation == 1.0 and log_likelihood[0] > log_likelihood[1] + 0.5


def test_of_equally_good_strengths_the_strongest_is_chosen():
    y = np.arange(3).repeat(40)
    result = linear_probe(np.eye(3)[y], y, np.eye(3), range(3), regularisation=(1e-2, 1e-1, 1e-3))
    assert result.accuracy == 100 and result.regularisation == 1e-1


def test_constant_columns_of_any_size_are_harmless(digits):
    train_x, train_y, test_x, test_y = digits
    constants = np.array([0.0, 1e8, 0.1, -3.3], dtype=np.float32)
    with_constants = [np.hstack([x, np.tile(constants, (len(x), 1))]) for x in (train_x, test_x)]
    with_constants[1][:, -4:] += 5  # at test time they vary, and must not be blown up
    plain = linear_probe(*digits)
    result = linear_probe(with_constants[0], train_y, with_constants[1], test_y)
    assert result.accuracy == pytest.approx(plain.accuracy, abs=0.35)
    assert np.isfinite(standardise(*with_constants)[1]).all()


def test_split_is_balanced_and_keeps_every_class_in_training():
    y = np.array([0] * 100 + [1] * 40 + [2] * 2 + [3])
    mask = held_out(y, seed=3)
    assert [int(mask[y == c].sum()) for c in range(4)] == [15, 6, 0, 0]
    assert np.array_equal(mask, held_out(y, seed=3)) and not np.array_equal(mask, held_out(y, seed=4))


def test_probe_with_a_handful_of_labels_and_two_classes():
    x = np.array([[0.0, 1], [0, 2], [1, 1], [1, 2]])
    result = linear_probe(x, [5, 5, 9, 9], x, [5, 5, 9, 9])
    assert result.accuracy == 100 and result.classes.tolist() == [5, 9] and result.regularisation == 1e-2
    assert result.scores(10).argmax(axis=1).tolist() == [5, 5, 9, 9]


def test_probe_refuses_what_it_cannot_fit(digits):
    train_x, train_y, test_x, test_y = digits
    broken = train_x.copy()
    broken[7, 3] = np.nan
    with pytest.raises(FloatingPointError, match=r"train: row 7 .* the training diverged \(lower --lr\)"):
        linear_probe(broken, train_y, test_x, test_y)
    for arguments, message in [
        ((train_x, train_y[:5], test_x, test_y), "train: features"),
        ((train_x, train_y, test_x[:, :5], test_y), "test_x 5"),
        ((train_x, np.zeros_like(train_y), test_x, test_y), "two classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(*arguments)


@pytest.mark.slow
def test_probe_is_quick_enough_for_the_demo():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, 12_000)
    x = (generator.normal(size=(12_000, 256)) + 0.5 * generator.normal(size=(10, 256))[y]).astype(np.float32)
    start = time.process_time()
    linear_probe(x[:10_000], y[:10_000], x[10_000:], y[10_000:])
    assert time.process_time() - start < 12  # processor seconds: 6 on two cores


# --- nearest neighbours ---------------------------------------------------------------------------


def test_neighbours_are_sought_on_the_device_that_is_named_or_where_they_lie(digits, monkeypatch):
    """Not on a GPU that is there and that nobody asked for."""
    places = []

    def nearest(train_x, test_x, k, device, title):
        places.append(device or train_x.device)
        return nearest_by_cosine(train_x, test_x, k, device, title)

    monkeypatch.setattr("lvssl.evaluation.knn.nearest_by_cosine", nearest)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu = torch.device("cpu")
    x, y, test_x, test_y = digits
    assert weighted_knn(torch.as_tensor(x), y, test_x, test_y) == weighted_knn(*digits, device=cpu)
    assert places == [cpu, cpu]


def test_weighted_knn_agrees_with_sklearn(digits):
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 1.0)):
        oracle = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        )
        truth = 100 * oracle.fit(*digits[:2]).score(*digits[2:])
        assert weighted_knn(*digits, k=k, temperature=temperature) == pytest.approx(truth, abs=0.2)


def test_at_a_low_temperature_the_nearest_decide(digits):
    """No weight may underflow to 0 for all neighbours, which would give every image the first class."""
    train, y, test, test_y = digits
    codes = [pack_bits(x > train.mean(axis=0)) for x in (train, test)]
    for temperature in (1e-2, 1e-4, 1e-6):
        found = weighted_knn(*digits, k=20, temperature=temperature)
        assert found == pytest.approx(weighted_knn(*digits, k=1), abs=1.5)
        of_codes = hamming_knn(codes[0], y, codes[1], test_y, 64, 20, temperature)
        assert of_codes == pytest.approx(hamming_knn(codes[0], y, codes[1], test_y, 64, 1), abs=2)


def test_knn_cuts_k_to_the_training_set():
    x, y = np.eye(3), np.array([0, 1, 2])
    assert weighted_knn(x, y, x, y, k=20) == 100
    assert hamming_knn(pack_bits(x), y, pack_bits(x), y, bits=3, k=20) == 100


def hamming_knn_by_orders(train, y, test, test_y, k, temperature, orders=400):
    """The votes averaged over random orders of the training set, ties broken by place: brute force."""
    generator, bits = np.random.default_rng(0), train.shape[1]
    votes = np.zeros((len(test), y.max() + 1))
    for _ in range(orders):
        order = generator.permutation(len(train))
        distances = (test[:, None] != train[order][None]).sum(2)
        for i, row in enumerate(np.argsort(distances, axis=1, kind="stable")[:, :k]):
            np.add.at(votes[i], y[order][row], np.exp((1 - 2 * distances[i, row] / bits) / temperature))
    return 100 * (votes.argmax(1) == test_y).mean()


def test_hamming_knn_is_the_expectation_over_orders(digits):
    train_x, train_y, test_x, test_y = digits
    train, test = (train_x[:80, 20:32] > 8), (test_x[:200, 20:32] > 8)  # 12 bits: ties everywhere
    y, test_y = train_y[:80], test_y[:200]
    got = hamming_knn(pack_bits(train), y, pack_bits(test), test_y, bits=12, k=5, temperature=0.5)
    assert got == pytest.approx(hamming_knn_by_orders(train, y, test, test_y, 5, 0.5), abs=2.0)


def test_hamming_knn_does_not_depend_on_the_order_of_the_training_set():
    # All training codes tie. By the lower index the one that comes first would decide.
    train, y = np.zeros((30, 8), dtype=bool), np.array([1] * 10 + [0] * 20)
    test, test_y = np.zeros((1, 8), dtype=bool), np.array([0])
    for order in (np.arange(30), np.arange(30)[::-1]):
        assert hamming_knn(pack_bits(train), y[order], pack_bits(test), test_y, bits=8, k=5) == 100


def test_hamming_knn_equals_cosine_knn_of_signs_where_nothing_ties():
    # Training image j differs from the query in j bits: all distances distinct.
    train = np.tril(np.ones((40, 64), dtype=bool), -1)
    y = np.random.default_rng(1).integers(0, 3, 40)
    test = np.zeros((1, 64), dtype=bool)
    for label in range(3):
        signs = [2.0 * bits - 1 for bits in (train, test)]
        cosine = weighted_knn(signs[0], y, signs[1], np.array([label]), k=9)
        assert hamming_knn(pack_bits(train), y, pack_bits(test), np.array([label]), bits=64, k=9) == cosine


def by_brute_force(train, test):
    """Cosines and rows, nearest first: all cosines at once, equals by the lower row."""
    unit = [torch.nn.functional.normalize(torch.as_tensor(x).double(), dim=1) for x in (train, test)]
    return (unit[1] @ unit[0].T).sort(dim=1, descending=True, stable=True)


@pytest.mark.parametrize("near", ["nearest_on_cpu", "nearest_on_device"])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_neighbours_in_tiles_are_those_of_all_cosines_at_once(monkeypatch, near, k):
    monkeypatch.setattr(knn, "TILE", 96), monkeypatch.setattr(knn, "DEVICE_TILE", 96)
    monkeypatch.setattr(knn, "BLOCK", 7), monkeypatch.setattr(knn, "QUERIES", 20)
    monkeypatch.setattr(knn, "nearest_on_cpu", getattr(knn, near))
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(1000, 5)), generator.normal(size=(53, 5))
    cosines, rows = nearest_by_cosine(train.astype(np.float16), test, k)
    wanted, order = by_brute_force(train.astype(np.float16), test.astype(np.float32))
    assert torch.allclose(cosines.double(), wanted[:, :k], atol=1e-6)
    assert (rows == order[:, :k]).float().mean() > 0.995  # fp32 may exchange two that are almost as near
    assert rows.dtype == torch.int64 and cosines.dtype == torch.float32


def test_equally_near_images_come_in_their_order_whatever_the_tiles(monkeypatch):
    monkeypatch.setattr(knn, "TILE", 16)
    train = np.tile(np.float32([[-1, 0], [1, 0], [0, -2]]), (100, 1))  # cosines -1, 1 and 0, a hundred each
    cosines, rows = nearest_by_cosine(train, np.float32([[3, 0]]), 250)
    assert rows[0].tolist() == [*range(1, 300, 3), *range(2, 300, 3), *range(0, 150, 3)]
    assert cosines[0].tolist() == [1.0] * 100 + [0.0] * 100 + [-1.0] * 50


def test_votes_of_codes_are_those_of_all_distances_at_once(monkeypatch):
    """Against the definition: nearer images whole, those as far as the k-th by their share."""
    monkeypatch.setattr(knn, "HAMMING_QUERIES", 10)
    monkeypatch.setattr("lvssl.codes.search.CHUNK_BYTES", 64 * 2)
    generator = np.random.default_rng(0)
    train, test = generator.random((300, 12)) > 0.5, generator.random((23, 12)) > 0.5
    y, targets = generator.integers(0, 7, 300), generator.normal(size=(300, 2)).astype(np.float32)
    distances = (test[:, None] != train[None]).sum(2)
    for k in (1, 5, 299, 300):
        kth = np.sort(distances, axis=1)[:, k - 1 : k]
        share = (k - (distances < kth).sum(1)) / (distances == kth).sum(1)
        nearest = distances.min(axis=1, keepdims=True)
        weights = np.exp(-2 * (distances - nearest) / 12 / 0.5) * np.where(
            distances == kth, share[:, None], distances < kth
        )
        for answers, table in ((y, np.eye(7)[y]), (targets, targets)):
            votes = hamming_votes(pack_bits(train), torch.from_numpy(answers), pack_bits(test), 12, k, 0.5)
            np.testing.assert_allclose(votes.numpy(), weights @ table, rtol=1e-5, atol=1e-6)


def test_knn_says_that_features_are_not_finite():
    x, y = np.eye(3), np.arange(3)
    broken = x.copy()
    broken[1, 1] = np.nan
    for sets in ((broken, y, x, y), (x, y, broken, y)):
        with pytest.raises(FloatingPointError, match="not finite"):
            weighted_knn(*sets)


def test_knn_refuses_shapes_that_do_not_match():
    x, y = np.eye(3), np.arange(3)
    with pytest.raises(ValueError, match="one width"):
        weighted_knn(x, y, x[:, :2], y)
    with pytest.raises(ValueError, match="one label"):
        weighted_knn(x, y[:2], x, y)
    with pytest.raises(ValueError, match="k must be"):
        hamming_knn(pack_bits(x), y, pack_bits(x), y, bits=3, k=0)


# --- uncertainty ----------------------------------------------------------------------------------

# Two tight pairs, and one image (index 4) whose nearest other is of another class.
FEATURES = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99], [0.5, 0.9]])
LABELS = torch.tensor([0, 0, 1, 1, 0])


def test_r_auroc_by_hand():
    r, recall = r_auroc(FEATURES, LABELS, [0.1, 0.2, 0.3, 0.4, 0.9])
    assert (r, recall) == (1.0, 0.8)
    assert r_auroc(FEATURES, LABELS, [0.1, 0.2, 0.3, 0.4, 0.0]).r_auroc == 0.0
    assert r_auroc(FEATURES, LABELS, [0.5] * 5).r_auroc == 0.5
    assert (
        r_auroc(FEATURES, LABELS, [0.1, 0.2, 0.3, 0.4, 0.35]).r_auroc == 0.75
    )  # above 3 of the 4 right ones
    assert np.isnan(r_auroc(FEATURES[:4], LABELS[:4], [1.0, 2, 3, 4]).r_auroc)  # all right: nothing to rank
    assert r_auroc(FEATURES[:4], LABELS[:4], [1.0, 2, 3, 4]).recall_at_1 == 1.0


def test_r_auroc_agrees_with_sklearn(digits):
    x, y = digits[2][:400, 20:40], digits[3][:400]
    uncertainty = np.round(np.random.default_rng(0).random(400), 1)  # with ties
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(400)
    right = y[similarity.argmax(1)] == y
    r, recall = r_auroc(x, y, uncertainty)
    assert recall == pytest.approx(right.mean()) and 0 < recall < 1
    assert r == pytest.approx(roc_auc_score(right, -uncertainty), abs=1e-9)
    assert auroc(right, uncertainty) == pytest.approx(roc_auc_score(right, uncertainty), abs=1e-9)


def test_the_nearest_other_is_the_same_in_any_chunks(digits):
    x = digits[2][:50, 20:40]
    similarity = (unit := x / np.linalg.norm(x, axis=1, keepdims=True)) @ unit.T - 2 * np.eye(50)
    assert np.array_equal(nearest_other(torch.from_numpy(x), chunk=7), similarity.argmax(1))


def test_aurc_by_hand_and_with_ties():
    assert risk_coverage_area([False, False, True], [0.1, 0.2, 0.3]) == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert risk_coverage_area([True, False, False], [0.1, 0.2, 0.3]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert risk_coverage_area([True, False, True, False], [7.0] * 4) == pytest.approx(0.5)
    generator = np.random.default_rng(0)
    wrong, scores = generator.random(30) < 0.3, generator.integers(0, 4, 30)
    by_orders = [risk_coverage_area(wrong, scores + 1e-6 * generator.permutation(30)) for _ in range(3000)]
    assert risk_coverage_area(wrong, scores) == pytest.approx(np.mean(by_orders), abs=0.003)


def test_uncertainty_measures_refuse_what_does_not_match():
    with pytest.raises(ValueError, match="r_auroc needs"):
        r_auroc(FEATURES, LABELS[:3], [0.0] * 5)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="r_auroc: a feature isn't a finite number"):
            r_auroc(np.where(np.arange(5)[:, None] == 3, value, FEATURES), LABELS, [0.0] * 5)
    with pytest.raises(ValueError, match="score 2 isn't finite"):
        r_auroc(FEATURES, LABELS, [0.1, 0.2, float("nan"), 0.3, 0.4])
    with pytest.raises(ValueError, match="risk_coverage_area needs"):
        risk_coverage_area([True], [0.1, 0.2])
