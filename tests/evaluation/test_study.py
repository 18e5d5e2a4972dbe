import csv
import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lvssl.cli import main
from lvssl.evaluation.measures import HASHES, MEASURES, OF_CODE, code_bits
from lvssl.evaluation.pairs import interval, pairs, strongest, summary
from lvssl.evaluation.study import StudySettings, plan, shard, study
from lvssl.report.study import write_study
from lvssl.runs.run import create_run
from pipelines.errors import InputError


@pytest.fixture
def settings(digits, tmp_path):
    return StudySettings(
        digits["train"], digits["test"], "digits", tmp_path / "study",
        arms=("none", "low:family=bernoulli,dim=16"), seeds=(0, 1), epochs=1, threads=1, max_images=60,
    )  # fmt: skip


def test_a_study_in_parts_is_the_study(settings, digits, capsys):
    """Its halves as an array job, then one call that collects, through the command line."""
    arguments = ["study", "--preset", "digits", "--train", digits["train"], "--test", digits["test"], "--out"]
    arguments += [settings.out, "--arms", *settings.arms, "--seeds", 0, 1, "--epochs", 1, "--max-images", 60]
    arguments = [*map(str, arguments), "--threads", "1"]
    for part in ("1/2", "2/2"):
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
    for row in result["rows"]:
        assert set(row["measures"]) == set(MEASURES)
        assert all(np.isfinite(list(methods.values())).all() for methods in row["measures"].values())
    controls = result["rows"][0]["controls"]
    assert set(controls) == {"16", "64"} and all(set(made) == set(OF_CODE) for made in controls.values())
    assert controls["64"]["code_map"] == result["rows"][0]["measures"]["code_map"]
    assert {(p["arm"], p["control"]) for p in result["pairs"]} == {("low", "none")}
    assert len(result["pairs"]) == len(MEASURES) and "**low** against none" in printed
    table = list(csv.DictReader((settings.out / "study.csv").open()))
    found = [
        (r["bits"], r["method"])
        for r in table
        if r["measure"] == "code_knn" and (r["arm"], r["seed"]) == ("none", "0")
    ]
    assert sorted(found) == sorted((bits, method) for bits in ("16", "64") for method in HASHES)
    figures = settings.out / "figures"
    assert {f.suffix for f in figures.iterdir()} == {".png", ".svg"}
    assert all(f.stat().st_size > 5000 for f in figures.iterdir())
    row = settings.out / "low-s1" / "study.json"
    for damaged, said in (("{", "Expecting"), ("[]", "an object"), ('{"lengths": 3}', "lengths: a list")):
        row.write_text(damaged)
        assert main(arguments) == 2
        assert f"{row}: not a result ({said}" in capsys.readouterr().err


def made_rows():
    generator = np.random.default_rng(0)

    def row(arm, seed):
        value = {name: float(generator.normal() + 3 * (arm == "lv")) for name in MEASURES}
        return {
            "arm": arm, "seed": seed, "family": arm, "bits": 64, "features": 64, "controls": {}, "queries": 9,
            "database": 9, "measures": {name: {"": value[name]} for name in MEASURES},
        }  # fmt: skip

    return [row(arm, seed) for seed in range(4) for arm in ("none", "sign", "lv")]


def test_pairs_against_scipy():
    rows = made_rows()
    found = pairs(rows)
    assert {(p["arm"], p["control"]) for p in found} == {("sign", "none"), ("lv", "none"), ("lv", "sign")}
    for pair in found:
        a, b = (
            [row["measures"][pair["measure"]][""] for row in rows if row["arm"] == name]
            for name in (pair["arm"], pair["control"])
        )
        test = ttest_rel(a, b)
        assert pair["interval"] == pytest.approx(list(test.confidence_interval(0.95)))
        assert (pair["verdict"] == "level") == (test.pvalue >= 0.05)
        if pair["verdict"] != "level":
            assert (pair["verdict"] == "better") == ((pair["mean"] > 0) == MEASURES[pair["measure"]][1])


def test_the_strongest_method_is_that_of_the_best_mean():
    methods = [{"a": 3.0, "b": 2.0, "c": 9.0}, {"a": 0.0, "b": 2.5}]  # c is not there for every seed
    assert strongest(methods, True) == ("b", [2.0, 2.5]) and strongest(methods, False) == ("a", [3.0, 0.0])
    assert strongest([{"a": float("nan"), "b": -1.0}], False).method == "b"


