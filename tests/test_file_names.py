"""Names of files and classes that are no UTF-8, as old archives and systems leave them: every command."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from every_command import NO_RUN, arguments_of, call
from PIL import Image

from lvssl.commands.main import COMMANDS, main
from pipelines.convert.conversion import convert
from pipelines.decode import open_reader
from pipelines.formats.manifest import read_manifest

CLASSES = (b"caf\xe9", b"th\xe9", "rosé".encode())
NAMELESS = ("presets", "plan", "demo", *NO_RUN, "study")  # study calls pretrain, evaluate and analyse
QUICK = {"analyse": ["--max-images", "40", "--samples", "1"], "compression": ["--top-n", "5"]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Folders train and test, and `beton`s of them, the folder itself of such a name."""
    root, random = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    found = {}
    for split, each in (("train", 20), ("test", 14)):
        for name in CLASSES:
            folder = os.fsencode(root) + b"/images \xf6/" + split.encode() + b"/" + name
            try:
                os.makedirs(folder)
            except OSError:
                pytest.skip("this file system takes names of UTF-8 alone")
            for i in range(each):
                pixels = Image.fromarray(random.integers(0, 256, (8, 8), np.uint8))
                with open(folder + b"/\xff%d.png" % i, "wb") as file:
                    pixels.save(file, "png")
        found[split] = Path(os.fsdecode(os.fsencode(root) + b"/images \xf6/" + split.encode()))
        found[f"{split}.beton"] = root / f"{split}.beton"
        convert(str(found[split]), found[f"{split}.beton"])
    for name, family in (("run", "none"), ("lv", "bernoulli")):
        options = ["--preset", "digits", "--data", found["train"], "--out", root / name, "--family", family]
        assert main(["pretrain", *map(str, options), "--epochs", "1", "--batch-size", "20"]) == 0
        found[name] = root / name
    return found


def test_a_manifest_is_json_whatever_the_names(sets):
    path = sets["train.beton"].with_name("train.beton.json")
    content = json.loads(path.read_text(encoding="utf-8"))  # strictly UTF-8
    names = [os.fsencode(row[0]) for row in content["samples"]]
    assert b"caf\xe9/\xff0.png" in names and "rosé/".encode() + b"\xff0.png" in names
    assert read_manifest(path)[1]["name"] == [row[0] for row in content["samples"]]
    assert open_reader(sets["train.beton"]).classes == open_reader(sets["train"]).classes


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NAMELESS])
def test_no_command_minds_names_that_are_no_text(name, sets, tmp_path, capsys):
    run, out = sets["run"], Path(f"{tmp_path}/\udcf6ut")
    out.mkdir()
    if name == "search":
        assert main(arguments_of("encode", run, sets["train"], sets["test"], out)) == 0
    if name == "report":
        assert main(arguments_of("evaluate", run, sets["train"], sets["test"], out)) == 0
        out = out / "evaluate"
    arguments = [*arguments_of(name, run, sets["train"], sets["test"], out), *QUICK.get(name, [])]
    if name == "finetune":  # its figures go to TensorBoard
        assert call(arguments_of(name, run, sets["train"], sets["test"], out), capsys)[0] == 2
        out = tmp_path
        arguments = arguments_of(name, run, sets["train"], sets["test"], out)
    if name == "pretrain":
        arguments = ["pretrain", "--out", str(run), "--resume"]
    status, said = call(arguments, capsys)
    assert status == 0, said
    for file in out.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


def test_a_strict_terminal_shows_such_names(sets, tmp_path, monkeypatch):
    codes, shown = tmp_path / "c.lvcodes", io.BytesIO()
    assert main(["encode", str(sets["run"]), "--images", str(sets["train"]), "--out", str(codes)]) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8", errors="strict"))
    search = ["search", str(sets["run"]), "--codes", str(codes), "--k", "2", "--query", str(sets["test"])]
    assert main(search) == 0
    assert rb"/\udcff" in shown.getvalue()
