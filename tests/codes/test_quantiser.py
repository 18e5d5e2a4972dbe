"""Quantisers and the search of real-valued queries, against plain references and faiss's own numbers."""

import numpy as np
import pytest
import torch

from lvssl.codes.asymmetric import table_search
from lvssl.codes.controls import fit_itq, fit_pca
from lvssl.codes.index import Index
from lvssl.codes.quantiser import FITS, Quantiser
from lvssl.codes.search import hamming_search
from pipelines.kernels.pack import packed_bytes, unpack_bits


def features(n=600, d=16, seed=0):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(d, d)) * np.arange(1, d + 1)[::-1, None] ** 0.7
    return (generator.normal(size=(n, d)) @ mixing + 3).astype(np.float32)


def fitted(code: str, bits=16) -> Quantiser:
    if code == "opq":
        pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    return FITS[code](features(), bits)


@pytest.mark.parametrize("code", FITS)
def test_looked_up_distances_are_those_to_the_decoded_codes(code):
    quantiser, train, queries = fitted(code), features(), features(7, seed=1)
    codes = quantiser.encode(train)
    assert (
        codes.dtype == np.uint8
        and codes.shape == (600, packed_bytes(quantiser.bits))
        and quantiser.bits == 16
    )
    projected = quantiser.project(queries)
    exact = np.square(projected[:, None] - quantiser.decode(codes)[None]).sum(axis=2)
    for threads in (1, 3, 16):  # queries shared out; rows shared out
        rows, distances = table_search(quantiser.tables(projected), codes, 50, threads)
        assert np.allclose(distances, np.sort(exact, axis=1)[:, :50], rtol=1e-4, atol=1e-4)
        assert np.allclose(np.take_along_axis(exact, rows, axis=1), distances, rtol=1e-4, atol=1e-4)
    assert quantiser.digest == FITS[code](train, 16).digest != FITS[code](train, 8).digest
    assert quantiser.encode(train[:0]).shape == (0, packed_bytes(16))


def test_ties_go_to_the_lower_row_however_the_rows_are_shared_out():
    quantiser = fitted("bits", 4)
    codes = quantiser.encode(features())
    tables = quantiser.tables(quantiser.project(features(5, seed=1)))
    found = [table_search(tables, codes, 100, threads)[0] for threads in (1, 2, 9)]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    sums = tables[:, 0, codes[:, 0]]
    assert np.array_equal(found[0], np.argsort(sums, axis=1, kind="stable")[:, :100])


def test_opq_is_faisss():
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    quantiser, train, queries = fitted("opq", 32), features(), features(20, seed=1)
    theirs = faiss.ProductQuantizer(16, 4, 8)
    faiss.copy_array_to_vector(quantiser.words.ravel(), theirs.centroids)
    x = np.ascontiguousarray(quantiser.project(train))
    codes = quantiser.encode(train)
    assert (theirs.compute_codes(x) == codes).mean() > 0.999  # two words may be equally near but for rounding
    assert np.allclose(theirs.decode(codes), quantiser.decode(codes))
    assert (quantiser.squares(quantiser.decode(codes)) >= 0).all()  # of a word to itself, too
    index = faiss.IndexPQ(16, 4, 8)
    index.pq, index.is_trained = theirs, True
    index.add(x)
    wanted, _ = index.search(np.ascontiguousarray(quantiser.project(queries)), 10)
    _, distances = table_search(quantiser.tables(quantiser.project(queries)), codes, 10)
    assert np.allclose(distances, wanted, rtol=1e-3, atol=1e-3)
    turned = quantiser.projection.T @ quantiser.projection
    assert np.allclose(turned, np.eye(16), atol=1e-4)


