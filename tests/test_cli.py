"""The commands as a user types them: the whole way on digits, and every mistake in one line with status 2."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvssl.codes.file import open_codes
from lvssl.commands.main import COMMANDS, guarded, main
from lvssl.evaluation.measures import equal_bit_codes
from lvssl.runs.rows import by_point
from lvssl.settings.fields import command_line
from lvssl.settings.stages import KnnSettings


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> dict[str, Path]:
    """A control and a latent model, three epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"none": folder / "control", "bernoulli": folder / "lv"}
    for family, out in runs.items():
        options = [
            "--preset",
            "digits",
            "--data",
            digits["train"],
            "--out",
            out,
            "--family",
            family,
            "--epochs",
            3,
        ]
        assert main(["pretrain", *map(str, options)]) == 0
    return runs


def one_line_error(capsys, arguments: list[object], *culprits: str, status: int = 2) -> None:
    assert main([str(a) for a in arguments]) == status
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    for culprit in culprits:
        assert culprit in lines[0]


def test_the_whole_way(trained, digits, tmp_path, capsys):
    lv, control = trained["bernoulli"], trained["none"]
    assert main(["evaluate", str(lv)]) == 0  # test.beton beside train.beton, the control beside the run
    evaluation = json.loads((lv / "evaluation.json").read_text())
    points = {(p["run"], p["representation"], p["method"]): p for p in by_point(evaluation["rows"])}
    name = evaluation["run"]["name"]
    code, features = points[name, "code", "code"], points[name, "features", ""]
    assert code["bits"] == 64 and evaluation["control"]["family"] == "none"
    assert str(digits["test"]) in evaluation["command"] and str(control) in evaluation["command"]
    control_name = evaluation["control"]["name"]
    measured = {key: p["linear"] for key, p in points.items() if "linear" in p}
    assert set(measured) == {
        (name, "features", ""),
        (name, "code", "code"),
        (control_name, "features", ""),
        *((control_name, "code", method) for method, _ in equal_bit_codes({64})),
        ("random encoder", "features", ""),
        ("no encoder", "pixels", ""),
    }
    assert all(20 < linear <= 100 for linear in measured.values()), measured
    assert code["raw_pixels"] == pytest.approx(8 * 8 / 8)  # grey: one byte a pixel
    assert code["fp32_feature"] == pytest.approx(32)
    assert 0.5 < points[name, "uncertainty", ""]["recall_at_1"] <= 1
    printed = capsys.readouterr().out
    assert "sign bits" in printed and "lvssl report" in printed

    assert main(["report", str(lv)]) == 0
    page = (lv / "report.html").read_text()
    assert f"{features['linear']:.1f}" in page


