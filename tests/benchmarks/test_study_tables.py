"""The study's tables for docs/, and the rows that they are made of."""

import argparse
import csv
import json
import statistics
from pathlib import Path

import pytest

from benchmarks import study
from lvssl.runs.rows import COLUMNS
from pipelines.convert.conversion import Settings, convert
from pipelines.decode import open_reader
from pipelines.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_that_stand_in_the_documents_are_those_of_the_kept_rows(capsys):
    study.main(["--print", "--docs", str(ROOT / "docs")])
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table.count("\n") for table in tables] == [13, 5, 15, 11]
    results = (ROOT / "docs/results.md").read_text()
    assert all(table in results for table in tables)


@pytest.mark.parametrize(
    "name",
    ["study-cifar10", "study-fashion-mnist", "base-cifar10", "base-fashion-mnist", "objectives-cifar10"],
)
def test_the_pages_in_docs_are_made_of_the_kept_rows(name):
    result = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    assert study.page(name, result) == (ROOT / "docs" / f"{name}.md").read_text()
    table = list(csv.DictReader((ROOT / "docs" / f"{name}.csv").open()))
    assert list(table[0]) == list(COLUMNS)
    assert [float(row["value"]) for row in table] == [row["value"] for row in result["rows"]]


def test_a_cell_is_the_mean_of_its_rows():
    """A difference of the first table of docs/results.md, in plain lines from the rows."""
    result = json.loads((ROOT / "docs" / "codes-cifar10.json").read_text())

    def of(run: str, method: str) -> list[float]:
        wanted = {"run": run, "method": method, "bits": 64, "metric": "knn", "representation": "code"}
        return [r["value"] for r in result["rows"] if wanted.items() <= r.items()]

    methods = ("sign", "PCA + sign", "ITQ", "LSH", "OPQ")
    controls = {(run, method): of(run, method) for run in ("none-vc", "sign-vc") for method in methods}
    best = max(controls, key=lambda key: statistics.mean(controls[key]))
    each = [a - b for a, b in zip(of("bernoulli64-vc", "code"), controls[best], strict=True)]
    error = statistics.stdev(each) / 3**0.5
    line = f"| {statistics.mean(each):+.2f} ± {error:.2f} | {', '.join(f'{v:+.2f}' for v in each)} |"
    assert best == ("none-vc", "OPQ")
    assert f"| code of 64 bits, Hamming kNN | CIFAR-10 (JPEG) {line} OPQ of `none-vc` |" in study.codes_table(
        ROOT / "docs"
    )


@pytest.mark.parametrize(
    ("says", "method", "metric"),
    [
        ("foreign images, AUROC of the density", "density", "ood"),
        ("rank correlation of the density with severity", "density", "corruption"),
        ("share of crops that the density ranks less certain than the whole", "density", "crop"),
        ("wrong neighbours among the test images, AUROC of the distance", "distance", "r_auroc"),
    ],
)
def test_the_page_on_uncertainty_has_the_means_of_the_better_base(says, method, metric):
    cells = []
    for arm in ("none", "none-vc", "bernoulli256", "bernoulli256-vc"):
        means = []
        for data in ("fashion-mnist", "cifar10"):
            rows = json.loads((ROOT / "docs" / f"base-{data}.json").read_text())["rows"]
            wanted = {"run": arm, "method": method, "metric": metric, "representation": "uncertainty"}
            values = [row["value"] for row in rows if wanted.items() <= row.items()]
            assert len(values) == 3
            means.append(f"{statistics.mean(values):.3f}")
        cells.append(", ".join(means))
    assert f"| {says} | {' | '.join(cells)} |" in (ROOT / "docs/uncertainty.md").read_text()


def test_a_base_is_compared_seed_by_seed():
    result = json.loads((ROOT / "docs" / "base-cifar10.json").read_text())

    def of(run: str) -> list[float]:
        wanted = {"run": run, "representation": "features", "metric": "knn"}
        return [r["value"] for r in result["rows"] if wanted.items() <= r.items()]

    each = [a - b for a, b in zip(of("none-vc"), of("none"), strict=True)]
    (line,) = [text for text in study.base_table(ROOT / "docs") if "features, kNN | CIFAR-10 (JPEG)" in text]
    assert len(each) == 3 and line.split(" | ")[3] == f"{statistics.mean(of('none-vc')):.1f}"
    assert f"| {statistics.mean(each):+.2f} ± {statistics.stdev(each) / 3**0.5:.2f} |" in line


def test_a_table_names_the_source_of_its_images(tmp_path):
    result = json.loads((ROOT / "docs" / "base-cifar10.json").read_text())
    for source, title in (
        ("cifar10-jpeg", "CIFAR-10 (JPEG)"),
        ("torchvision:CIFAR10", "CIFAR-10 (torchvision:CIFAR10)"),
    ):
        (tmp_path / "base-cifar10.json").write_text(json.dumps(result | {"source": source}))
        assert list(study.kept(tmp_path, "base")) == [title]


