import csv
import dataclasses
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.study import ARMS, SETTINGS
from lvssl.commands.main import main
from lvssl.evaluation.measures import HASHES, MEASURES, code_bits, equal_bit_codes, of_one_score
from lvssl.evaluation.pairs import BEST, pairs, summary
from lvssl.evaluation.study import plan, shard, study
from lvssl.report.study import markdown, write_study
from lvssl.runs.differences import interval, strongest
from lvssl.runs.rows import COLUMNS, as_csv, by_point, rows_of_points
from lvssl.runs.run import create_run
from lvssl.settings.measure import StudySettings
from pipelines.errors import InputError

KEY = ("run", "representation", "metric", "seed")


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
    assert [run["bits"] for run in result["runs"]] == [64, 16, 64, 16]
    assert all(np.isfinite(row["value"]) for row in result["rows"])
    assert [set(arm["measures"]) for arm in result["arms"]] == [set(MEASURES)] * 2
    assert {(p["arm"], p["control"]) for p in result["pairs"]} == {("low", "none")}
    assert len(result["pairs"]) == len(MEASURES) and "**low** against none" in printed
    table = list(csv.DictReader((settings.out / "study.csv").open()))
    assert list(table[0]) == list(COLUMNS) and len(table) == len(result["rows"])
    wanted = ("none", "code", "knn", "0")
    found = [(r["bits"], r["method"]) for r in table if tuple(r[n] for n in KEY) == wanted]
    assert sorted(found) == sorted((str(bits), method) for method, bits in equal_bit_codes((16, 64)))
    figures = settings.out / "figures"
    assert {f.suffix for f in figures.iterdir()} == {".png", ".svg"}
    assert all(f.stat().st_size > 5000 for f in figures.iterdir())
    kept = settings.out / "none-s0" / "study.json"  # as before OPQ was measured: it alone is measured now
    content = json.loads(kept.read_text())
    content["rows"] = [row for row in content["rows"] if row["method"] != "OPQ"]
    content["rows"][0]["value"] += 1
    before = {key: content[key] for key in content if key != "codes"} | {"lengths": [16, 64]}
    kept.write_text(json.dumps(before))
    assert main(arguments) == 0
    after = json.loads(kept.read_text())["rows"]
    assert after[: len(before["rows"])] == before["rows"]
    assert {(r["method"], r["bits"]) for r in after[len(before["rows"]) :]} == set(
        equal_bit_codes((16, 64))
    ) - {(method, bits) for method in HASHES for bits in (16, 64)}
    row = settings.out / "low-s1" / "study.json"
    whole = json.loads(row.read_text())
    for damaged, said in (("{", "Expecting"), ("[]", "an object"), ('{"codes": 3}', "codes: a list")):
        row.write_text(damaged)
        assert main(arguments) == 2
        assert f"{row}: not a result ({said}" in capsys.readouterr().err
    row.write_text(json.dumps({name: value for name, value in whole.items() if name != "bits"}))
    assert main(arguments) == 0 and json.loads(row.read_text()) == whole  # measured again


def made():
    """Runs of three arms over four seeds, and a value for each measure; of 64 bits."""
    generator, runs, rows = np.random.default_rng(0), [], []
    for seed in range(4):
        for arm in ("none", "sign", "lv"):
            runs.append({"arm": arm, "seed": seed, "family": arm, "bits": 64, "features": 64, "queries": 9})
            runs[-1] |= {"database": 9, "deterministic": arm != "lv"}
            measured = {(m.representation, m.metric) for m in MEASURES.values()}
            for representation, metric in sorted(measured):
                value = {metric: float(generator.normal() + 3 * (arm == "lv"))}
                rows += rows_of_points(arm, seed, [(representation, "", 64, value)])
    return runs, rows


def test_pairs_against_scipy():
    runs, rows = made()
    found = [pair for pair in pairs(runs, rows) if pair["control"] != BEST]
    assert {(p["arm"], p["control"]) for p in found} == {("sign", "none"), ("lv", "none"), ("lv", "sign")}
    for pair in found:
        measure = MEASURES[pair["measure"]]
        wanted = (measure.representation, measure.metric)
        a, b = (
            [r["value"] for r in rows if (r["run"], r["representation"], r["metric"]) == (name, *wanted)]
            for name in (pair["arm"], pair["control"])
        )
        test = ttest_rel(a, b)
        assert pair["interval"] == pytest.approx(list(test.confidence_interval(0.95)))
        assert (pair["verdict"] == "level") == (test.pvalue >= 0.05)
        if pair["verdict"] != "level":
            assert (pair["verdict"] == "better") == ((pair["mean"] > 0) == measure.higher)


