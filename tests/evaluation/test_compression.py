"""`lvssl compression`: every way to store an image at every length, on the same axes."""

import csv
import json

import numpy as np
import pytest

from lvssl.commands.main import main
from lvssl.evaluation import sets
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.knn import hamming_knn
from lvssl.evaluation.retrieval import similarity_map
from lvssl.runs.rows import COLUMNS, by_point
from lvssl.runs.run import load_run
from pipelines.decode import open_reader


def test_the_run_and_its_controls_on_one_axis(run, control, digits, capsys):
    pytest.importorskip("faiss", reason="the extra `faiss` isn't installed")
    arguments = ["compression", str(run), "--bits", "16", "256", "--top-n", "100"]
    assert main(arguments) == 0  # test.beton beside train.beton, the control beside the run
    printed = capsys.readouterr().out
    result = json.loads((run / "compression.json").read_text())
    rows = {(row["run"], row["method"], row["bits"]): row for row in by_point(result["rows"])}
    assert set(rows) == {
        ("untrained", "", 2048), ("untrained", "code", 64), ("untrained", "code, first bits", 16),
        ("control", "", 2048), ("control", "sign, first bits", 16),
        ("control", "PCA + sign", 16), ("control", "ITQ", 16),
        *(("control", method, bits) for method in ("LSH", "int8", "PQ", "OPQ") for bits in (16, 256)),
    }  # fmt: skip
    assert result["left_out"] == [
        f"{method} of 256 bits: 64 features give codes of 1 to 64 bits"
        for method in ("sign", "PCA + sign", "ITQ")
    ]
    for row in rows.values():
        assert 30 < row["linear"] <= 100 and 30 < row["knn"] <= 100
        assert 0.02 < row["map_over_relevant"] <= row["map_over_hits"] < 1
        assert row["fp32_feature"] == 2048 / row["bits"]
        assert row["raw_pixels"] == 8 * 8 * 8 / row["bits"]
        assert f"{row['linear']:.1f}" in printed
    with open(run / "compression.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == [row["value"] for row in result["rows"]]
    assert list(table[0]) == list(COLUMNS) and result["families"] == {
        "untrained": "bernoulli",
        "control": "none",
    }
    assert result["top_n"] == 100 and f"--control {control}" in result["command"]

    train, test = (open_reader(digits[split]) for split in ("train", "test"))
    own, other = load_run(run), load_run(control)
    both = [embed(own.network, source, own.settings.view) for source in (train, test)]
    knn = hamming_knn(both[0].codes, train.labels, both[1].codes, test.labels, 64)
    assert rows["untrained", "code", 64]["knn"] == pytest.approx(knn, abs=0.5)
    both = [embed(other.network, source, other.settings.view).features for source in (train, test)]
    score = similarity_map(both[1], test.labels, both[0], train.labels, 100)
    assert np.isclose(rows["control", "", 2048]["map_over_hits"], score.over_hits, atol=1e-3)


def test_lengths_that_one_control_lacks_for_one_reason_are_one_line(run, control, tmp_path, capsys):
    lengths = ["100", "200", "300"]
    assert (
        main(["compression", str(run), "--bits", *lengths, "--max-images", "50", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr()
    assert "up to 24 codes of 50 training and 10 test images, each measured by" in printed.err
    left_out = [line for line in printed.out.splitlines() if line.startswith("left out: ")]
    assert "left out: ITQ of 100, 200, 300 bits: 64 features give codes of 1 to 64 bits" in left_out
    result = json.loads((tmp_path / "compression.json").read_text())
    assert [line.removeprefix("left out: ") for line in left_out] == result["left_out"]


def test_of_a_large_set_a_stated_sample_is_measured(run, control, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sets, "LARGE_SET", 1000)
    monkeypatch.setattr(sets, "SAMPLE", 400)
    for more, database in (([], 400), (["--max-images", "250"], 250)):
        out = tmp_path / str(database)
        assert main(["compression", str(run), "--bits", "8", "--out", str(out), *more]) == 0
        result = json.loads((out / "compression.json").read_text())
        assert (result["database"], result["queries"]) == (database, database // 5)
        assert result["of"] == {"train": 1297, "test": 500} and not any(result["skipped"].values())
        assert f"of {database} of 1,297 training images and {database // 5}" in capsys.readouterr().out


def test_mistakes_are_told_before_any_work(run, control, digits, tmp_path, capsys):
    for arguments, message in [
        ([run, "--control", run], "--control"),
        ([run, "--bits", "0"], "--bits"),
        ([run, "--top-n", "0"], "--top-n"),
        ([run, "--seed", "-3"], "--seed must be at least 0"),
        ([tmp_path / "none"], "no such run"),
        ([run, "--test", tmp_path / "no.beton"], "no.beton"),
    ]:
        assert main(["compression", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
