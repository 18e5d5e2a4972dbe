"""What people do with runs: read those of others, move them, call from elsewhere, name files as they like."""

import shutil
from pathlib import Path

import pytest
from every_command import NO_RUN, arguments_of, call

from lvssl.cli import COMMANDS, main

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
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


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
    assert name == "doctor" or any(tmp_path.iterdir()), "nothing was written anywhere"


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
    assert f"error: {tmp_path / 'file'}: nothing can be written there: name another folder with --out" in said