def test_arms_are_compared_over_the_seeds_that_both_have():
    runs, rows = made()
    fewer = [run for run in runs if (run["arm"], run["seed"]) != ("none", 2)]
    found = [pair for pair in pairs(fewer, rows) if pair["control"] == "none"]
    assert found and {tuple(pair["seeds"]) for pair in found} == {(0, 1, 3)}
    of_all = [pair for pair in pairs(runs, rows) if (pair["arm"], pair["control"]) == ("lv", "none")]
    whole = {pair["measure"]: pair for pair in of_all}
    for pair in found:
        if pair["arm"] == "lv":
            each = whole[pair["measure"]]["each"]
            assert pair["each"] == [each[seed] for seed in (0, 1, 3)]


def test_the_strongest_method_is_that_of_the_best_mean():
    methods = [{"a": 3.0, "b": 2.0, "c": 9.0}, {"a": 0.0, "b": 2.5}]  # c is not there for every seed
    assert strongest(methods, True) == ("b", [2.0, 2.5]) and strongest(methods, False) == ("a", [3.0, 0.0])
    assert strongest([{"a": float("nan"), "b": -1.0}], False).method == "b"


def test_each_measure_has_a_metric_of_its_own_and_a_direction():
    own = {(m.representation, m.metric, m.own_score) for m in MEASURES.values()}
    assert len(own) == len(MEASURES)
    for name, measure in MEASURES.items():
        assert name.endswith(measure.metric.removesuffix("_over_hits").replace("map_over", "map")), name
    lower = {name for name, m in MEASURES.items() if not m.higher}
    assert lower == {"aurc", "latent_aurc", "nll", "brier", "ece"}
    score = {"r_auroc": 0.1, "aurc": 0.2, "recall_at_1": 0.9, "crops less certain": 0.3, "ood a": 0.4}
    score |= {"ood b": 0.6, "rank blur": 0.7, "rank crop": 0.9}
    wanted = {"r_auroc": 0.1, "aurc": 0.2, "crop": 0.3, "ood a": 0.4, "ood b": 0.6}
    assert of_one_score(score) == pytest.approx(wanted | {"ood": 0.5, "corruption": 0.8})


def codes(values):
    """Rows of a code's kNN: (arm, bits, method) -> values by seed."""
    return [
        row
        for (arm, bits, method), each in values.items()
        for seed, value in enumerate(each)
        for row in rows_of_points(arm, seed, [("code", method, bits, {"knn": value})])
    ]


def test_a_code_is_compared_with_the_strongest_control_of_its_length():
    runs = [run | {"bits": 16 if run["arm"] == "lv" else 64} for run in made()[0] if run["seed"] < 2]
    rows = codes(
        {
            ("lv", 16, "code"): (50.0, 51.0),
            ("none", 16, "ITQ"): (48.0, 49.0),
            ("none", 16, "LSH"): (40.0, 52.0),  # above ITQ on a seed, below in the mean
            ("none", 64, "ITQ"): (90.0, 90.0),
            ("sign", 16, "code"): (49.0, 49.5),
        },
    )
    found = {p["control"]: p for p in pairs(runs, rows) if p["arm"] == "lv"}
    assert [found["none"][name] for name in ("of", "against", "each")] == ["code", "ITQ", [2.0, 2.0]]
    assert found[BEST]["against"] == "sign, code" and found[BEST]["each"] == [1.0, 1.5]
    assert {p["measure"] for p in found.values()} == {"code_knn"}  # no control of 16 bits has another
    assert summary(runs, rows)[0]["measures"]["code_knn"] == {"method": "ITQ", "values": [90.0, 90.0]}


def test_a_difference_that_is_nan_for_a_seed_decides_nothing():
    runs, rows = made()
    measure = MEASURES["aurc"]
    for row in rows:  # as if this could not be measured for one seed
        if (row["representation"], row["metric"], row["seed"]) == (*measure[2:4], 1):
            row["value"] = math.nan
    found = {pair["measure"]: pair for pair in pairs(runs, rows) if pair["arm"] == "lv"}
    assert math.isnan(found["aurc"]["mean"]) and found["aurc"]["verdict"] == "level"
    assert found["features_knn"]["verdict"] == "better"
    result = {"settings": {"preset": "p", "seeds": [0, 1, 2, 3], "max_images": 0}, "command": "lvssl study"}
    result |= {"runs": runs, "rows": rows, "pairs": pairs(runs, rows), "arms": summary(runs, rows)}
    page = markdown(result | {"measures": {name: m._asdict() for name, m in MEASURES.items()}})
    assert f"| {measure.says} | lv | none | +nan | +nan to +nan | level |" in page
    for higher in (True, False):
        assert interval([math.nan], higher, sampling_error=1.0)["verdict"] == "level"


