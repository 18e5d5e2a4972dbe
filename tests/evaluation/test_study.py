import csv
import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lvssl.cli import main
from lvssl.evaluation.study import MEASURES, StudySettings, interval, pairs, shard, study
from lvssl.report.study import write_study
from pipelines.errors import InputError


@pytest.fixture
def settings(digits, tmp_path):
    return StudySettings(
        digits["train"], digits["test"], "digits", tmp_path / "study",
        arms=("none", "low:family=bernoulli,dim=16"), seeds=(0, 1), epochs=1, threads=1, images=60,
    )  # fmt: skip


def test_a_study_in_parts_is_the_study(settings, digits, capsys):
    """Its halves as an array job, then one call that collects, through the command line."""
    arguments = ["study", "--preset", "digits", "--train", digits["train"], "--test", digits["test"], "--out"]
    arguments += [settings.out, "--arms", *settings.arms, "--seeds", 0, 1, "--epochs", 1, "--images", 60]
    arguments = [*map(str, arguments), "--threads", "1"]
    for part in ("0/2", "1/2"):
        assert main([*arguments, "--shard", part]) == 0
        assert not (settings.out / "study.json").exists()
    rows = {path.parent.name: path.stat().st_mtime_ns for path in settings.out.glob("*/study.json")}
    assert set(rows) == {"none-s0", "none-s1", "low-s0", "low-s1"}
    capsys.readouterr()
    assert main(arguments) == 0
    assert rows == {path.parent.name: path.stat().st_mtime_ns for path in settings.out.glob("*/study.json")}
    printed = capsys.readouterr().out
    result = json.loads((settings.out / "study.json").read_text())
    assert [row["bits"] for row in result["rows"]] == [64, 16, 64, 16]
    assert all(np.isfinite(list(row["measures"].values())).all() for row in result["rows"])
    assert {(p["arm"], p["control"]) for p in result["pairs"]} == {("low", "none")}
    assert len(result["pairs"]) == len(MEASURES) and "**low** against none" in printed
    table = list(csv.DictReader((settings.out / "study.csv").open()))
    assert float(table[0]["code_knn"]) == result["rows"][0]["measures"]["code_knn"]
    figures = settings.out / "figures"
    assert {f.suffix for f in figures.iterdir()} == {".png", ".svg"}
    assert all(f.stat().st_size > 5000 for f in figures.iterdir())


def made_rows():
    generator = np.random.default_rng(0)
    return [
        {"arm": arm, "seed": seed, "family": arm, "bits": 64, "features": 64, "rate_bits": 0.0,
         "measures": {name: float(generator.normal() + 3 * (arm == "lv")) for name in MEASURES}}
        for seed in range(4)
        for arm in ("none", "sign", "lv")
    ]  # fmt: skip


def test_pairs_against_scipy():
    rows = made_rows()
    found = pairs(rows)
    assert {(p["arm"], p["control"]) for p in found} == {("sign", "none"), ("lv", "none"), ("lv", "sign")}
    for pair in found:
        a, b = (
            [row["measures"][pair["measure"]] for row in rows if row["arm"] == name]
            for name in (pair["arm"], pair["control"])
        )
        test = ttest_rel(a, b)
        assert pair["interval"] == pytest.approx(list(test.confidence_interval(0.95)))
        assert (pair["verdict"] == "level") == (test.pvalue >= 0.05)
        if pair["verdict"] != "level":
            assert (pair["verdict"] == "better") == ((pair["mean"] > 0) == MEASURES[pair["measure"]][1])


def test_one_seed_decides_nothing(tmp_path):
    assert interval([1.0], True) == {
        "mean": 1.0, "standard_error": None, "interval": None, "verdict": "one seed",
    }  # fmt: skip
    assert interval([1.0, 1.0, 1.0], False)["verdict"] == "worse"
    rows = [row for row in made_rows() if row["seed"] == 0]
    result = {"settings": {"preset": "p", "seeds": [0]}, "rows": rows, "pairs": pairs(rows)}
    write_study(tmp_path, result, MEASURES)
    assert "Not decided by one seed in features, linear probe" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("nonsense",)}, "unknown family 'nonsense'"),
        ({"arms": ("a:dimm=3",)}, "arm 'a:dimm=3': unknown setting 'dimm'"),
        ({"arms": ("a:dim=x",)}, "dim must be a int, got 'x'"),
        ({"arms": ("none", "none")}, "two arms of one name"),
        ({"seeds": (0, 0)}, "a seed twice"),
        ({"shard": "2/2"}, "--shard must be K/N"),
        ({"preset": "nonsense"}, "unknown preset"),
    ],
)
def test_mistakes_are_named_before_any_work(settings, changes, message):
    with pytest.raises(InputError, match=message):
        study(dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_shards():
    assert (shard(""), shard("0/1"), shard("2/5")) == ((0, 1), (0, 1), (2, 5))
