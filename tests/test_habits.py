"""What people do with runs: read those of others, move them, call from elsewhere, name files as they like."""

import json
import shutil
from pathlib import Path

import pytest
from every_command import NO_RUN, arguments_of, call

from lvssl.commands.main import COMMANDS, main

QUICK = {"analyse": ["--max-images", "40", "--samples", "1"]}
NOT_OF_A_RUN = ("pretrain", "presets", "plan", "demo", "study", *NO_RUN)  # they have no run that is there


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory) -> Path:
    """A folder with a run and its control, of one epoch, and their images."""
    folder = tmp_path_factory.mktemp("runs")
    for split, path in digits.items():
        for file in (path, path.with_name(path.name + ".json")):
            shutil.copy(file, folder / file.name.replace(path.stem, split))
    for name, family in (("run", "bernoulli"), ("control", "none")):
        options = ["--preset", "digits", "--data", folder / "train.beton", "--out", folder / name]
        assert main(["pretrain", *map(str, options), "--epochs", "1", "--family", family]) == 0
    return folder


def stamps(folder: Path) -> dict[Path, int]:
    """When each file was written; what is computed once for every command isn't a result."""
    kept = ("features", "quantisers", "density.safetensors")
    files = (p for p in folder.rglob("*") if p.is_file())
    return {
        path: path.stat().st_mtime_ns for path in files if not {*kept} & {*path.relative_to(folder).parts}
    }


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NOT_OF_A_RUN])
def test_a_command_with_out_writes_nothing_into_the_run(name, runs, tmp_path, capsys):
    """The run may be somebody else's, and read-only."""
    train, test = runs / "train.beton", runs / "test.beton"
    if name == "search":
        assert main(arguments_of("encode", runs / "run", train, test, tmp_path)) == 0
    before = stamps(runs)
    arguments = [*arguments_of(name, runs / "run", train, test, tmp_path), *QUICK.get(name, [])]
    if name == "compression":
        arguments += ["--control", str(runs / "control")]
    status, said = call(arguments, capsys)
    assert status == 0, said
    assert stamps(runs) == before
    assert name in ("doctor", "runs") or any(tmp_path.iterdir()), "nothing was written anywhere"


def test_a_page_shows_what_was_measured_elsewhere(runs, tmp_path, capsys):
    run, out = runs / "run", tmp_path / "elsewhere"
    assert main(["evaluate", str(run), "--test", str(runs / "test.beton"), "--out", str(out)]) == 0
    assert (
        f"written: {out / 'evaluation.json'}; next: lvssl report {run} --out {out}" in capsys.readouterr().out
    )
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert 'id="results"' in page and 'id="neighbours"' in page and not (run / "report.html").exists()
    assert f"lvssl compression {run} --out {out}" in page
    (tmp_path / "file").touch()
    assert (
        main(["evaluate", str(run), "--test", str(runs / "test.beton"), "--out", str(tmp_path / "file")]) == 2
    )
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'file'}: is not writable: choose another folder with --out" in said


def test_a_run_is_used_from_another_folder_and_after_a_move(digits, tmp_path, monkeypatch, capsys):
    """Its training images are known by their full path; where they aren't any more, the option is named."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for split, path in digits.items():
        for file in (path, path.with_name(path.name + ".json")):
            shutil.copy(file, tmp_path / "here" / file.name.replace(path.stem, split))
    monkeypatch.chdir(tmp_path / "here")
    options = ["--preset", "digits", "--data", "train.beton", "--out", "run", "--epochs", "1"]
    assert main(["pretrain", *options]) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert main(["knn", "../here/run", "--out", "knn.json"]) == 0
    assert main(["pretrain", "--out", "../here/run", "--resume"]) == 0
    shutil.move(tmp_path / "here" / "train.beton", "train.beton")
    shutil.copytree(tmp_path / "here" / "run", "run")
    capsys.readouterr()
    gone = tmp_path / "here" / "train.beton"
    for name in ("linear", "knn", "finetune", "evaluate", "analyse", "compression", "pretrain"):
        where = ["--out", "run", "--resume"] if name == "pretrain" else ["run"]
        assert main([name, *where]) == 2
        lines = capsys.readouterr().err.splitlines()
        option = "--data" if name == "pretrain" else "--train"
        assert len(lines) == 1 and lines[0].startswith(f"error: {gone}: the ") and f" {option}, " in lines[0]
    test = str(tmp_path / "here" / "test.beton")
    assert main(["knn", "run", "--train", "train.beton", "--test", test]) == 0
    assert main(["pretrain", "--out", "run", "--resume", "--data", "train.beton"]) == 0
    assert json.loads(Path("run/config.json").read_text())["settings"]["data"] == str(gone)