@pytest.mark.parametrize("code, fit", [("itq", fit_itq), ("pca", fit_pca)])
def test_bits_are_those_of_the_equal_bit_control_of_standardised_features(code, fit):
    train = features()
    x = (train - train.mean(axis=0)) / train.std(axis=0)
    same = unpack_bits(fitted(code, 8).encode(train), 8) == unpack_bits(fit(x, 8).encode(x), 8)
    assert same.mean() > 0.999


def test_a_query_that_is_not_quantised_finds_more_of_the_true_neighbours():
    train, queries = features(2000), features(200, seed=1)
    quantiser = FITS["itq"](train, 16)
    codes, projected = quantiser.encode(train), quantiser.project(queries)
    exact = np.square(projected[:, None] - quantiser.project(train)[None]).sum(axis=2).argsort(axis=1)[:, :10]

    def recall(rows):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact)])

    real = recall(table_search(quantiser.tables(projected), codes, 10)[0])
    assert real > recall(hamming_search(quantiser.encode(queries), codes, 10)[0]) + 0.03


@pytest.mark.parametrize("code", FITS)
def test_tensors_are_taken_like_arrays(code):
    """Of bfloat16, which NumPy lacks, and with a gradient: fitting, encoding, adding and searching."""
    if code == "opq":
        pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    halves = torch.from_numpy(features()).bfloat16()
    array = halves.float().numpy()
    quantiser = FITS[code](halves.requires_grad_(), 8)
    assert quantiser.digest == FITS[code](array, 8).digest
    index, codes = Index(quantiser=quantiser), quantiser.encode(halves)
    assert np.array_equal(codes, quantiser.encode(array))
    index.add(torch.from_numpy(codes), range(600))
    (ids, distances), (expected, theirs) = index.search(halves[::100], 3), index.search(array[::100], 3)
    assert ids == expected and np.array_equal(distances, theirs)
    assert len(Index(torch.from_numpy(codes), range(600), quantiser)) == 600


@pytest.mark.parametrize("code", ["bits", "itq", "pca"])
def test_the_words_of_a_bit_are_the_training_means_on_either_side(code):
    quantiser = fitted(code, 8)
    for x, words in zip(quantiser.project(features()).T, quantiser.words[:, :, 0], strict=True):
        assert words == pytest.approx([x[x <= 0].mean(), x[x > 0].mean()], rel=1e-4)


@pytest.mark.parametrize("code", FITS)
def test_a_constant_number_breaks_nothing(code):
    if code == "opq":
        pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    train = features()
    train[:, 3] = 7
    quantiser = FITS[code](train, 16)
    assert np.isfinite(quantiser.project(train)).all()
    assert np.isfinite(quantiser.decode(quantiser.encode(train))).all()
    if code == "bits":
        assert not unpack_bits(quantiser.encode(train), 16)[:, 3].any()  # it is at 0, not above


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="1 to 16 bits$"):
        FITS["itq"](features(), 17)
    with pytest.raises(ValueError, match=r"features \[N, 16\]"):
        fitted("bits").encode(features(d=3))
    with pytest.raises(ValueError, match=r"tables \[Q, 2, 256\]"):
        table_search(np.zeros((1, 1, 256), np.float32), np.zeros((4, 2), np.uint8), 1)
    bad = features()
    bad[[3, 7], 0] = np.nan, np.inf
    for code in ("bits", "pca", "itq"):
        with pytest.raises(ValueError, match="training features: vector 3 isn't finite"):
            FITS[code](bad, 8)
        with pytest.raises(ValueError, match="features: vector 1 isn't finite"):
            fitted(code).encode(bad[2:])
        with pytest.raises(ValueError, match=r"training features \[N, D\] are needed, not \[16\]"):
            FITS[code](features()[0], 8)
    pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    with pytest.raises(ValueError, match="training features: vector 3 isn't finite"):
        FITS["opq"](bad, 8)
    with pytest.raises(ValueError, match="256 training images"):
        FITS["opq"](features(100), 8)
    with pytest.raises(ValueError, match="whole bytes"):
        FITS["opq"](features(), 9)
