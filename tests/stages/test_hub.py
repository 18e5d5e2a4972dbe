"""Encoders of the Hugging Face Hub: from its cache on the disk, and to and from one that runs here."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import TOKEN, hub
from test_export import made_run

import lvssl
from lvssl.commands.main import main
from pipelines.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run = made_run(folder / "run", "digits", "tiny")
    assert main(["export", str(run), "--out", str(folder / "out"), "--no-onnx"]) == 0
    return folder / "out"


OFFLINE = f"""
import lvssl
for one in (
    lvssl.load("hf://someone/encoder"),
    lvssl.load("hf://someone/encoder@{COMMIT}"),
    lvssl.Model.from_pretrained("someone/encoder"),
):
    print(one.run.digest)

from lvssl.runs.initial import initial_weights
from lvssl.settings.pretrain import ModelSettings
from pipelines.errors import InputError
for what in ("hf://someone/else", "hf://a/b/c", "pretrained"):
    try:
        initial_weights(ModelSettings("test_vit", init=what), 32)
    except InputError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def offline(exported, tmp_path_factory) -> list[str]:
    """What a process prints that has a cache with one repository, and no network. A process of its own, for
    huggingface_hub reads its settings when it is imported."""
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--someone--encoder"
    shutil.copytree(exported, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_export_in_the_cache_is_loaded(offline, exported):
    assert offline[:3] == [lvssl.load(exported).run.digest] * 3


def test_what_is_not_there_is_said_in_one_line(offline):
    lines = offline[3:]
    said = ("hf://someone/else: the Hub can't be reached (", "hf://a/b/c: ",
            "--init pretrained: weights of test_vit could not be loaded or downloaded (")  # fmt: skip
    assert len(lines) == 3 and all(map(str.startswith, lines, said)), lines


def test_a_command_says_how_one_of_the_hub_is_fetched(capsys):
    assert main(["report", "hf://someone/encoder"]) == 2
    assert (
        "no such run folder; for one on the Hub, `hf download USER/NAME --local-dir FOLDER`"
        in capsys.readouterr().err
    )


def test_a_folder_needs_no_hub(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it weren't installed
    assert lvssl.Model.from_pretrained(exported).bits == lvssl.load(exported).bits
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        lvssl.load("hf://someone/encoder")


SCRIPT = """
import io, json, os, sys, contextlib
from lvssl.commands.main import main
for arguments, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
import lvssl
os.environ["HF_TOKEN"] = token
print(json.dumps(lvssl.load("hf://someone/encoder").run.digest if "load" in sys.argv else ""))
"""


def with_hub(address: str, home, commands: list[tuple[list[str], str]], *more: str) -> list:
    """What commands of users with these tokens end with and say, in one process that asks that Hub."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | own
    script = [sys.executable, "-c", SCRIPT, json.dumps(commands), *more]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_export_is_pushed_or_refused_by_name(exported, tmp_path):
    def push(name: str, out: str, *more: str) -> list[str]:
        run = str(exported.parent / "run")
        return ["export", run, "--no-onnx", "--out", str(tmp_path / out), "--push", name, *more]

    taken = [("someone/encoder", "a"), ("someone/open", "b", "--public"), ("someone/encoder", "c")]
    refused = [
        ("encoder", TOKEN, "--push encoder: must be USER/NAME"),
        ("someone/a b", TOKEN, "--push someone/a b: "),
        ("someone/encoder", "", "`hf auth login` stores a token"),
        ("someone/encoder", TOKEN[::-1], "`hf auth login` stores a token"),
        ("others/encoder", TOKEN, "is complete, `hf upload others/encoder"),
    ]
    commands = [(push(name, f"no{i}"), token) for i, (name, token, _) in enumerate(refused)]
    commands += [(push(*one), TOKEN) for one in taken]
    with hub(tmp_path / "hub") as (address, private):
        *said, digest = with_hub(address, tmp_path / "home", commands, "load")
    for i, ((_, token, reason), (status, out, err)) in enumerate(zip(refused, said)):
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and reason in errors[0], err
        assert not token or token not in out + err
        assert (tmp_path / f"no{i}").exists() == ("is complete" in reason)  # else refused before it is made
    for (name, folder, *_), (status, out, err) in zip(taken, said[len(refused) :]):
        assert status == 0 and f"pushed: hf://{name}" in out, err
        sent, files = tmp_path / "hub" / name, sorted((tmp_path / folder).iterdir())
        assert sorted(p.name for p in sent.iterdir()) == [p.name for p in files]
        if folder != "a":  # which the third replaces
            assert all((sent / file.name).read_bytes() == file.read_bytes() for file in files)
    assert private == {"someone/encoder": True, "someone/open": False}
    assert digest == lvssl.load(exported).run.digest  # fetched from there


def test_a_push_without_network_or_library_is_refused_first(exported, tmp_path, monkeypatch, capsys):
    push = [
        "export",
        str(exported.parent / "run"),
        "--no-onnx",
        "--out",
        str(tmp_path / "out"),
        "--push",
        "a/b",
    ]
    (status, _, err), _ = with_hub("http://127.0.0.1:9", tmp_path / "home", [(push, TOKEN)])
    assert status == 2 and "error: --push a/b: " in err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it weren't installed
    assert main(push) == 2
    assert "--push a/b: needs huggingface_hub: pip install huggingface_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
