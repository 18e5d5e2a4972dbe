"""`evaluate` and `knn` of sets above LARGE_SET: nothing exact that wouldn't fit, and the result says so."""

import json
import shutil
from pathlib import Path

import pytest

from lvssl.commands.main import main
from lvssl.evaluation import embedding, evaluate, knn, linear, streamed
from lvssl.evaluation.measures import equal_bit_codes
from lvssl.runs import features
from lvssl.runs.rows import by_point


@pytest.fixture
def runs(run, control, tmp_path) -> dict[str, Path]:
    return {
        name: Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in (("run", run), ("control", control))
    }


@pytest.fixture
def large(monkeypatch):
    """The training images of the digits count as many."""
    for module in (embedding, evaluate, knn, linear):
        monkeypatch.setattr(module, "LARGE_SET", 1000)
    monkeypatch.setattr(features, "PART", 512)
    monkeypatch.setattr(streamed, "PAGE", 1)


def table(folder: Path) -> dict[tuple[str, str, str], tuple[float, float]]:
    points = by_point(json.loads((folder / "evaluation.json").read_text())["rows"])
    points = [p for p in points if "linear" in p]
    return {(p["run"], p["representation"], p["method"]): (p["linear"], p.get("knn")) for p in points}


def test_a_large_set_is_evaluated_by_the_streamed_probe(runs, large, monkeypatch):
    def exact(*_, **__):
        raise AssertionError("an exact probe of a large set")

    monkeypatch.setattr(evaluate, "linear_probe", exact)
    monkeypatch.setattr(evaluate, "streamed_probe", small_batches)
    monkeypatch.setattr(evaluate, "SAMPLE", 900)
    assert main(["evaluate", str(runs["run"]), "--workers", "1"]) == 0
    content = json.loads((runs["run"] / "evaluation.json").read_text())
    assert content["protocol"] == {
        "linear": streamed.protocol(),
        "knn": {"k": 200, "temperature": 0.1},
        "codes of the control": "fitted on 900 of 1,297 training images, evenly spread",
    }
    assert "Adam" in streamed.protocol() and "bit_means" not in kept(runs["run"])[1297]
    assert sorted(kept(runs["run"])) == sorted(kept(runs["control"])) == [500, 1297], "floors are left over"
    found = table(runs["run"])
    assert {method for _, _, method in found} == {
        "",
        "code",
        *(method for method, _ in equal_bit_codes({64})),
    }
    monkeypatch.undo()
    assert main(["evaluate", str(runs["run"]), "--workers", "1", "--overwrite"]) == 0
    exactly = table(runs["run"])
    assert found.keys() == exactly.keys()
    for row, (probe, _) in exactly.items():
        assert found[row][0] == pytest.approx(probe, abs=6.0), row


def test_the_epochs_of_a_large_sets_probe_can_be_given(runs, large, monkeypatch, capsys):
    asked = []

    def short(*arguments, epochs=0, **options):
        asked.append(epochs)
        return streamed.streamed_probe(*arguments, epochs=1, **options)

    monkeypatch.setattr(evaluate, "streamed_probe", short)
    assert main(["evaluate", str(runs["run"]), "--workers", "1", "--probe-epochs", "2"]) == 0
    content = json.loads((runs["run"] / "evaluation.json").read_text())
    assert set(asked) == {2} and "Adam, 2 epochs in batches" in content["protocol"]["linear"]
    command = ["linear", str(runs["run"]), "--probe", "streamed", "--probe-epochs"]
    assert main([*command, "3"]) == 0
    content = json.loads((runs["run"] / "linear.json").read_text())
    assert "Adam, 3 epochs in batches" in content["protocol"]
    assert main([*command, "-1", "--overwrite"]) == 2 and "--probe-epochs" in capsys.readouterr().err


def small_batches(*arguments, **options):
    return streamed.streamed_probe(*arguments, **{**options, "epochs": 20}, batch=64)


def kept(run: Path) -> dict[int, list[str]]:
    """By count of images, the arrays of each store."""
    heads = [json.loads(path.read_text()) for path in (run / "features").glob("*/store.json")]
    return {head["images"]: list(head["arrays"]) for head in heads}


def test_knn_of_a_large_set_takes_200_neighbours(runs, large):
    assert main(["knn", str(runs["run"]), "--workers", "1"]) == 0
    content = json.loads((runs["run"] / "knn.json").read_text())
    assert (content["k"], content["temperature"]) == (200, 0.1)
