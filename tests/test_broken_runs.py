"""Every command on damaged and foreign runs and on odd sets: one line of what is wrong, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_command import arguments_of, call, check
from PIL import Image

from lvssl.commands.main import COMMANDS, main


@pytest.fixture(scope="module")
def sound(digits, tmp_path_factory) -> Path:
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("sound") / "run"
    options = ["--preset", "digits", "--data", digits["train"], "--out", out, "--epochs", 1]
    assert main(["pretrain", *map(str, options)]) == 0
    return out


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Another configuration: `change` is given what stands in it, and changes that."""

    def write(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        change(config)
        (run / "config.json").write_text(json.dumps(config))

    return write


def setting(group: str, name: str, value: object) -> Callable[[Path], object]:
    return edit(lambda config: config["settings"][group].update({name: value}))


def file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def cut_checkpoint(run: Path) -> None:
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])


def config_is_a_folder(run: Path) -> None:
    (run / "config.json").unlink()
    (run / "config.json").mkdir()


BROKEN: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no config": lambda run: (run / "config.json").unlink(),
    "config is a folder": config_is_a_folder,
    "empty": file("config.json", b""),
    "cut short": lambda run: file("config.json", (run / "config.json").read_bytes()[:200])(run),
    "zeros": file("config.json", bytes(500)),
    "utf-16": lambda run: file("config.json", (run / "config.json").read_text().encode("utf-16"))(run),
    "no utf-8": file("config.json", b'{"settings": "\xff\xfe"}'),
    "a list": file("config.json", b"[1, 2]"),
    "a number": file("config.json", b"7"),
    "deep": file("config.json", b"[" * 100_000),
    "no settings": edit(lambda config: config.pop("settings")),
    "no classes": edit(lambda config: config.pop("classes")),
    "classes in words": edit(lambda config: config.update(classes="ten")),
    "classes below none": edit(lambda config: config.update(classes=-3)),
    "too many classes": edit(lambda config: config.update(classes=2**40)),
    "data in words": edit(lambda config: config.update(data="ten")),
    "versions in words": edit(lambda config: config.update(versions={"results": "two"})),
    "names of classes in words": edit(lambda config: config["data"].update(classes=7)),
    "no such setting": setting("model", "heads", 3),
    "no group": edit(lambda config: config["settings"].update(model=3)),
    "null group": edit(lambda config: config["settings"].update(latent=None)),
    "family": setting("latent", "family", "cauchy"),
    "family of a wrong type": setting("latent", "family", ["bernoulli"]),
    "another family": setting("latent", "family", "categorical"),
    "backbone": setting("model", "backbone", "vgg"),
    "another backbone": setting("model", "backbone", "small"),
    "width": setting("model", "hidden", 65),
    "width of a wrong type": setting("model", "hidden", "64"),
    "latent width": setting("latent", "dim", 48),
    "absurd width": setting("model", "hidden", 10**15),
    "resolution": setting("view", "resolution", 0),
    "resolution null": setting("view", "resolution", None),
    "mean": setting("view", "mean", [0.5]),
    "not a number": setting("view", "evaluation_crop", float("nan")),
    "epochs in words": edit(lambda config: config["settings"].update(epochs="many")),
    "batch": edit(lambda config: config["settings"].update(batch_size=-1)),
    "precision": setting("engine", "precision", "int4"),
    "data of a wrong type": edit(lambda config: config["settings"].update(data=5)),
    "on_error": edit(lambda config: config["settings"].update(on_error="ignore")),
    "no checkpoint": lambda run: shutil.rmtree(run / "checkpoints"),
    "cut checkpoint": cut_checkpoint,
    "metrics": file("metrics.jsonl", b'{"step": 1}\n{"st'),
    "metrics, no utf-8": file("metrics.jsonl", b"\xff\xfe\n"),
    "metrics, of other things": file("metrics.jsonl", b'[1]\n{"step": "x", "units": "y", "epoch": null}\n'),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_no_command_ends_in_a_traceback_on_a_damaged_or_foreign_run(broken, sound, digits, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    (out / "pipeline.toml").write_text("[stages\n")
    for name in COMMANDS:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run)
        BROKEN[broken](run)
        # Where the run itself is whole, a command gets as far as the test set, which isn't there.
        arguments = arguments_of(name, run, digits["train"], tmp_path / "nowhere.beton", out)
        status, said = call(arguments, capsys)
        check(status, said, f"{broken}: {name}", str(tmp_path), "run")


def images(folder: Path, counts: dict[str, int], mode: str = "L") -> Path:
    """So many 8 x 8 images of noise in each class folder; of the class "" in the folder itself."""
    random = np.random.default_rng(len(counts))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")
    return folder


def damaged(folder: Path) -> Path:
    images(folder, {"0": 60, "1": 60})
    (folder / "0" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n, and nothing of the kind")
    return folder


def no_beton(folder: Path) -> Path:
    folder.parent.mkdir()
    file("train.beton", b"no beton")(folder.parent)
    return folder.parent / "train.beton"


ODD: dict[str, Callable[[Path], Path]] = {
    "three images": lambda folder: images(folder, {"0": 2, "1": 1}),
    "one image": lambda folder: images(folder, {"0": 1}),
    "one class": lambda folder: images(folder, {"0": 50}),
    "foreign classes": lambda folder: images(folder, {"apple": 25, "bear": 25}),
    "no labels": lambda folder: images(folder, {"": 50}),
    "an empty folder": lambda folder: images(folder, {"": 0}),
    "a damaged image": damaged,
    "no beton": no_beton,
}


QUICK = ("three images", "one image", "no labels")


@pytest.mark.parametrize("odd", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ODD])
def test_no_command_ends_in_a_traceback_on_an_odd_set(odd, sound, digits, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    shutil.copytree(sound, run)
    (out / "pipeline.toml").write_text("[stages\n")
    tiny = images(tmp_path / "digits" / "train", {str(i): 5 for i in range(10)})
    given = ODD[odd](tmp_path / "sets" / "train")
    for train, test in ((tiny, given), (given, tiny)):
        for name in COMMANDS:
            arguments = arguments_of(name, run, train, test, out)
            if name == "pretrain":
                arguments = [
                    "pretrain",
                    "--preset",
                    "digits",
                    "--data",
                    str(train),
                    "--out",
                    str(out / "new"),
                ]
                arguments += ["--epochs", "1", "--batch-size", "2" if odd in QUICK[:2] else "20"]
            status, said = call(arguments, capsys)
            check(status, said, f"{odd}: {name}", str(tmp_path), "run", "--")
            shutil.rmtree(out / "new", ignore_errors=True)
