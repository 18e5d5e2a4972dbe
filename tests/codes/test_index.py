"""Codes as an index: the caller's ids, additions and deletions, a filter, and faiss's files."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lvssl.codes.file import CodeFileError
from lvssl.codes.index import Index, nearest_rows
from lvssl.codes.quantiser import FITS, Quantiser
from lvssl.codes.search import hamming_search


def features(n=500, d=16, seed=0):
    mixing = np.random.default_rng(9).normal(size=(d, d)) * np.arange(1, d + 1)[::-1, None] ** 0.7
    return (np.random.default_rng(seed).normal(size=(n, d)) @ mixing + 3).astype(np.float32)


def names(n):
    return [f"image {i}" for i in range(n)]


def test_it_answers_again_and_again_while_codes_come_and_go():
    quantiser = FITS["itq"](features(), 16)
    index, codes = Index(quantiser=quantiser), quantiser.encode(features())
    index.add(codes[:200], names(200))
    index.add(codes[200:], names(500)[200:])
    queries = features(5, seed=1)
    rows, distances = nearest_rows(queries, codes, 7, quantiser)
    found, same = index.search(queries, 7)
    assert found == [[f"image {row}" for row in of_query] for of_query in rows] and np.array_equal(
        same, distances
    )
    gone = {one for of_query in found for one in of_query}
    index.delete(gone)
    assert len(index) == 500 - len(gone)
    left = [i for i in range(500) if f"image {i}" not in gone]
    rows, _ = nearest_rows(queries, codes[left], 7, quantiser)
    assert index.search(queries, 7)[0] == [[f"image {left[row]}" for row in of_query] for of_query in rows]
    index.add(codes[[int(one.split()[1]) for one in sorted(gone)]], sorted(gone))
    assert sorted(index.search(queries[:1], 7)[0][0]) == sorted(found[0])


def test_a_filter_is_the_search_of_those_alone_and_codes_are_queries_too():
    quantiser = FITS["pca"](features(), 12)
    codes = quantiser.encode(features())
    index, only = Index(codes, list(range(500)), quantiser), list(range(3, 500, 7))
    found, distances = index.search(codes[:4], 5, only=only)
    rows, wanted = hamming_search(codes[:4], codes[only], 5)
    assert found == [[only[row] for row in of_query] for of_query in rows.tolist()]
    assert np.array_equal(distances, wanted)
    again = index.search(codes[:4], 5, only=only[::-1] * 2)  # in any order, and twice
    assert again[0] == found and np.array_equal(again[1], wanted)


def test_mistakes_are_said_and_change_nothing():
    index = Index(np.zeros((3, 2), np.uint8), ["a", "b", "c"])
    with pytest.raises(ValueError, match="'b' is in the index already"):
        index.add(np.ones((2, 2), np.uint8), ["d", "b"])
    with pytest.raises(ValueError, match=r"codes uint8 \[1, 2\]"):
        index.add(np.ones((1, 3), np.uint8), ["d"])
    with pytest.raises(KeyError, match="x"):
        index.delete(["a", "x"])
    with pytest.raises(ValueError, match="need the quantiser"):
        index.search(np.zeros((1, 4), np.float32), 1)
    for empty in (Index(), Index(quantiser=FITS["pca"](features(), 12))):
        with pytest.raises(ValueError, match="the index is empty: add codes first"):
            empty.search(np.zeros((1, 2), np.uint8), 1)
    with pytest.raises(ValueError, match="`only` names no code"):
        index.search(index.rows, 1, only=[])
    with pytest.raises(ValueError, match="same id"):
        Index(np.zeros((2, 2), np.uint8), ["a", "a"]).delete(["a"])
    assert list(index.ids) == ["a", "b", "c"] and len(index) == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the same values
def test_queries_that_match_no_code_are_refused():
    quantiser = FITS["itq"](features(), 16)
    index, queries = Index(quantiser.encode(features()), names(500), quantiser), features(3)
    for value in (np.nan, np.inf, 1e30):
        queries[1, 0] = value
        with pytest.raises(ValueError, match="query 1: its distances aren't finite"):
            index.search(queries, 2)
    words = np.random.default_rng(0).normal(size=(4, 256, 4)).astype(np.float32)
    product = Quantiser(quantiser.mean, quantiser.scale, np.eye(len(quantiser.mean), 16, dtype="f4"), words)
    codes = product.encode(features())
    for width in (1, 3, 5):
        with pytest.raises(ValueError, match=f"{width} bytes a code, the database 4"):
            nearest_rows(np.zeros((2, width), np.uint8), codes, 1, product)


@pytest.mark.parametrize("code", ["opq", "itq"])
def test_faiss_reads_the_index_and_finds_the_same(code, tmp_path):
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    quantiser, queries = FITS[code](features(), 16), features(20, seed=1)
    index = Index(quantiser.encode(features()), names(500), quantiser)
    index.write_faiss(tmp_path / "index.faiss")
    if code == "itq":
        read = faiss.read_index_binary(str(tmp_path / "index.faiss"))
        wanted = nearest_rows(quantiser.encode(queries), index.rows, 5, quantiser)[1]
        found, _ = read.search(quantiser.encode(queries), 5)
        assert np.array_equal(found, wanted)
    else:
        read = faiss.read_index(str(tmp_path / "index.faiss"))
        found, _ = read.search(queries, 5)
        assert np.allclose(found, nearest_rows(queries, index.rows, 5, quantiser)[1], rtol=1e-3, atol=1e-3)
    assert read.ntotal == 500


@pytest.mark.parametrize("code", ["opq", "itq"])
def test_faiss_finds_them_under_the_callers_numbers(code, tmp_path):
    faiss = pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    quantiser, queries = FITS[code](features(), 16), features(20, seed=1)
    numbers = np.random.default_rng(2).permutation(10**12 + np.arange(500)).tolist()
    index = Index(quantiser.encode(features()), numbers, quantiser)
    index.write_faiss(tmp_path / "index.faiss")
    read = (faiss.read_index_binary if code == "itq" else faiss.read_index)(str(tmp_path / "index.faiss"))
    asked = quantiser.encode(queries) if code == "itq" else queries
    distances, found = read.search(asked, 5)
    assert np.allclose(distances, index.search(asked, 5)[1], rtol=1e-3, atol=1e-3)
    for everyone, own, some, near in zip(*index.search(asked, 500), found.tolist(), distances):
        distance_of = dict(zip(everyone, own))
        assert np.allclose([distance_of[one] for one in some], near, rtol=1e-3, atol=1e-3)
    assert read.remove_ids(found[0]) == 5 and read.ntotal == 495
    assert not set(read.search(asked[:1], 400)[1].ravel().tolist()) & set(found[0].tolist())


@pytest.mark.parametrize("ids", [names(500), list(range(7, 507)), ["", "naïve", "\udcff.jpg", *names(497)]])
def test_a_saved_index_opens_as_it_was_and_goes_on(ids, tmp_path):
    quantiser, queries, path = FITS["itq"](features(), 16), features(5, seed=1), tmp_path / "my.index"
    index = Index(quantiser.encode(features()), ids, quantiser)
    index.save(str(path))
    first = path.read_bytes()
    opened = Index.open(str(path))
    assert list(opened.ids) == ids and opened.quantiser.digest == quantiser.digest
    for asked in (queries, quantiser.encode(queries), queries):  # again and again
        wanted, found = index.search(asked, 7), opened.search(asked, 7)
        assert wanted[0] == found[0] and np.array_equal(wanted[1], found[1])
    opened.delete(ids[:400])
    opened.add(quantiser.encode(queries[:1]), [ids[3]])
    opened.save(path)
    assert opened.search(queries[:1], 1)[0] == [[ids[3]]] == Index.open(path).search(queries[:1], 1)[0]
    index.save(path)
    assert path.read_bytes() == first and [path] == list(tmp_path.iterdir())


def test_an_empty_index_and_one_without_a_quantiser_are_saved_too(tmp_path):
    rows = np.eye(3, 2, dtype=np.uint8)
    for index in (Index(), Index(rows, [5, 3, 4]), Index(rows, np.array([5, 3, 4]))):
        index.save(tmp_path / "i")
        opened = Index.open(tmp_path / "i")
        assert np.array_equal(opened.rows, index.rows) and list(opened.ids) == list(index.ids)
        assert opened.quantiser is None


def test_what_cant_be_saved_or_opened_is_said(tmp_path):
    path = tmp_path / "i"
    for ids in (["a", 3], [(1, 2), (3, 4)], [1, 2**63], [1, True]):
        with pytest.raises(ValueError, match="all texts or all whole numbers"):
            Index(np.zeros((2, 2), np.uint8), ids).save(path)
    with pytest.raises(CodeFileError, match="i: can't be read as an index"):
        Index.open(path)
    Index(np.zeros((2, 2), np.uint8), ["a", "b"]).save(path)
    whole, arrays = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CodeFileError, match="i: can't be read as an index"):
        Index.open(path)
    path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(CodeFileError, match="i: damaged"):
        Index.open(path)
    save_file(arrays, path)
    with pytest.raises(CodeFileError, match="i: not an index"):
        Index.open(path)
    save_file(arrays, path, {"lvssl index": "9 1234"})
    with pytest.raises(CodeFileError, match="i: format version 9, this release reads 1"):
        Index.open(path)


@pytest.mark.parametrize("code", ["bits", "opq"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_query_without_distances_is_refused(code, value):
    """Its neighbours' row was -1, which names the last code of the index."""
    if code == "opq":
        pytest.importorskip("faiss")
    x = features()
    quantiser = FITS[code](x, 8)
    index = Index(quantiser.encode(x), names(500), quantiser)
    queries = x[:3].copy()
    queries[1, 2] = value
    with pytest.raises(ValueError, match="query 1: its distances aren't finite"):
        index.search(queries, k=2)
    with pytest.raises(ValueError, match="query 0: its distances aren't finite"):
        index.search(queries[1:2], k=2, threads=3)


def test_ids_in_an_array_are_saved_as_those_in_a_list(tmp_path):
    rows = np.arange(30, dtype=np.uint8).reshape(10, 3)
    for ids in (np.arange(10), np.array([f"image {i}" for i in range(10)])):
        Index(rows, ids).save(tmp_path / "index")
        assert Index.open(tmp_path / "index").ids == ids.tolist()


def test_an_index_for_faiss_is_written_under_a_path_as_text(tmp_path):
    faiss = pytest.importorskip("faiss")
    Index(np.zeros((4, 2), np.uint8), range(4)).write_faiss(str(tmp_path / "index.faiss"))
    assert faiss.read_index_binary(str(tmp_path / "index.faiss")).ntotal == 4