@pytest.mark.slow
def test_images_of_another_source_are_not_taken_for_those_asked_for(tmp_path):
    (tmp_path / "data").mkdir()
    made = tmp_path / "data" / "cifar10-jpeg-train10.beton"
    convert("sklearn:digits", made, Settings(subset=10))
    options = argparse.Namespace(out=tmp_path, images=10, cifar10="sklearn:digits")
    assert study.converted(options, "cifar10-jpeg", "train") == made
    options.cifar10 = "torchvision:CIFAR10"
    with pytest.raises(InputError, match="was converted from sklearn:digits"):
        study.converted(options, "cifar10-jpeg", "train")


def test_the_whole_study_on_digits(tmp_path):
    """The questions share their runs, and what one of them has trained isn't trained again."""
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    common = ["--data", "digits", "--seeds", "0", "--epochs", "1", "--threads", "1", "--out", str(runs)]
    common += ["--measured", "60", "--docs", str(docs)]
    arms = ["none", "sign", "bernoulli16:family=bernoulli,dim=16"]
    study.main([*common, "--question", "codes", "--arms", *arms])
    trained = {path: path.read_bytes() for path in runs.glob("*/metrics.jsonl")}
    codes = json.loads((docs / "codes-digits.json").read_text())
    assert len(trained) == 3 and any(p["control"] == study.BEST for p in codes["pairs"])
    study.main(common)
    assert all(path.read_bytes() == content for path, content in trained.items())
    result = json.loads((docs / "study-digits.json").read_text())
    assert result["source"] == "sklearn:digits"
    arms = [arm["arm"] for arm in result["arms"]]
    assert arms == ["none", "sign", "bernoulli256", "gaussian", "mcinfonce"]
    pairs = {(p["arm"], p["control"]) for p in result["pairs"]}
    assert ("bernoulli256", "mcinfonce") in pairs and ("sign", "mcinfonce") not in pairs
    text = (docs / "study-digits.md").read_text()
    assert "mAP@1000" in text and "study-digits.png" in text and "python -m benchmarks.study --data" in text
    assert (docs / "study-digits.png").stat().st_size > 5000
    assert {row["run"] for row in csv.DictReader((docs / "study-digits.csv").open())} == set(arms)


@pytest.mark.slow
def test_two_classes_that_no_training_has_seen_are_foreign_images(tmp_path, capsys):
    """Run by run, then collected: these classes are in no training or test set, and have their line."""
    typed = ["--data", "digits", "--leave-out", "8", "9", "--seeds", "0", "--epochs", "1", "--threads", "1"]
    typed += ["--measured", "60", "--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    arms = ["none", "bernoulli16:family=bernoulli,dim=16"]
    for arm in arms:
        study.main([*typed, "--arms", arm, "--shard", "1/1"])
    assert not (tmp_path / "docs").exists()
    data = {path.stem: open_reader(path) for path in (tmp_path / "runs/data").glob("*.beton")}
    seen = {name: set(source.labels.tolist()) for name, source in data.items()}
    assert seen == {
        "digits-test": set(range(10)),
        "digits-without-8-9-train10000": set(range(8)),
        "digits-without-8-9-test": set(range(8)),
        "digits-classes-8-9-test": {8, 9},
    }
    assert len(data["digits-without-8-9-test"]) + len(data["digits-classes-8-9-test"]) == 500
    trained = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    study.main([*typed, "--arms", *arms])
    assert len(trained) == 2 and all(path.read_bytes() == content for path, content in trained.items())
    result = json.loads((tmp_path / "docs/study-digits-without-8-9.json").read_text())
    assert {run["database"] for run in result["runs"]} == {len(data["digits-without-8-9-train10000"])}
    of_arm = {
        row["metric"]: row["value"]
        for row in result["rows"]
        if (row["run"], row["representation"], row["method"]) == ("none", "uncertainty", "density")
    }
    sets = {metric: value for metric, value in of_arm.items() if metric.startswith("ood ")}
    assert set(sets) == {f"ood {name}" for name in ("noise", "textures", "digits", "digits-classes-8-9-test")}
    assert of_arm["ood"] == pytest.approx(statistics.mean(sets.values()))
    page = (tmp_path / "docs/study-digits-without-8-9.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| digits-classes-8-9-test | none |"))
    assert f" {sets['ood digits-classes-8-9-test']:.3f} " in line and "| mean of all | bernoulli16 |" in page
    with pytest.raises(InputError, match=r"--leave-out 10: .*digits-test.beton has the classes 0 to 9"):
        study.main(["--data", "digits", "--leave-out", "10", "--out", str(tmp_path / "runs")])
