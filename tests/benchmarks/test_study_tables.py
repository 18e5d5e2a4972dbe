"""The study's tables for docs/, from runs that the comparison of codes has trained."""

import csv
import json

import pytest

from benchmarks import latents, study


@pytest.mark.slow
def test_the_whole_study_on_digits(tmp_path):
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    common = ["--data", "digits", "--seeds", "0", "1", "--epochs", "1", "--threads", "1", "--out", str(runs)]
    latents.main([*common, "--arms", "none", "sign", "--bits", "64"])
    trained = {path: path.read_bytes() for path in runs.glob("*/metrics.jsonl")}
    assert len(trained) == 4
    study.main([*common, "--measured", "60", "--docs", str(docs)])
    assert all(path.read_bytes() == content for path, content in trained.items())  # not trained again
    result = json.loads((docs / "study-digits.json").read_text())
    arms = [arm["arm"] for arm in result["arms"]]
    assert arms == ["none", "sign", "bernoulli256", "gaussian", "mcinfonce"]
    pairs = {(p["arm"], p["control"]) for p in result["pairs"]}
    assert ("bernoulli256", "mcinfonce") in pairs and ("sign", "mcinfonce") not in pairs
    text = (docs / "study-digits.md").read_text()
    assert "mAP@1000" in text and "study-digits.png" in text and "python -m benchmarks.study --data" in text
    assert (docs / "study-digits.png").stat().st_size > 5000
    assert {row["arm"] for row in csv.DictReader((docs / "study-digits.csv").open())} == set(arms)
