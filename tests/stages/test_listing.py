"""`lvssl runs`: how each run stands, the best of them, and two side by side."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lvssl.commands.main import main
from lvssl.runs import listing
from lvssl.runs.listing import LOWER_IS_BETTER, Listed, compared, ranked, runs_in
from lvssl.runs.run import run_lock


@pytest.fixture
def two(run, digits, tmp_path):
    """A run with an evaluation, and one of other settings that has ended early, in a folder."""
    shutil.copytree(run, tmp_path / "runs/first")
    shutil.copytree(run, tmp_path / "runs/deeper/second")
    assert main(["evaluate", str(tmp_path / "runs/first"), "--test", str(digits["test"])]) == 0
    log = tmp_path / "runs/deeper/second/metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    config = tmp_path / "runs/deeper/second/config.json"
    config.write_text(config.read_text().replace('"temperature": 0.2', '"temperature": 0.5'))
    return tmp_path / "runs"


def test_runs_are_listed_ranked_and_compared(two, capsys):
    assert main(["runs", str(two)]) == 0
    head, second, first = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "run", "state", "step", "loss", "rankme", "probe_features", "linear", "knn", "disk",
    ]  # fmt: skip
    assert first.split()[:3] == [str(two / "first"), "done", "60/60"]
    assert second.split()[:3] == [str(two / "deeper/second"), "stopped", "30/60"]
    listed = Listed.of(two / "first")
    assert f"{listed.figures['linear']:.4g}" in first and listed.figures["linear"] > 50
    with run_lock(two / "first"):
        assert [one.state for one in runs_in(two)] == ["stopped", "training"]
    assert main(["runs", str(two), "--best", "loss"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        str(one.folder) for one in sorted(runs_in(two), key=lambda one: one.figures["loss"])
    ]
    assert main(["runs", str(two), "--best", "linear"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # the other hasn't been evaluated
    assert main(["runs", str(two), "--best", "rankme"]) == 0  # the other has it of its last whole epoch
    ranks = [one.figures["rankme"] for one in runs_in(two)]
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        f"{rank:.4g}" for rank in sorted(ranks, reverse=True)
    ]
    assert main(["runs", "--compare", str(two / "first"), str(two / "deeper/second")]) == 0
    said = capsys.readouterr().out
    assert ["temperature", "0.2", "0.5"] in [line.split() for line in said.splitlines()]
    assert "loss, 100 %" in said and "(step 60)" in said and "(step 30)" in said


def test_settings_that_were_left_out_are_compared_by_their_values(run, tmp_path):
    for name, chosen in {"a": {"objective": "ntxent"}, "b": {"objective": "ntxent-vc", "beta": 0.0}}.items():
        (tmp_path / name).mkdir()
        config = json.loads((run / "config.json").read_text())
        config["settings"]["latent"] |= chosen
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    differ, _ = compared(tmp_path / "a", tmp_path / "b")
    assert differ == [
        ("latent.objective", "ntxent", "ntxent-vc"),
        ("latent.variance", "0.0", "5.0"),
        ("latent.covariance", "0.0", "1.0"),
    ]


def test_a_figure_that_is_no_number_comes_last():
    values = {"a": float("nan"), "b": 2.0, "c": 1.0, "d": float("nan")}
    runs = [
        Listed(Path(name), "done", 1, 1, dict.fromkeys(("loss", "knn"), x), 0) for name, x in values.items()
    ]
    assert [str(one.folder) for one in ranked(runs, "loss")] == ["c", "b", "a", "d"]
    assert [str(one.folder) for one in ranked(runs, "knn")] == ["b", "c", "a", "d"]


def test_a_large_figure_is_a_whole_number(run, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("features"))
        row = {"step": 60, "loss": 0.12345, "images_per_second": 29_104.4, "rankme": 1e20}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for command in (["--best", "images_per_second"], ["--compare", str(tmp_path / "a"), str(tmp_path / "b")]):
        assert main(["runs", str(tmp_path), *command]) == 0
        said = capsys.readouterr().out
        assert " 29,104 " in said and "e+04" not in said
    assert " 0.1235 " in said and " 1e+20 " in said


@pytest.mark.parametrize("name", LOWER_IS_BETTER)
def test_of_losses_the_lowest_is_the_best(name):
    runs = [Listed(Path(str(x)), "done", 1, 1, {name: x}, 0) for x in (2.0, 1.0, 3.0)]
    assert [run.figures[name] for run in ranked(runs, name)] == [1.0, 2.0, 3.0]


def test_a_checkpoint_that_its_run_removes_meanwhile_is_left_out(run, monkeypatch):
    (run / "checkpoints/step-1.pt").write_bytes(bytes(1000))
    before, look = Listed.of(run).size, os.lstat

    def removed_first(path):
        if str(path).endswith("step-1.pt"):
            os.unlink(path)
        return look(path)

    monkeypatch.setattr(listing.os, "lstat", removed_first)
    assert Listed.of(run).size == before - 1000


def test_bad_input_is_one_line(two, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([tmp_path / "gone"], "gone: no such folder"),
        ([tmp_path / "empty"], "empty: contains no run"),
        ([two, "--best", "beauty"], "--best beauty: none of the runs has it; known: "),
        (["--compare", two / "first", tmp_path / "empty"], "empty"),
    ):
        assert main(["runs", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_damaged_run_is_left_out_and_named(run, tmp_path, capsys):
    folder = tmp_path / "runs"
    for name in ("whole", "damaged"):
        shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("features"))
    for text in ("[]", "{", '{"results": []}', '{"rows": {}}'):
        (folder / "damaged/evaluation.json").write_text(text)
        assert main(["runs", str(folder)]) == 0
        captured = capsys.readouterr()
        assert [line.split()[0] for line in captured.out.splitlines()[1:]] == [str(folder / "whole")]
        assert captured.err.startswith("note: ") and "damaged/evaluation.json: not a result" in captured.err
    for text in (
        '{"results": null, "rows": null}',
        '{"rows": [{"bits": 8}], "run": {"name": "a"}}',
        '{"run": "a"}',
    ):
        (folder / "damaged/evaluation.json").write_text(text)
        assert [one.folder.name for one in runs_in(folder)] == ["damaged", "whole"]
    (folder / "damaged/knn.json").write_text('{"results": {"features": {"top1": null}}}')
    assert "knn" not in Listed.of(folder / "damaged").figures