def test_codes_are_written_found_again_and_tied_to_their_checkpoint(trained, tmp_path, capsys):
    lv, control = trained["bernoulli"], trained["none"]
    random = np.random.default_rng(0)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(70):
        size = tuple(random.integers(8, 40, 2).tolist())
        image = Image.fromarray(random.integers(0, 256, (5, 5), dtype=np.uint8)).resize(size)
        image.save(tmp_path / "images" / ("sub" if i % 2 else ".") / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    out = tmp_path / "codes.lvcodes"
    assert main(["encode", str(lv), "--images", str(tmp_path / "images"), "--out", str(out)]) == 0
    codes = open_codes(out)
    assert (codes.family, codes.bits, codes.count) == ("bernoulli", 64, 70) and len(codes.names) == 70
    capsys.readouterr()
    query = tmp_path / "images" / "sub" / "01.png"
    arguments = ["search", str(lv), "--query", str(query), "--codes", str(out), "--k", "3"]
    assert main(arguments) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 5 and found[0][1] == "(uncertainty" and found[2][-1] == "sub/01.png"
    one_line_error(
        capsys, ["search", control, "--query", query, "--codes", out], "codes.lvcodes", "checkpoint"
    )
    out.write_bytes(out.read_bytes()[:-20])
    one_line_error(capsys, arguments, "codes.lvcodes")


def test_mistakes_before_training(digits, tmp_path, capsys):
    train, new = digits["train"], tmp_path / "new"
    cases = [
        (["pretrain", "--preset", "nope"], "unknown preset 'nope'", "digits"),
        (
            ["pretrain", "--family", "nope", "--data", train, "--out", new],
            "unknown family 'nope'",
            "bernoulli",
        ),
        (["pretrain", "--backbone", "vgg", "--data", train, "--out", new], "unknown backbone 'vgg'"),
        (["pretrain", "--data", tmp_path / "no.beton", "--out", new], "no.beton"),
        (
            ["pretrain", "--preset", "digits", "--data", train, "--out", new, "--batch-size", 5000],
            "5000",
            "1297",
        ),
        (["pretrain", "--preset", "digits", "--data", train, "--out", new, "--device", "tpu9"], "tpu9"),
        (["pretrain", "--data", train, "--out", new, "--temperature", 0], "--temperature"),
        (["pretrain", "--data", train, "--out", new, "--temperature", "inf"], "--temperature", "finite"),
        (["pretrain", "--data", train, "--out", new, "--lr", "nan"], "--lr"),
        (["pretrain", "--data", train, "--out", new, "--workers", -1], "--workers"),
        (["pretrain", "--preset", "digits", "--data", Path(__file__), "--out", new], "test_cli.py"),
        (["frobnicate"], "frobnicate", "pretrain"),
    ]
    short = tmp_path / "short.beton"
    short.write_bytes(train.read_bytes()[:-500])
    cases.append((["pretrain", "--preset", "digits", "--data", short, "--out", new], "short.beton"))
    for arguments, *culprits in cases:
        one_line_error(capsys, arguments, *culprits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.beton"], "something half-written was left"


def test_a_run_that_exists_is_resumed_only_when_asked_and_only_as_it_was(trained, digits, capsys):
    control = trained["none"]
    before = {path: path.stat().st_mtime_ns for path in control.rglob("*")}
    base = ["pretrain", "--preset", "digits", "--data", digits["train"], "--out", control, "--family", "none"]
    one_line_error(capsys, [*base, "--epochs", 3], "exists", "--resume")
    one_line_error(
        capsys,
        [*base, "--epochs", 4, "--resume"],
        "other settings",
        "epochs: 3 -> 4",
        f"--init {control}",
    )
    one_line_error(capsys, [*base[:-2], "--epochs", 3, "--resume"], "latent.family: none -> bernoulli")
    assert before == {path: path.stat().st_mtime_ns for path in control.rglob("*")}
    assert main(["pretrain", "--out", str(control), "--resume"]) == 0  # its settings need not be repeated


def test_mistakes_after_training(trained, digits, tmp_path, capsys):
    lv, empty = trained["bernoulli"], tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    cases = [
        (["evaluate", tmp_path / "none", "--test", digits["test"]], "none", "no such run"),
        (["evaluate", empty, "--test", digits["test"]], "empty", "config.json"),
        (["evaluate", lv, "--test", tmp_path / "no.beton"], "no.beton"),
        (["evaluate", lv, "--test", digits["test"], "--control", lv], "control"),
        (["report", empty], "empty"),
        (["encode", lv, "--images", empty, "--out", tmp_path / "c"], "empty"),
        (["encode", lv, "--images", tmp_path / "nowhere", "--out", tmp_path / "c"], "nowhere"),
        (["encode", lv, "--images", tmp_path / "bad", "--out", tmp_path / "c"], "a.jpg"),
        (["search", lv, "--query", tmp_path / "bad" / "a.jpg", "--codes", tmp_path / "c"], "c"),
        (["search", lv, "--query", tmp_path / "bad" / "a.jpg", "--k", 0], "--k"),
    ]
    for arguments, *culprits in cases:
        one_line_error(capsys, arguments, *culprits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "empty"]
    (empty / "something").touch()
    one_line_error(
        capsys,
        ["pretrain", "--preset", "digits", "--data", digits["train"], "--out", empty],
        "is not a run folder",
    )


def test_an_output_that_is_a_folder_is_refused_at_once(trained, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lv, images = trained["bernoulli"], digits["test"]
    (tmp_path / "there").mkdir()
    for place in ("there", ".", ".."):
        for option in ("--out", "--csv", "--faiss"):
            command = ["encode", lv, "--images", images, "--out", "c.lvcodes", option, place]
            one_line_error(capsys, command, f"{place}: is a folder")
        for option in ("--csv", "--page"):
            command = ["search", lv, "--query", images, "--codes", "c.lvcodes", option, place]
            one_line_error(capsys, command, f"{place}: is a folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    "command",
    [
        "pretrain --preset digits --data '' --out new",
        "pretrain --preset digits --data= --out new",
        "pretrain --preset digits --data . --out ''",
        "encode '' --images .",
        "encode run --images ''",
        "encode run --images . --csv=",
        "search run --query ''",
        "knn run --test=",
        "compression run --others a '' b",
        "runs ''",
        "launch ''",
        "doctor ''",
    ],
)
def test_an_unset_variable_of_the_shell_is_not_the_current_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    one_line_error(capsys, shlex.split(command), " is empty: give a value")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_named_before_what_is_missing(name, capsys):
    one_line_error(capsys, [name, "--tpyo"], "--tpyo")
    one_line_error(capsys, [name, "a", "--tpyo=3"], *([] if name == "presets" else ["--tpyo"]))


def test_what_a_mistyped_option_may_have_meant_is_said(capsys):
    one_line_error(capsys, ["encode", "run", "--imags", "a"], "no option --imags; did you mean --images?")
    one_line_error(capsys, ["pretrain", "--no-resum"], "no option --no-resum; did you mean --no-resume?")
    one_line_error(capsys, ["doctor", "--", "--x"], "--x: no such run folder")


def test_options_that_are_any_text_may_be_empty(capsys):
    assert main(["plan", "--preset", "", "--backbone", "tiny", "--resolution", "32", "--gpus", "1"]) == 0


def test_the_advice_for_names_that_begin_with_a_dash_can_be_typed(digits, tmp_path, monkeypatch, capsys):
    """Each command advises the next, which is typed as it stands."""
    monkeypatch.chdir(tmp_path)
    os.link(digits["train"], "-set.beton")
    os.link(f"{digits['train']}.json", "-set.beton.json")
    one_epoch = ["--preset", "digits", "--epochs", "1", "--threads", "1"]
    assert main(["pretrain", *one_epoch, "--data=-set.beton", "--out=-run"]) == 0
    advised = shlex.split(capsys.readouterr().out.split("next: lvssl ")[1].split(", or")[0])
    assert main(advised) == 0
    advised = shlex.split(capsys.readouterr().out.split("next: lvssl ")[1].replace("IMAGE", "./-set.beton"))
    assert main([*advised, "--csv", "found.csv"]) == 0
    settings = KnnSettings(run=Path("-run"), test=Path("-set.beton"))
    assert command_line("knn", settings) == "lvssl knn ./-run --test ./-set.beton"


def test_help_is_there_for_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--family" in text and "cifar10-small" in text


ASKED = """
import contextlib, os, sys
from lvssl.commands.main import COMMANDS, main
for words in (['--help'], *([name, option] for name in COMMANDS for option in ('--help', '--tset'))):
    status = 0
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            status = main(words) or 0
        except SystemExit as ended:
            status = ended.code or 0
    print(words, status, 'torch' in sys.modules)
"""


def test_help_and_a_mistyped_option_are_answered_without_loading_torch():
    """Loading torch takes seconds, which whoever asks for help would wait."""
    asked = subprocess.run([sys.executable, "-c", ASKED], check=True, capture_output=True, text=True)
    answers = [line.rsplit(" ", 2) for line in asked.stdout.splitlines()]
    assert len(answers) == 1 + 2 * len(COMMANDS)
    assert [words for words, _, loaded in answers if loaded == "True"] == []
    answered = {str(words) for words in (["--help"], *([name, "--help"] for name in COMMANDS))}
    assert {words for words, status, _ in answers if status == "0"} == answered


def test_the_demo_runs_on_digits_and_leaves_what_it_promises(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--data", "digits", "--epochs", "1", "--out", "my demo"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "my demo" / "bernoulli" / "evaluation.json").read_text())["rows"]
    assert {row["run"] for row in rows} == {"bernoulli", "control", "random encoder", "no encoder"}
    page = (tmp_path / "my demo" / "report.html").read_text()
    assert (
        'id="neighbours"' in page
        and 'id="bits"' in page
        and "lvssl compression &#39;my demo/bernoulli" in page
    )
    assert open_codes(tmp_path / "my demo" / "bernoulli" / "codes.lvcodes").count == 200
    assert "report.html" in printed and "bernoulli" in printed
    search, more = (line for line in printed.splitlines() if line.startswith(("search ", "more ")))
    query = "my demo/images/0000-class"
    assert re.fullmatch(rf"\S+ search 'my demo/bernoulli' --query '{query}\d+.png'", search[9:])
    assert more.count("'my demo/bernoulli'") == 2


@pytest.mark.parametrize(("error", "status", "said"), [
    (OSError(errno.ENOSPC, "No space left", "run/report.html"), 1, "run/report.html: No space left"),
    (OSError("torch can't be loaded"), 1, "torch can't be loaded"),
    (OSError(errno.ENOSPC, "No space left"), 1, "No space left"),
    (OSError(errno.EXDEV, "Invalid link", b"a", None, b"b"), 1, "a -> b: Invalid link"),
    (OSError(errno.EBADF, "Bad file descriptor", 7), 1, "Bad file descriptor"),
    (OSError(errno.EACCES, "Permission denied", "run"), 2, "run: Permission denied"),
    (OSError(errno.EROFS, "Read-only file system", "run"), 1, "run: Read-only file system"),
])  # fmt: skip
def test_what_the_system_refuses_is_a_line_with_the_files_name(error, status, said, capsys):
    def command(arguments):
        raise error

    assert guarded(command, []) == status
    assert capsys.readouterr().err == f"error: {said}\n"


CONVERT = [sys.executable, "-m", "pipelines.convert.command"]
LVSSL = [sys.executable, "-m", "lvssl"]
PRINTING = [[*LVSSL, "--help"], [*LVSSL, "pretrain", "--help"], [*LVSSL, "presets"], [*CONVERT, "--help"]]


def ended(command: list[str], stdout: str) -> tuple[int, str]:
    """Status and stderr of a command whose stdout, buffered, is a pipe without a reader, closed, or full."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    if stdout == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *command] if stdout == "closed" else command
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", PRINTING, ids=lambda words: " ".join(words[2:]))
def test_a_closed_or_full_output_is_no_traceback(command):
    assert ended(command, "pipe") == (141, "")  # as of a program that SIGPIPE ends
    assert ended(command, "closed") == (0, "")
    status, errors = ended(command, "full")
    assert status == 1 and errors.startswith("error: No space left on device") and errors.count("\n") == 1


def test_a_mistake_is_told_though_nobody_reads_the_output():
    status, errors = ended([*LVSSL, "presets", "nosuch"], "pipe")
    assert status == 2 and errors.startswith("error: unknown preset") and errors.count("\n") == 1


@pytest.mark.parametrize("width", [80, 120])
def test_help_is_as_wide_as_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ("pretrain", "finetune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lengths = [len(line) for line in capsys.readouterr().out.splitlines()]
        assert width - 2 <= max(lengths) <= width


def test_the_list_of_presets_has_help(capsys):
    assert main(["presets", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: lvssl presets")


def test_the_advice_after_a_damaged_image_is_a_command_that_works(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    whole = (tmp_path / "photos" / "3.jpg").read_bytes()
    (tmp_path / "photos" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    options = ["--preset", "digits", "--data", tmp_path / "photos", "--out", tmp_path / "run", "--epochs", 1]
    command = ["pretrain", *map(str, options), "--batch-size", "4", "--device", "cpu"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "3.jpg, can't be decoded" in said and "pass --resume --on-error skip" in said
    assert main([*command, "--resume", "--on-error", "skip"]) == 0
