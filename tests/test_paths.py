"""The commands one after the other, below folders whose names mean something elsewhere, or are no ASCII."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvssl.commands.main import main
from pipelines.convert.command import main as convert_beton

NAMES = ["2026-11-26T10:00 {a}=b", "été 北 [x] *?"]


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_of_commands(name, tmp_path, capsys):
    here = tmp_path / name
    pictures(here / "set" / "train", 48)
    pictures(here / "set" / "test", 12)
    train, test, run = here / "train.beton", here / "test.beton", here / "run"

    def done(*words: object) -> str:
        command = convert_beton if words[0] == "convert-beton" else main
        arguments = list(map(str, words))[command is convert_beton :]
        assert command(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    done("convert-beton", here / "set" / "train", train)
    done("convert-beton", here / "set" / "test", test)
    done("convert-beton", "--verify", train)
    short = ["--preset", "digits", "--epochs", "1", "--batch-size", "24", "--threads", "1"]
    done("pretrain", *short, "--data", train, "--out", run)
    assert "top-1" in done("knn", run)  # test.beton lies beside
    assert "top-1" in done("knn", run, "--train", here / "set" / "train", "--out", here / "of-files.json")
    assert "48 codes" in done("encode", run, "--images", train)
    assert "12 queries" in done("search", run, "--query", test, "--csv", here / "found.csv")
    picture = next((here / "set" / "test").rglob("*.png"))
    assert len(done("search", run, "--query", picture, "--k", "3").splitlines()) == 5
    page = Path(done("report", run).strip())
    assert page == run / "report.html" and name.split()[0] in page.read_text()


def pictures(folder: Path, count: int) -> None:
    noise = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class {i % 2}" / f"{i:02}: ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(127 * (i % 2))
        Image.fromarray(pixels).save(path)
