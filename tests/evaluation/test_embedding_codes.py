"""`lvssl encode` and `lvssl curate` of anybody's embeddings: kills, what is found, bad input."""

import csv

import numpy as np
import pytest
import torch

from lvssl.codes.file import open_codes
from lvssl.codes.index import Index
from lvssl.codes.writer import CodeWriter
from lvssl.commands.main import main
from lvssl.evaluation import embedding_codes
from lvssl.evaluation.neighbours import nearest_cells, nearest_in_cells
from lvssl.evaluation.quantisers import stored_quantiser
from lvssl.runs.embeddings import open_embeddings


def lvssl(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def embeddings(tmp_path):
    random = np.random.default_rng(0)
    features = (random.normal(size=(700, 8)) @ random.normal(size=(8, 24))).astype(np.float32)
    np.save(tmp_path / "train.npy", features)
    return tmp_path / "train.npy"


def test_codes_of_embeddings_go_on_after_a_kill_to_the_same_bytes(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_codes, "CHUNK", 100)
    asked = ["encode", embeddings, "--images", embeddings, "--bits", 16, "--code", "itq"]
    assert lvssl(*asked, "--out", tmp_path / "whole.lvcodes") == 0
    append, calls = CodeWriter.append, []

    def killed(self, rows, names, *rest, **others):
        calls.append(len(rows))
        if len(calls) == 4:  # within the fourth chunk: its first 30 rows are on the disk
            short = {name: values[:30] for name, values in others.items()}
            append(self, rows[:30], list(names)[:30], *rest, **short)
            raise KeyboardInterrupt
        append(self, rows, names, *rest, **others)

    monkeypatch.setattr(CodeWriter, "append", killed)
    assert lvssl(*asked, "--out", tmp_path / "killed.lvcodes") == 130
    assert not (tmp_path / "killed.lvcodes").exists()
    assert lvssl(*asked, "--out", tmp_path / "killed.lvcodes") == 0
    assert calls == [100, 100, 100, 100, 70, 100, 100, 100]
    for kind in ("", ".uncertainty"):
        one, other = ((tmp_path / f"{name}.lvcodes{kind}").read_bytes() for name in ("whole", "killed"))
        assert one == other
    codes, known = open_codes(tmp_path / "whole.lvcodes"), open_embeddings(embeddings, labelled=False)
    index = Index.of_file(codes, stored_quantiser(known, codes))
    found, _ = index.search(known.features[:50], 5)
    exact = np.square(known.features[:50, None] - known.features).sum(axis=2).argmin(axis=1)
    assert np.mean([str(row) in ids for ids, row in zip(found, exact)]) > 0.9  # itself, by 16 bits


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "size, said",
    [
        (1e30, "asked.npy: row 3 is too far from the embeddings of"),
        (1e300, "asked.npy: row 3 has a value beyond the range of fp32"),
        (np.inf, "asked.npy: row 3 has a value that isn't a finite number"),
    ],
)
def test_a_huge_embedding_is_refused_in_one_line(embeddings, tmp_path, capsys, size, said):
    """It used to be encoded anyhow, between warnings of numpy's."""
    asked = np.load(embeddings)[:50].astype(np.float64)
    asked[3, 5] = size
    np.save(tmp_path / "asked.npy", asked)
    out, more = tmp_path / "codes.lvcodes", ["--bits", 16, "--code", "itq"]
    assert lvssl("encode", embeddings, "--images", tmp_path / "asked.npy", "--out", out, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and sum("error" in line or "Warning" in line for line in lines) == 1
    assert not out.exists()


def test_embeddings_that_are_all_huge_are_encoded(embeddings, tmp_path):
    np.save(tmp_path / "train.npy", np.load(embeddings) * 1e30)
    assert lvssl("encode", embeddings, "--images", embeddings, "--out", tmp_path / "codes", "--bits", 8) == 0


def test_copies_among_embeddings_are_found_by_features_alone(embeddings, tmp_path, capsys):
    features = np.load(embeddings)
    features[5] = features[600] * 1.0001
    np.save(embeddings, features)
    np.save(tmp_path / "test.npy", np.concatenate([features[:1], -features[1:40]]))
    arguments = ["curate", embeddings, "--test", tmp_path / "test.npy", "--cosine", 0.9999]
    assert lvssl(*arguments) == 0
    assert "no pixels to confirm duplicates" in capsys.readouterr().err
    with open(tmp_path / "train-curate" / "duplicates.csv", newline="") as file:
        pairs = {(r["set"], r["name"], r["other_set"], r["other_name"]) for r in csv.DictReader(file)}
    assert pairs == {("train", "5", "train", "600"), ("test", "0", "train", "0")}
    assert not (tmp_path / "train-curate" / "labels.csv").exists()  # there are no labels
    assert len((tmp_path / "train-curate" / "outliers.csv").read_text().splitlines()) == 741


def test_neighbours_in_cells_are_nearly_the_exact_ones(monkeypatch):
    """Exact with one cell; with many, nearly, and never the image itself."""
    random = np.random.default_rng(1)
    x = (random.normal(size=(3000, 6)) @ random.normal(size=(6, 16))).astype(np.float32)
    z = x.mean(axis=0), x.std(axis=0)
    unit = (x - z[0]) / z[1]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    truth = np.argsort(-cosines, axis=1)[:, :10]
    rows, found = nearest_in_cells(x, x, z, 10, same=True)
    assert np.allclose(found, np.take_along_axis(cosines, truth, axis=1), atol=1e-5)
    assert np.allclose(np.take_along_axis(cosines, rows, axis=1), found, atol=1e-5)
    centroids = torch.from_numpy(np.concatenate([unit[:5], 0.1 * unit[5:9]]))  # of unequal length
    near = torch.cdist(torch.from_numpy(unit), centroids).topk(3, largest=False).indices
    assert np.mean(nearest_cells(x, z, centroids, 3) == near.numpy()) > 0.999
    monkeypatch.setattr("lvssl.evaluation.neighbours.EXACT", 1000)
    monkeypatch.setattr("lvssl.evaluation.neighbours.IN_A_CELL", 100)
    rows, found = nearest_in_cells(x, x, z, 10, same=True)
    assert (rows != np.arange(3000)[:, None]).all() and all(len(set(r)) == 10 for r in rows.tolist())
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), truth.tolist())]) > 0.95


