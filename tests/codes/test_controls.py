import numpy as np
import pytest
from sklearn.decomposition import PCA

from lvssl.codes import controls
from lvssl.codes import quantiser as quantisers
from lvssl.codes.controls import (
    CONTROLS,
    LinearHash,
    fit_int8,
    fit_itq,
    fit_lsh,
    fit_opq,
    fit_pca,
    fit_pq,
    fit_sign,
    itq_rotation,
)
from pipelines.kernels.pack import packed_bytes, unpack_bits


def features(n=600, d=16, seed=0):
    generator = np.random.default_rng(seed)
    scale = np.arange(1, d + 1)[::-1] ** 0.7
    mixing = np.linalg.qr(np.random.default_rng(9).normal(size=(d, d)))[0]
    return (generator.normal(size=(n, d)) * scale @ mixing + 3).astype(np.float32)


def needs(name):
    if name in ("PQ", "OPQ"):
        pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_control_stores_its_bits_and_is_repeatable(name, bits):
    needs(name)
    train, test = features(seed=0), features(40, seed=1)
    coder, again = (CONTROLS[name](train, bits, seed=5) for _ in range(2))
    codes = coder.encode(test)
    assert coder.bits == bits and codes.dtype == np.uint8 and codes.shape == (40, packed_bytes(bits))
    assert np.array_equal(codes, again.encode(test))
    assert np.array_equal(codes[3:4], coder.encode(test[3:4]))  # an image's code is its own affair
    decoded = coder.decode(codes)
    assert decoded.shape[0] == 40 and decoded.dtype == np.float32 and np.isfinite(decoded).all()
    assert coder.encode(test[:0]).shape == (0, packed_bytes(bits))


@pytest.mark.parametrize("name", ["sign", "PCA + sign", "ITQ", "LSH", "int8"])
def test_single_features_and_images(name):
    one = np.array([[2.0]], np.float32)
    bits = 8 if name == "int8" else 1
    coder = CONTROLS[name](np.array([[1.0], [2.0], [4.0]]), bits)
    assert coder.encode(one).shape == (1, 1)
    assert CONTROLS[name](one, bits).encode(one).shape == (1, 1)


def test_sign_and_its_prefix():
    train = features()
    whole, prefix = fit_sign(train, 16), fit_sign(train, 5)
    bits = unpack_bits(whole.encode(train), 16)
    assert np.array_equal(bits, train > train.mean(axis=0))
    assert np.array_equal(unpack_bits(prefix.encode(train), 5), bits[:, :5])


def test_pca_directions_are_scikit_learns():
    train = features()
    coder, oracle = fit_pca(train, 6), PCA(6).fit(train)
    assert np.abs(np.abs((oracle.components_ @ coder.directions).diagonal()) - 1).max() < 1e-4
    assert (np.take_along_axis(coder.directions, np.abs(coder.directions).argmax(0)[None], 0) > 0).all()
    bits = unpack_bits(coder.encode(train), 6)
    signs = oracle.transform(train) * np.sign((oracle.components_ @ coder.directions).diagonal()) > 0
    assert (bits == signs).mean() > 0.999


def test_sign_bits_use_the_training_mean():
    h = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    coder = LinearHash(np.array([2.0, 5.0], np.float32), None)
    assert unpack_bits(coder.encode(h), 2).tolist() == [[False, False], [True, False]]
    for wrong in (h[:, :1], np.zeros((2, 3), np.float32)):
        with pytest.raises(ValueError, match="mean"):
            coder.encode(wrong)


def test_itqs_objective_never_rises_and_its_rotation_is_orthogonal():
    train = features()
    v = (train - train.mean(axis=0)) @ fit_pca(train, 8).directions
    v = v.astype(np.float64) / v.std()
    rotations = [itq_rotation(v, seed=1, iterations=steps) for steps in range(51)]
    assert np.allclose(rotations[-1] @ rotations[-1].T, np.eye(8), atol=1e-10)
    turned = [v @ rotation for rotation in (*rotations, np.eye(8))]
    *objective, plain = (np.square(np.where(x > 0, 1, -1) - x).mean() for x in turned)
    assert (np.diff(objective) <= 1e-9).all() and objective[-1] < 0.98 * objective[0]
    assert objective[-1] < plain  # better than the principal components' own signs
    coder = fit_itq(train, 8, seed=1)
    unit = coder.directions.T @ coder.directions
    assert np.allclose(unit, np.eye(8), atol=1e-4)


