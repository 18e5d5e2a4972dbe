import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score

from lvssl.evaluation.regression import STRENGTHS, ridge_each
from lvssl.evaluation.shapes import BACKGROUND, FACTORS, draw, make_shapes, regression_targets


def ridge(train_x, train_t, test_x, test_t):
    """To one target."""
    return ridge_each(train_x, {"": train_t}, test_x, {"": test_t})[""]


def shifted(row, **by):
    return row + [by.get(name, 0) for name in FACTORS]


def mask(image):
    return (image.astype(int) != BACKGROUND).any(axis=2)


def test_factors_are_what_the_pixels_show():
    row = np.array([3, 0.3, 0.5, 0.5, 0.0, 0.0])  # a red wedge that points right
    base = draw(row, 64)
    assert base[32, 36].tolist() == [255, 25, 25] and base[0, 0].tolist() == [BACKGROUND] * 3
    moved = draw(shifted(row, x=0.125, y=0.25), 64)  # 8 px right, 16 px down
    assert (moved[16:, 8:] == base[:-16, :-8]).all()
    turned = draw(shifted(row, rotation=0.25), 64)
    assert (mask(turned) == mask(np.rot90(base, -1))).mean() > 0.99
    larger = draw(row * [1, 1.5, 1, 1, 1, 1], 64)
    assert mask(larger).sum() / mask(base).sum() == pytest.approx(2.25, rel=0.1)
    green = draw(shifted(row, hue=1 / 3), 64)
    assert green[32, 36].tolist() == [25, 255, 25]


def test_every_shape_tells_its_rotation():
    for shape in range(4):
        row = np.array([shape, 0.3, 0.5, 0.5, 0.1, 0.0])
        for turn in (0.25, 0.5, 0.75):
            assert abs(draw(shifted(row, rotation=turn), 48).astype(int) - draw(row, 48)).mean() > 3


def test_draws_are_independent_uniform_and_repeatable():
    made = make_shapes(4000, 8, seed=5)
    assert (made.images == make_shapes(4000, 8, seed=5).images).all()
    correlation = np.corrcoef(made.factors.T) - np.eye(len(FACTORS))
    assert abs(correlation).max() < 0.06
    assert np.bincount(made.factors[:, 0].astype(int)).min() > 900
    assert make_shapes(0, 8).images.shape == (0, 8, 8, 3)
    targets = regression_targets(made.factors)
    assert {k: v.shape[1] for k, v in targets.items()} == dict(zip(FACTORS, (4, 1, 1, 1, 2, 2)))
    assert np.allclose((targets["hue"] ** 2).sum(axis=1), 1)


def test_ridge_against_sklearn_where_no_shrinkage_is_needed():
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(600, 8)), generator.normal(size=(8, 2))
    t = x @ w + 0.01 * generator.normal(size=(600, 2)) + 3
    found = ridge(x[:400], t[:400], x[400:], t[400:])
    oracle = LinearRegression().fit(x[:400], t[:400]).predict(x[400:])
    assert found.r2 == pytest.approx(r2_score(t[400:], oracle), abs=1e-4)
    assert found.mae == pytest.approx(mean_absolute_error(t[400:], oracle), rel=0.03)


@pytest.mark.parametrize("shape", [(60, 9), (40, 70), (5, 3)])  # more images than features, fewer, a handful
def test_leave_one_out_against_sklearn(shape):
    generator = np.random.default_rng(2)
    x = generator.normal(size=(shape[0] + 30, shape[1])).astype(np.float32)
    t = x @ generator.normal(size=(shape[1], 3)) + 3 * generator.normal(size=(len(x), 3)) + 5
    n, scale = shape[0], x[: shape[0]].std(axis=0)
    found = ridge_each(x[:n], {"one": t[:n, 0], "all": t[:n]}, x[n:], {"one": t[n:, 0], "all": t[n:]})
    for name, columns in (("one", slice(1)), ("all", slice(3))):
        oracle = RidgeCV(alphas=STRENGTHS).fit(x[:n] / scale, t[:n, columns])
        assert found[name].strength == oracle.alpha_
        expected = oracle.predict(x[n:] / scale).reshape(30, -1)
        assert found[name].r2 == pytest.approx(r2_score(t[n:, columns], expected), abs=1e-5)
        assert found[name].mae == pytest.approx(mean_absolute_error(t[n:, columns], expected), rel=1e-5)


def test_each_target_has_its_own_strength_and_prediction():
    """Those with one column are fitted at once."""
    generator = np.random.default_rng(3)
    x, w = generator.normal(size=(90, 20)).astype(np.float32), generator.normal(size=(20, 4))
    t = x @ w + np.array([0.1, 1, 1, 60]) * generator.normal(size=(90, 4))
    targets = {"plain": t[:, :1], "pair": t[:, 1:3], "noisy": t[:, 3:]}
    found = ridge_each(
        *[
            part
            for rows in (slice(60), slice(60, 90))
            for part in (x[rows], {n: c[rows] for n, c in targets.items()})
        ]
    )
    assert list(found) == list(targets) and len({one.strength for one in found.values()}) > 1
    for name, columns in targets.items():
        alone = ridge(x[:60], columns[:60], x[60:], columns[60:])
        assert found[name] == pytest.approx(alone, rel=1e-6)


def test_ridge_shrinks_where_features_are_noise_and_takes_awkward_targets():
    generator = np.random.default_rng(1)
    x, t = generator.normal(size=(80, 200)), generator.normal(size=80)
    noise = ridge(x[:60], t[:60], x[60:], t[60:])
    assert noise.strength > 100 and noise.r2 > -0.5
    constant = ridge(x[:60], np.ones(60), x[60:], np.ones(20))
    assert np.isnan(constant.r2) and constant.mae == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="train"):
        ridge(x[:60], t[:59], x[60:], t[60:])
    with pytest.raises(ValueError, match="test: a feature"):
        ridge(x[:60], t[:60], x[60:] * np.inf, t[60:])