def test_one_seed_decides_nothing_unless_its_sampling_error_is_known(tmp_path):
    assert interval([1.0], True) == {
        "mean": 1.0, "standard_error": None, "interval": None, "verdict": "one seed",
    }  # fmt: skip
    assert interval([1.0, 1.0, 1.0], False)["verdict"] == "worse"
    assert interval([1.0], True, 0.6)["verdict"] == "level"
    assert interval([1.0], True, 0.4) == {
        "mean": 1.0, "standard_error": 0.4, "interval": [pytest.approx(0.2), 1.8], "verdict": "better",
    }  # fmt: skip
    runs, rows = ([each for each in some if each["seed"] == 0] for some in made())
    result = {"settings": {"preset": "p", "seeds": [0], "max_images": 0}, "command": "lvssl study"}
    result |= {"runs": runs, "rows": rows, "pairs": pairs(runs, rows), "arms": summary(runs, rows)}
    write_study(tmp_path, result | {"measures": {name: m._asdict() for name, m in MEASURES.items()}})
    page = (tmp_path / "study.md").read_text()
    assert "Not decided by one seed." in page and "PCA + sign,\nITQ and LSH of a control" in page
    result |= {"rows": [row | {"method": "OPQ"} for row in rows], "measures": {}, "arms": [], "pairs": []}
    assert "PCA + sign,\nITQ, LSH and OPQ (by" in markdown(result)


def test_rows_of_a_point_are_joined():
    point = {"run": "a", "representation": "code", "method": "ITQ", "bits": 16, "seed": 3}
    rows = rows_of_points("a", 3, [("code", "ITQ", 16, {"linear": 1.0, "knn": 2.0})])
    rows += rows_of_points("a", 4, [("code", "ITQ", 16, {"knn": 4.0})])
    assert by_point(rows) == [point | {"linear": 1.0, "knn": 2.0}, point | {"seed": 4, "knn": 4.0}]
    assert as_csv(rows).splitlines()[1] == "a,code,ITQ,16,linear,1.0,3"


def test_arms_of_an_objective_and_of_a_length(settings):
    chosen = plan(
        dataclasses.replace(settings, epochs=0), "mcinfonce:family=gaussian,objective=mcinfonce,dim=8", 1
    )
    chosen.validate()
    assert chosen.latent.objective == "mcinfonce" and code_bits(chosen) == 8
    shared = dataclasses.replace(settings, runs=settings.out, prefix="digits", epochs=0)
    short = plan(shared, "bernoulli16:family=bernoulli,dim=16", 1)
    assert short.out == settings.out / "digits-bernoulli16-s1" and code_bits(short) == 16
    assert code_bits(plan(shared, "bernoulli64:family=bernoulli", 1)) == 64  # a bit for each feature


def test_an_arm_may_have_another_projector(settings):
    chosen = plan(settings, "wide:family=none,objective=vicreg,projection=96,covariance=0.5", 0)
    assert (chosen.model.projection, chosen.model.backbone, chosen.latent.spread) == (96, "tiny", (25.0, 0.5))


@pytest.mark.parametrize("question", ARMS)
def test_the_arms_of_each_question_are_possible(settings, question):
    arms = [f"{arm}:{SETTINGS[arm]}" if arm in SETTINGS else arm for arm in ARMS[question]]
    chosen = [plan(settings, arm, 0) for arm in arms]
    for each in chosen:
        each.validate()
    assert len({each.out for each in chosen}) == len(chosen)


def test_a_run_of_before_a_setting_was_is_one_of_its_default(settings):
    chosen = plan(settings, "none", 0)
    create_run(chosen, 10, resume=False)
    config = chosen.out / "config.json"
    content = json.loads(config.read_text())
    for name in ("invariance", "variance", "covariance"):
        del content["settings"]["latent"][name]
    config.write_text(json.dumps(content))
    create_run(chosen, 10, resume=True)
    with pytest.raises(InputError, match=r"latent.variance: None -> 1.0"):
        create_run(plan(settings, "none:family=none,variance=1", 0), 10, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("nonsense",)}, "unknown family 'nonsense'"),
        ({"arms": ("a:dimm=3",)}, "arm 'a:dimm=3': unknown setting 'dimm'"),
        ({"arms": ("a:dim=x",)}, "dim must be a int, got 'x'"),
        ({"arms": ("a:family=none,projector_norm=ture",)}, "arm 'a:.*: projector_norm must be true or false"),
        ({"arms": ("a:family=vmf,site=proj,objective=ceb,variance=1",)}, "--variance must be 0 with .* ceb"),
        ({"arms": ("a:family=none,objective=vicreg,invariance=0",)}, "--invariance must be above 0"),
        ({"arms": ("none", "none")}, "two arms of one name"),
        ({"seeds": (0, 0)}, "a seed twice"),
        ({"seeds": ()}, "--arms, --seeds: at least one of each"),
        ({"arms": ()}, "--arms, --seeds: at least one of each"),
        ({"max_images": -5}, "--max-images must be at least 0, got -5"),
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