def test_a_code_is_compared_with_the_strongest_control_of_its_length():
    rows = [row for row in made_rows() if row["seed"] < 2 and row["arm"] != "sign"]
    for row in rows:
        if row["arm"] == "lv":
            row["bits"] = 16
            row["measures"]["code_knn"] = {"code": 50.0 + row["seed"]}
        else:
            row["controls"] = {
                "16": {"code_knn": {"ITQ": 48.0 + row["seed"], "LSH": 40.0 + 12 * row["seed"]}}
            }
            row["measures"]["code_knn"] = {"ITQ": 90.0}  # of 64 bits
    pair = next(p for p in pairs(rows) if p["measure"] == "code_knn")
    assert (pair["of"], pair["against"], pair["each"]) == ("code", "ITQ", [2.0, 2.0])
    assert not [p for p in pairs(rows) if p["measure"] == "code_map"]  # no control of 16 bits has it
    assert summary(rows)[0]["measures"]["code_knn"] == {"method": "ITQ", "values": [90.0, 90.0]}


def test_one_seed_decides_nothing(tmp_path):
    assert interval([1.0], True) == {
        "mean": 1.0, "standard_error": None, "interval": None, "verdict": "one seed",
    }  # fmt: skip
    assert interval([1.0, 1.0, 1.0], False)["verdict"] == "worse"
    rows = [row for row in made_rows() if row["seed"] == 0]
    result = {"settings": {"preset": "p", "seeds": [0], "max_images": 0}, "command": "lvssl study"}
    result |= {"rows": rows, "pairs": pairs(rows), "arms": summary(rows)}
    write_study(tmp_path, result, MEASURES)
    assert "Not decided by one seed." in (tmp_path / "study.md").read_text()


def test_arms_of_an_objective_and_runs_of_others(settings):
    """MCInfoNCE is an arm, and folders are those that `benchmarks.latents` makes."""
    from benchmarks.latents import Job, parsed, settings_of

    chosen = plan(
        dataclasses.replace(settings, epochs=0), "mcinfonce:family=gaussian,objective=mcinfonce,dim=8", 1
    )
    chosen.validate()
    assert chosen.latent.objective == "mcinfonce" and code_bits(chosen) == 8
    elsewhere = dataclasses.replace(settings, runs=settings.out, prefix="digits", epochs=0)
    options = parsed(["--out", str(settings.out), "--threads", "1", "--workers", "0"])
    for arm, job in (
        ("none", Job("digits", "none", None, 1)),
        ("bernoulli16:family=bernoulli,dim=16", Job("digits", "bernoulli", 16, 1)),
        ("bernoulli64:family=bernoulli", Job("digits", "bernoulli", 64, 1)),  # a bit for each feature
    ):
        folder = settings.out / job.name
        assert plan(elsewhere, arm, 1) == settings_of(options, job, settings.train, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("nonsense",)}, "unknown family 'nonsense'"),
        ({"arms": ("a:dimm=3",)}, "arm 'a:dimm=3': unknown setting 'dimm'"),
        ({"arms": ("a:dim=x",)}, "dim must be a int, got 'x'"),
        ({"arms": ("none", "none")}, "two arms of one name"),
        ({"seeds": (0, 0)}, "a seed twice"),
        ({"shard": "0/2"}, "--shard must be K/N"),
        ({"preset": "nonsense"}, "unknown preset"),
        ({"ood": ("nothing.beton",)}, "nothing.beton"),
    ],
)
def test_mistakes_are_named_before_any_work(settings, changes, message):
    with pytest.raises(InputError, match=message):
        study(dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_shards():
    """K from 1 to N, as `convert-beton` counts; what counted from 0 is refused, and leaves out no part."""
    assert (shard(""), shard("1/1"), shard("2/5"), shard("5/5")) == ((0, 1), (0, 1), (1, 5), (4, 5))
    for wrong in ("0/5", "6/5", "0/0", "1", "1/", "/1", "a/b", "-1/2", "\N{SUPERSCRIPT TWO}/3"):
        with pytest.raises(InputError, match="--shard must be K/N with 1 <= K <= N"):
            shard(wrong)


def test_a_run_without_bits_is_the_control_of_any_decorrelation(settings):
    for family, refused in (("none", False), ("sign", True)):
        made = dataclasses.replace(plan(settings, family, 0), out=settings.out / family)
        create_run(made, 10, resume=False)
        other = dataclasses.replace(made, latent=dataclasses.replace(made.latent, decorrelation=0.5))
        with pytest.raises(InputError, match="decorrelation") if refused else nullcontext():
            create_run(other, 10, resume=True)