def test_lshs_bits_differ_with_the_angle():
    angles = np.array([0.2, 0.7, 1.5, 2.6])
    mean = np.array([1.0, -2.0, 0.5])
    train = mean + np.array([[1, 0, 0], [-1, 0, 0]])
    coder = fit_lsh(train, 40_000, seed=3)
    first = unpack_bits(coder.encode(train[:1]), coder.bits)
    turned = mean + np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    share = (unpack_bits(coder.encode(turned), coder.bits) != first).mean(axis=1)
    assert np.abs(share - angles / np.pi).max() < 4 * 0.5 / 200  # four standard errors of 40,000 bits


def test_int8_is_within_half_a_step_and_clips():
    train = features()
    coder = fit_int8(train, 8 * 16)
    assert coder.directions is None  # 8 bits a feature: no projection
    back = coder.decode(coder.encode(train)) + coder.mean
    assert (np.abs(back - train) <= coder.step / 2 + 1e-5).all()
    assert np.array_equal(coder.encode(1e6 * np.ones((1, 16))), np.full((1, 16), 255))
    few = fit_int8(train, 24)
    oracle = PCA(3).fit_transform(train)
    assert np.allclose(np.abs(few.decode(few.encode(train))), np.abs(oracle), atol=np.ptp(oracle) / 200)


def test_a_constant_feature_breaks_nothing():
    train = features()
    train[:, 3] = 7
    for name in ("sign", "PCA + sign", "ITQ", "LSH", "int8"):
        decoded = CONTROLS[name](train, 16).decode(CONTROLS[name](train, 16).encode(train))
        assert np.isfinite(decoded).all(), name


def test_pq_picks_the_nearest_centroid_of_each_part():
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    train = features()
    coder = fit_pq(train, 32)
    centroids = faiss.vector_to_array(coder.quantiser.centroids).reshape(4, 256, 4)
    parts = train.reshape(-1, 4, 4)
    truth = np.square(parts[:, :, None] - centroids[None]).sum(axis=3).argmin(axis=2)
    codes = coder.encode(train)
    assert codes.shape == (600, 4) and (codes == truth).mean() > 0.999
    assert np.allclose(coder.decode(codes).reshape(-1, 4, 4), centroids[np.arange(4), codes], atol=1e-5)


def test_opq_is_the_quantiser_that_encode_fits():
    """The same codes, and what they stand for, as `lvssl.codes.quantiser`."""
    pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    train = features()
    coder, quantiser = fit_opq(train, 32), quantisers.fit_opq(train, 32)
    codes = coder.encode(train)
    assert (codes == quantiser.encode(train)).mean() > 0.999  # as near to two words but for rounding
    assert np.allclose(coder.decode(codes), quantiser.decode(codes), atol=1e-5)
    assert np.allclose(coder.rotation.T @ coder.rotation, np.eye(16), atol=1e-4)


def test_impossible_codes_are_refused():
    train = features()
    for fit in (fit_sign, fit_pca, fit_itq):
        with pytest.raises(ValueError, match="16 features give codes of 1 to 16 bits$"):
            fit(train, 17)
    for fit in (fit_sign, fit_lsh, fit_int8):
        with pytest.raises(ValueError, match="give codes of 1 to"):
            fit(train, 0)
        with pytest.raises(ValueError, match=r"\[N, D\]"):
            fit(train[:0], 8)
    with pytest.raises(ValueError, match="whole bytes"):
        fit_int8(train, 12)
    with pytest.raises(ValueError, match="1 to 128 bits$"):
        fit_int8(train, 136)


def test_impossible_product_codes_are_refused():
    pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    with pytest.raises(ValueError, match="3 equal parts"):
        fit_pq(features(), 24)
    with pytest.raises(ValueError, match="256 training images"):
        fit_pq(features(100), 16)


def test_random_rotations_are_orthogonal_and_seeded():
    first = controls.random_rotation(5, 1)
    assert np.allclose(first @ first.T, np.eye(5)) and np.array_equal(first, controls.random_rotation(5, 1))
    assert not np.allclose(first, controls.random_rotation(5, 2))


def test_random_rotations_are_uniform():
    """Of 400 in three dimensions: numbers have mean 0 and deviation 1 / sqrt(3); half are reflections."""
    many = np.stack([controls.random_rotation(3, seed) for seed in range(400)])
    assert abs(many.mean(axis=0)).max() < 5 / np.sqrt(3 * 400)
    assert abs((np.linalg.det(many) > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize("name", ["ITQ", "LSH", "PQ", "OPQ"])
def test_another_seed_is_another_code(name):
    needs(name)
    train = features()
    codes = [CONTROLS[name](train, 16, seed=seed).encode(train) for seed in (1, 2)]
    assert not np.array_equal(*codes)
