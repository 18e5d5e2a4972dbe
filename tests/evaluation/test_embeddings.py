"""knn and linear on embeddings from other models' files."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lvssl.commands.main import main
from lvssl.evaluation import foreign, streamed
from lvssl.evaluation.knn import weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.runs import features
from lvssl.runs.embeddings import is_embeddings, open_embeddings, open_pair_of_embeddings
from pipelines.errors import InputError


@pytest.fixture(scope="module")
def made():
    generator = np.random.default_rng(0)
    centres, sets = generator.normal(size=(10, 16)), {}
    for split, count in (("train", 900), ("test", 300)):
        y = generator.integers(0, 10, count)
        sets[split] = (centres[y] + 1.2 * generator.normal(size=(count, 16))).astype(np.float32), y
    return sets


def write(kind: str, folder: Path, split: str, x: np.ndarray, y: np.ndarray) -> Path:
    path = folder / f"{split}.{kind}"
    if kind == "npy":
        np.save(path, x)
        np.save(folder / f"{split}-labels.npy", y.astype(np.int32))
    elif kind == "safetensors":
        save_file({"features": torch.from_numpy(x), "labels": torch.from_numpy(y)}, path)
    elif kind == "parquet":
        table = pa.table({"image_id": [str(i) for i in range(len(y))], "embedding": list(x), "label": y})
        pq.write_table(table, path, row_group_size=130)
    else:
        path = folder / split
        path.mkdir()
        np.save(path / "features.npy", x)
        np.save(path / "labels.npy", y)
    return path


@pytest.mark.parametrize("kind", ["npy", "folder", "safetensors", "parquet"])
def test_a_folder_of_embeddings_stands_in_a_runs_place(kind, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "PART", 256)
    for split, (x, y) in made.items():
        read = open_embeddings(write(kind, tmp_path, split, x, y))
        assert np.array_equal(read.features, x) and np.array_equal(read.labels, y)
    assert main(["knn", str(tmp_path), "--k", "7"]) == main(["linear", str(tmp_path)]) == 0
    given = *made["train"], *made["test"]
    knn, linear = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("knn", "linear"))
    assert knn["results"]["features"]["top1"] == weighted_knn(*given, k=7) > 70
    assert linear["results"]["features"]["top1"] == linear_probe(*given).accuracy > 70
    assert linear["probe"] == "logistic" and knn["data"]["images"] == 900
    printed = capsys.readouterr().out
    assert "knn on features: top-1" in printed and f"written: {tmp_path / 'linear.json'}" in printed


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_the_names_of_embeddings_may_end_in_capitals(kind, made, tmp_path):
    for split, (x, y) in made.items():
        write(kind, tmp_path, split, x, y)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(path.suffix.upper()))
    for given in (tmp_path, tmp_path / f"train.{kind.upper()}"):
        assert is_embeddings(given)
        train, test = open_pair_of_embeddings(given, None, None)
        assert np.array_equal(train.features, made["train"][0]) and len(test.labels) == 300


def test_an_array_whose_name_ends_otherwise_has_its_labels_in_an_npy(made, tmp_path):
    write("npy", tmp_path, "test", *made["test"])
    (tmp_path / "test.npy").rename(tmp_path / "test.f32")
    assert np.array_equal(open_embeddings(tmp_path / "test.f32").labels, made["test"][1])


def test_a_result_is_found_again_and_other_embeddings_are_told_apart(made, tmp_path, capsys):
    for split, (x, y) in made.items():
        write("npy", tmp_path, split, x, y)
    files = [tmp_path / name for name in ("train.npy", "test.npy", "knn.json")]
    assert main(["knn", *map(str, files[:1]), "--test", str(files[1])]) == 0
    stamp = files[2].stat().st_mtime_ns
    assert main(["knn", *map(str, files[:1]), "--test", str(files[1])]) == 0
    assert files[2].stat().st_mtime_ns == stamp
    x, y = made["train"]
    for changed, labels in ((x + 1, y), (x, np.roll(y, 1))):
        np.save(files[0], changed)
        np.save(tmp_path / "train-labels.npy", labels)
        assert main(["knn", str(files[0]), "--test", str(files[1])]) == 2
        assert "already holds a result for other settings (checkpoint: " in capsys.readouterr().err


def test_test_embeddings_that_are_the_training_embeddings_are_noted(made, tmp_path, capsys):
    for split, (x, y) in made.items():
        write("npy", tmp_path, split, x, y)
    for test, expected in (("train", True), ("test", False)):
        paths = [str(tmp_path / name) for name in ("train.npy", f"{test}.npy", f"{test}-knn.json")]
        assert main(["knn", paths[0], "--test", paths[1], "--out", paths[2]]) == 0
        assert ("the test images are the training images" in capsys.readouterr().err) == expected


def test_a_file_that_was_replaced_is_read_anew(made, tmp_path):
    """It is as long as before, as embeddings of another model of that width are."""
    x, y = made["test"]
    for number, changed in enumerate((x, x + 1)):
        path = write("safetensors", tmp_path, "test", changed, y)
        os.utime(path, ns=(0, number))  # two files written at once may have the same time
        assert np.array_equal(open_embeddings(path).features, changed)


def test_many_embeddings_are_probed_as_they_stream(made, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "LARGE_SET", 900)
    monkeypatch.setattr(streamed, "STEPS", 50)
    for split, (x, y) in made.items():
        write("npy", tmp_path, split, x, y)
    assert main(["linear", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "linear.json").read_text())
    assert content["probe"] == "streamed" and "Adam" in content["protocol"]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "train-labels.npy").unlink(), "train-labels.npy: no such file"),
        (lambda f: np.save(f / "train-labels.npy", np.arange(3)), "900 features need as many integer labels"),
        (lambda f: np.save(f / "train.npy", np.zeros((900, 15), np.float32)), "16 dimensions, those of"),
        (lambda f: np.save(f / "train.npy", np.zeros(900)), "features must be floats [N, D], not"),
        (lambda f: np.save(f / "train.npy", np.full((900, 16), np.nan)), "row 0 has a value that isn't"),
        (lambda f: np.save(f / "train.npy", np.full((900, 16), 1e39)), "row 0 has a value beyond the range"),
        (lambda f: np.save(f / "train-labels.npy", np.full(900, -1)), "label -1 of row 0"),
        (lambda f: np.save(f / "test-labels.npy", np.full(300, 77)), "label 77 doesn't occur in"),
        (lambda f: (f / "train.npy").write_bytes(b"no array"), "train.npy: can't be read as embeddings"),
        (lambda f: (f / "train.npy").write_bytes(b""), "train.npy: can't be read as embeddings"),
        (lambda f: np.save(f / "train-labels.npy", np.full(900, 2**63, np.uint64)), "of row 0: labels start"),
        (lambda f: np.save(f / "train.npy", np.array([None]), allow_pickle=True), "can't be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_embeddings_is_said_in_a_line(spoil, said, made, tmp_path, capsys):
    for split, (x, y) in made.items():
        write("npy", tmp_path, split, x, y)
    spoil(tmp_path)
    assert main(["knn", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_columns_and_probes_that_are_missing_are_named(made, tmp_path, capsys):
    x, y = made["train"]
    save_file({"x": torch.from_numpy(x)}, tmp_path / "train.safetensors")
    pq.write_table(pa.table({"embedding": [[1.0], [2.0, 3.0]], "label": [0, 1]}), tmp_path / "train.parquet")
    for file, said in (("train.safetensors", "features or embedding"), ("train.parquet", "of equal length")):
        assert main(["knn", str(tmp_path / file), "--test", str(tmp_path / file)]) == 2
        assert said in capsys.readouterr().err
    write("npy", tmp_path, "test", x, y)
    test = str(tmp_path / "test.npy")
    assert main(["linear", test, "--test", test, "--probe", "logistic", "--epochs", "7"]) == 2
    assert "--epochs has no effect on the probe logistic" in capsys.readouterr().err
    assert main(["linear", test, "--test", test, "--probe", "sgd"]) == 2
    assert "use --probe logistic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "x, y, said",
    [
        ([0.5, 1.0], [0, 1], "column embedding must hold lists of numbers, not double"),
        (["a", "b"], [0, 1], "column embedding must hold lists of numbers, not string"),
        ([["a"], ["b"]], [0, 1], "column embedding must hold lists of numbers, not list"),
        ([[0.5], [1.0]], ["cat", "dog"], "column label must hold integers, not string"),
        ([], [], "contains no embeddings"),
    ],
)
def test_columns_of_other_types_are_named(x, y, said, tmp_path):
    x = pa.array(x) if x else pa.array([], pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": x, "label": y or pa.array([], pa.int64())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=said) as error:
        open_embeddings(tmp_path / "a.parquet")
    assert str(error.value).count("a.parquet") == 1


def test_an_empty_row_group_has_no_width(tmp_path):
    table = pa.table({"embedding": [[0.5, 1.0], [2.0, 3.0]], "label": [0, 1]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for some in (table.slice(0, 0), table):
            writer.write_table(some)
    assert open_embeddings(tmp_path / "a.parquet").features.tolist() == [[0.5, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize("labels", [(100,), (80,), (90, 1), ()])
def test_a_safetensors_with_more_or_fewer_labels_is_refused(labels, tmp_path):
    x = torch.zeros(90, 4)
    save_file({"features": x, "labels": torch.zeros(labels, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"are needed, not \[90, 4\] and"):
        open_embeddings(tmp_path / "a.safetensors")


def test_a_parquet_whose_row_groups_differ_in_width_is_refused(tmp_path, monkeypatch, capsys):
    """Each part of the store is of one row group, so that no part sees two widths."""
    monkeypatch.setattr(features, "PART", 50)
    tables = [pa.table({"embedding": [[0.5] * width] * 50, "label": [0, 1] * 25}) for width in (4, 5)]
    with pq.ParquetWriter(tmp_path / "train.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    pq.write_table(tables[0], tmp_path / "test.parquet")
    assert main(["knn", str(tmp_path)]) == 2
    assert "train.parquet: column embedding must hold lists of equal length" in capsys.readouterr().err