def test_mistakes_are_one_line(embeddings, tmp_path, capsys):
    np.save(tmp_path / "narrow.npy", np.zeros((9, 3), np.float32))
    for arguments, message in [
        (["encode", embeddings, "--images", embeddings], "pass --bits"),
        (
            ["encode", embeddings, "--images", tmp_path / "narrow.npy", "--bits", 8],
            "features have 3 dimensions",
        ),
        (["encode", embeddings, "--images", embeddings, "--bits", 25, "--code", "itq"], "at most 24 bits"),
        (["encode", embeddings, "--images", embeddings, "--bits", 500], "at most 24 bits or, in whole bytes"),
        (["encode", embeddings, "--images", tmp_path / "gone.npy", "--bits", 8], "gone.npy"),
        (["curate", embeddings, "--test", tmp_path / "narrow.npy"], "features have 3 dimensions"),
        (["curate", embeddings, "--pixels", 2], "--pixels must be in [0, 1], got 2"),
    ]:
        assert lvssl(*arguments) == 2
        assert message in capsys.readouterr().err


def test_equal_embeddings_are_duplicates_of_each_other(tmp_path):
    """Standardised they are zeros, which have no direction."""
    np.save(tmp_path / "same.npy", np.ones((5, 8), np.float32))
    assert lvssl("curate", tmp_path / "same.npy", "--subset", 2) == 0
    rows = (tmp_path / "same-curate/duplicates.csv").read_text().splitlines()[1:]
    assert len(rows) == 10  # each pair of the five


def test_what_embeddings_do_not_have_is_said_and_not_advised(embeddings, tmp_path, capsys):
    np.save(tmp_path / "one.npy", np.load(embeddings)[:1])
    encoded = ["--images", embeddings, "--bits", 8, "--code"]
    for arguments, said in [
        (["encode", tmp_path / "one.npy", *encoded, "itq"], "one.npy: at least two embeddings are needed"),
        (["encode", embeddings, *encoded, "bits"], "--code bits: embeddings have no code of their own"),
        (["search", embeddings, "--query", embeddings], "train.npy: is a file, not a run folder"),
    ]:
        assert lvssl(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert lvssl("encode", embeddings, "--images", embeddings, "--bits", 1) == 0
    assert " 700 itq codes of 1 bit, " in (printed := capsys.readouterr().out) and "next" not in printed
