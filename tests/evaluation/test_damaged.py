"""Sets with damaged images: a command that measures stops and names one, or leaves them out and says so."""

import json
import shutil
from pathlib import Path

import pytest
from damaged_folders import make_folders, sound

from lvssl.commands.main import main

QUICK = {
    "evaluate": ([], "evaluation.json"),
    "analyse": (["--max-images", "0", "--samples", "2"], "analysis.json"),
    "compression": (["--bits", "16", "--top-n", "20"], "compression.json"),
}


def counts(result: dict) -> tuple[dict, object]:
    """What a result says of the images that were left out, and its figures."""
    own = (result.get("run") or {}).get("name")  # the file's size differs, and what noise is read for factors
    rows = [
        {k: v for k, v in row.items() if k != "run"} | {"own": row["run"] == own}
        for row in result["rows"]
        if row["metric"] not in ("raw_pixels", "stored_jpeg")
    ]
    if "bits" in result:
        known = ("r_auroc", "accuracy", "nll", "brier", "ece")
        rows = [row for row in rows if row["own"] and row["metric"] in known]
        return result["images"]["skipped"], (rows, result["bits"])
    skipped = result["skipped"] if "skipped" in result else result["data"]["skipped"]
    return skipped, (rows, result.get("queries"), result.get("database"))


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory) -> dict[str, Path]:
    return make_folders(digits, tmp_path_factory.mktemp("folders"))


def pretrained_on(run: Path, data: Path, on_error: str, out: Path) -> Path:
    """A copy of a run, as if it had been trained on these images."""
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    config["settings"] |= {"data": str(data), "on_error": on_error}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name == "analyse" else name for name in QUICK]
)
def test_raise_or_skip_as_asked_or_as_in_the_pretraining(command, run, control, folders, tmp_path, capsys):
    options, name = QUICK[command]
    like = control if command == "compression" else run  # equal-bit controls are a deterministic run's
    runs = {
        "strict": pretrained_on(like, folders["train"], "raise", tmp_path / "strict"),
        "lax": pretrained_on(like, folders["train"], "skip", tmp_path / "lax"),
        "sound": pretrained_on(like, sound(folders["train"]), "raise", tmp_path / "sound"),
    }
    assert main([command, str(runs["strict"]), *options]) == 2
    said = capsys.readouterr().err
    assert "can't be decoded" in said and "Traceback" not in said and not (runs["strict"] / name).exists()
    assert main([command, str(runs["lax"]), *options, "--on-error", "raise"]) == 2
    capsys.readouterr()
    assert main([command, str(runs["strict"]), *options, "--on-error", "skip"]) == 0
    if command != "analyse":  # which reads a part of a set, and counts in that
        said = capsys.readouterr().err
        assert f"{folders['test']}: 2 of 60 images can't be decoded and are left out" in said
    assert main([command, str(runs["lax"]), *options]) == 0
    assert main([command, str(runs["sound"]), *options]) == 0
    found = {which: json.loads((path / name).read_text()) for which, path in runs.items()}
    skipped, figures = zip(*(counts(found[which]) for which in ("strict", "lax", "sound")))
    assert skipped[0] == skipped[1] == {"train": 3, "test": 2} and skipped[2] == {"train": 0, "test": 0}
    assert figures[0] == figures[1] == figures[2]
    assert "--on-error skip" in found["strict"]["command"]
    assert main([command, str(runs["lax"]), "--on-error", "ignore"]) == 2
    assert "unknown on_error 'ignore'; known: raise, skip" in capsys.readouterr().err


def test_codes_and_queries(run, folders, tmp_path, capsys):
    lax = pretrained_on(run, folders["train"], "skip", tmp_path / "lax")
    out = tmp_path / "test.lvcodes"
    encode = ["encode", str(lax), "--images", str(folders["test"]), "--out", str(out)]
    assert main([*encode, "--on-error", "raise"]) == 2
    assert "--on-error skip leaves such images out" in capsys.readouterr().err and not out.exists()
    assert main(encode) == 0
    said = capsys.readouterr()
    assert "58 codes" in said.out and said.err.count("warning: left out") == 2
    search = ["search", str(lax), "--query", str(folders["test"]), "--codes", str(out), "--csv"]
    assert main([*search, str(tmp_path / "a.csv"), "--on-error", "raise"]) == 2
    assert "can't be decoded" in (said := capsys.readouterr().err) or "damaged" in said
    assert main([*search, str(tmp_path / "a.csv")]) == 0
    assert "neighbours of 58 queries" in capsys.readouterr().out


def test_a_stage_has_the_runs_setting_and_an_older_result_stands(run, folders, tmp_path, capsys):
    lax = pretrained_on(run, folders["train"], "skip", tmp_path / "lax")
    for command in ("linear", "knn"):
        assert main([command, str(lax)]) == 0
        result = json.loads((lax / f"{command}.json").read_text())
        assert result["settings"]["on_error"] == "skip" and result["results"]["features"]["count"] == 58
    strict = pretrained_on(run, sound(folders["train"]), "raise", tmp_path / "strict")
    assert main(["knn", str(strict)]) == 0
    assert json.loads((strict / "knn.json").read_text())["settings"]["on_error"] == "raise"


def test_a_study_skips_in_training_and_measuring(folders, tmp_path, capsys):
    study = ["study", "--preset", "digits", "--train", str(folders["train"]), "--test", str(folders["test"])]
    study += ["--out", str(tmp_path / "study"), "--arms", "none", "--seeds", "0", "--epochs", "1"]
    study += ["--max-images", "50", "--threads", "1"]
    assert main([*study]) == 2
    assert "can't be decoded" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "study")
    assert main([*study, "--on-error", "skip"]) == 0
    result = json.loads((tmp_path / "study" / "study.json").read_text())
    assert result["runs"][0]["skipped"] == {"train": 3, "test": 2} and result["runs"][0]["queries"] == 58
    assert "--on-error skip" in result["command"]
