"""Labels are compared by the names of their classes: of another set, of a part of one, in another order."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvssl.commands.main import main
from lvssl.runs.labels import numbered_as, open_pair
from lvssl.runs.rows import by_point
from lvssl.runs.run import load_run, read_set
from lvssl.settings.pretrain import PRESETS
from lvssl.training.pretrain import pretrain
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.errors import InputError

COLOURS = {"apple": (200, 30, 30), "bear": (30, 30, 200), "crow": (30, 200, 30)}


def folder(path: Path, *classes: str, each: int = 24, seed: int = 0) -> Path:
    """Images of one colour a class: no encoder can mistake them."""
    random = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(np.array(COLOURS[name]) + random.integers(-20, 20, (16, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{i:02}.png")
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Betons, and folders of the same names: train of apple and bear, tests of other classes."""
    top, made = tmp_path_factory.mktemp("sets"), {}
    (top / "order.txt").write_text("bear\napple\n")
    tests = {
        "bear": ("bear",),
        "both": ("apple", "bear"),
        "crow": ("bear", "crow"),
        "train": ("apple", "bear"),
    }
    for seed, (name, classes) in enumerate(tests.items()):
        made[f"{name}-folder"] = folder(top / name / "files", *classes, each=24, seed=seed)
        made[name] = top / name / f"{name}.beton"
        convert(str(made[f"{name}-folder"]), made[name])
    made["turned"] = top / "turned.beton"  # the classes in another order
    convert(str(made["both-folder"]), made["turned"], options=ConvertOptions(classes=top / "order.txt"))
    return made


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("named") / "run"
    base = PRESETS["digits"]
    pretrain(dataclasses.replace(base, data=sets["train"], out=out, epochs=1, batch_size=16, threads=1))
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_knows_its_classes(run, sets):
    assert load_run(run).classes == ["apple", "bear"]
    assert open_reader(sets["train"]).classes == ["apple", "bear"]


@pytest.mark.parametrize("test", ["bear", "bear-folder", "turned", "both-folder"])
@pytest.mark.parametrize("stage", ["linear", "knn"])
def test_a_part_of_the_classes_in_any_order_is_scored_as_what_it_is(run, sets, test, stage):
    assert main([stage, str(run), "--test", str(sets[test]), *(["--k", "3"] if stage == "knn" else [])]) == 0
    result = json.loads((run / f"{stage}.json").read_text())
    assert result["results"]["features"]["top1"] == 100.0


COMMANDS = {
    "linear": ("linear", "{run}"),
    "knn": ("knn", "{run}"),
    "finetune": ("finetune", "{run}"),
    "evaluate": ("evaluate", "{run}"),
    "analyse": ("analyse", "{run}", "--alone"),
    "compression": ("compression", "{run}", "--control", "{run}"),
    "study": ("study", "--train", "{train}", "--out", "{run}/study"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["", "-folder"])
def test_a_class_that_the_training_set_does_not_name_is_refused(run, sets, capsys, command, kind):
    """Not scored as another: by every command that measures with labels, before any work."""
    if command == "compression":  # its control must be deterministic
        config = json.loads((run / "config.json").read_text())
        assert config["settings"]["latent"]["family"] != "none"
        run = made_control(run, sets)
    typed = [part.format(run=run, train=sets["train"]) for part in COMMANDS[command]]
    assert main([*typed, "--test", str(sets[f"crow{kind}"])]) == 2
    said = capsys.readouterr().err
    assert "lacks (1): crow" in said and "it has apple, bear" in said


def made_control(run: Path, sets) -> Path:
    out, base = run.parent / "deterministic", PRESETS["digits"]
    latent = dataclasses.replace(base.latent, family="none")
    settings = dataclasses.replace(base, data=sets["train"], out=out, epochs=1, batch_size=16, threads=1)
    pretrain(dataclasses.replace(settings, latent=latent))
    return out


def test_evaluate_gives_the_figures_of_the_set_in_its_own_order(run, sets):
    figures = []
    for test in ("both", "turned"):
        assert main(["evaluate", str(run), "--test", str(sets[test]), "--overwrite"]) == 0
        figures.append(json.loads((run / "evaluation.json").read_text())["rows"])
    (features,) = by_point(figures[0], run="run", representation="features")
    assert figures[0] == figures[1] and features["linear"] == features["knn"] == 100.0
    gallery = np.load(run / "gallery.npz")
    assert gallery["class_names"].tolist() == ["apple", "bear"]


def test_a_control_of_other_classes_is_refused(run, sets, capsys):
    control = made_control(run, sets)
    config = json.loads((control / "config.json").read_text())
    config["data"]["classes"] = ["apple", "crow"]
    (control / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run), "--test", str(sets["both"]), "--control", str(control)]) == 2
    assert "was trained on other classes than" in capsys.readouterr().err


def test_a_training_set_that_was_replaced_is_refused(run, sets, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["data"]["classes"] = ["apple", "crow"]
    (run / "config.json").write_text(json.dumps(config))
    for command in ("linear", "evaluate"):
        assert main([command, str(run), "--test", str(sets["both"])]) == 2
        assert "isn't the set that" in capsys.readouterr().err


def test_a_training_set_in_another_order_of_classes_is_the_same_set(run, sets):
    """As it is when the run is resumed: the test set is numbered as the training set is now."""
    config = json.loads((run / "config.json").read_text())
    config["data"]["classes"] = ["bear", "apple"]
    (run / "config.json").write_text(json.dumps(config))
    for command in ("linear", "evaluate"):
        assert main([command, str(run), "--test", str(sets["both"])]) == 0


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "analyse"])
def test_training_images_of_one_class_are_refused(run, sets, capsys, command):
    typed = [part.format(run=run, train=sets["bear"]) for part in COMMANDS[command]]
    if command == "compression":
        typed[-1] = str(made_control(run, sets))
    train = [] if command == "study" else ["--train", str(sets["bear"])]
    assert main([*typed, *train, "--test", str(sets["bear"])]) == 2
    assert f"{sets['bear']}: needs labels of at least two classes" in capsys.readouterr().err


def test_one_class_that_can_be_decoded_is_an_error_of_one_line(run, sets, tmp_path, capsys):
    train = Path(shutil.copytree(sets["both-folder"], tmp_path / "train"))
    for path in (train / "apple").iterdir():
        path.write_text("no image")
    typed = [str(run), "--train", str(train), "--test", str(sets["both"]), "--on-error", "skip"]
    for command in ("linear", "evaluate"):
        assert main([command, *typed]) == 2
        assert "at least two classes" in capsys.readouterr().err


def test_an_analysis_needs_test_images_of_two_classes(run, tmp_path, capsys):
    test = folder(tmp_path / "test", "bear", each=40)
    assert main(["analyse", str(run), "--test", str(test), "--alone"]) == 2
    assert "test images of at least two classes are needed" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b'{"classes": ["app', b"\xff\xfe\x80" * 20], ids=["cut", "no text"])
def test_a_damaged_manifest_is_refused_and_not_taken_for_no_names(run, sets, tmp_path, capsys, content):
    test = Path(shutil.copy(sets["both"], tmp_path / "test.beton"))
    Path(f"{test}.json").write_bytes(content)
    for typed in (["knn", str(run), "--k", "3", "--test"], ["evaluate", str(run), "--test"]):
        assert main([*typed, str(test)]) == 2
        assert f"{test}.json: not a manifest, or damaged" in capsys.readouterr().err
    assert main(["encode", str(run), "--images", str(test)]) == 2


def test_evaluate_reads_the_manifest_of_images_with_odd_names(run, sets, tmp_path):
    files = Path(shutil.copytree(sets["both-folder"], tmp_path / "files"))
    os.rename(files / "bear" / "00.png", os.fsencode(files) + b"/bear/\xff.png")
    convert(str(files), tmp_path / "test.beton")
    assert main(["evaluate", str(run), "--test", str(tmp_path / "test.beton")]) == 0
    assert json.loads((run / "evaluation.json").read_text())["data"]["name"] == "files"


def test_a_folder_of_tars_is_encoded_as_other_commands_read_it(run, sets, tmp_path, capsys):
    convert(str(sets["both-folder"]), None, options=ConvertOptions(webdataset=tmp_path / "tars"))
    pattern = tmp_path / "tars" / "images-{000000..000000}.tar"
    for images in (tmp_path / "tars", pattern):
        assert main(["encode", str(run), "--images", str(images)]) == 0
        assert "48 codes" in capsys.readouterr().out
    assert main(["encode", str(run), "--images", str(tmp_path / "none.beton")]) == 2
    assert "none.beton: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe\x80" * 20, b"[]", b""], ids=["no text", "list", "empty"])
def test_damaged_files_of_a_run_are_named(run, sets, capsys, content):
    folder = run / "linear"
    folder.mkdir()
    (folder / "stage.json").write_bytes(content)
    typed = ["linear", str(run), "--test", str(sets["both"])]
    assert main([*typed, "--probe", "sgd", "--epochs", "1"]) == 2
    assert f"{folder / 'stage.json'}: not a result" in capsys.readouterr().err
    (folder / "stage.json").write_text('{"data": 3}')
    assert main([*typed, "--probe", "sgd", "--epochs", "1"]) == 2
    assert f"{folder / 'stage.json'}: damaged (its `data`" in capsys.readouterr().err
    (run / "config.json").write_bytes(content)
    assert main(typed) == 2
    assert f"{run / 'config.json'}: not a run's configuration" in capsys.readouterr().err


def test_numbers_without_names_keep_working(sets, tmp_path, capsys):
    for name in ("train", "bear"):
        shutil.copy(sets[name], tmp_path / f"{name}.beton")  # without their manifests
    train, test = open_pair(tmp_path / "train.beton", tmp_path / "bear.beton")
    assert test.labels.tolist() == [0] * 24 and train.classes is None and not capsys.readouterr().err
    _, test = open_pair(sets["train"], tmp_path / "bear.beton")
    assert test.labels.tolist() == [0] * 24
    assert "has no class names: its class numbers are taken as those of" in capsys.readouterr().err


def test_class_folders_that_are_numbers_are_names(tmp_path):
    def numbers(name, *classes):
        for each in classes:
            folder(tmp_path / "x", "apple", each=2)
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / "x/apple").rename(tmp_path / name / each)
            shutil.rmtree(tmp_path / "x")
        return tmp_path / name

    train, some, other = numbers("train", "0", "1", "2"), numbers("some", "2"), numbers("other", "0", "7")
    assert open_pair(train, some)[1].labels.tolist() == [2, 2]
    with pytest.raises(InputError, match="lacks"):
        open_pair(train, other)
    same = open_reader(some)
    assert numbered_as(same, some, same.classes, "itself") is same


def test_parquets_that_number_their_classes_differently(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(number: int, names: list[str] | None):
        table = pa.table({"image": [b"0", b"1"], "label": [0, 1]})
        if names:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        pq.write_table(table, tmp_path / f"train-{number}.parquet")

    write(0, ["cat", "dog"])
    write(1, ["dog", "cat"])
    opened = open_dataset(str(tmp_path))
    assert [opened.classes[label] for label in opened.labels] == ["cat", "dog", "dog", "cat"]
    write(1, ["dog", "eel"])
    with pytest.raises(InputError, match=r"train-1\.parquet.*lacks \(1\): eel; it has cat, dog"):
        open_dataset(str(tmp_path))
    write(1, None)
    with pytest.raises(InputError, match=r"train-1\.parquet: its labels have no names"):
        open_dataset(str(tmp_path))


# ------------------------------------------------------------ resuming on other data


def settings(data: Path, out: Path):
    return dataclasses.replace(PRESETS["digits"], data=data, out=out, epochs=1, batch_size=16, threads=1)


def test_a_run_is_resumed_on_its_own_set_alone(run, sets, tmp_path):
    pretrain(settings(sets["train"], run), resume=True)
    for suffix in ("", ".json"):  # moved: allowed
        shutil.copy(f"{sets['train']}{suffix}", f"{tmp_path / 'moved.beton'}{suffix}")
    pretrain(settings(tmp_path / "moved.beton", run), resume=True)
    pretrain(settings(sets["train-folder"], run), resume=True)  # the same pixels from their files
    rows = [(path, path.parent.name) for path in sorted(sets["train-folder"].rglob("*.png"))]
    rows[0], rows[-1] = (rows[0][0], "bear"), (rows[-1][0], "apple")
    (tmp_path / "relabelled.csv").write_text("path,label\n" + "".join(f"{p},{c}\n" for p, c in rows))
    for other, what in (
        (folder(tmp_path / "fewer", "apple", "bear", each=10), "it has 20 images, not 48"),
        (sets["both"], "its images or labels differ"),
        (tmp_path / "relabelled.csv", "its images or labels differ"),
    ):
        with pytest.raises(InputError, match=f"isn't the set that .*run was started on .{what}"):
            pretrain(settings(other, run), resume=True)
    with pytest.raises(InputError, match="lacks"):
        pretrain(settings(sets["crow"], run), resume=True)
    assert read_set(run)["images"] == 48


def test_an_older_run_is_resumed_with_a_note(run, sets, capsys):
    config = json.loads((run / "config.json").read_text())
    del config["data"]
    (run / "config.json").write_text(json.dumps(config))
    pretrain(settings(sets["train"], run), resume=True)
    assert "is an older run, which doesn't record the images it was started on" in capsys.readouterr().err


def test_a_stage_goes_on_with_its_own_set_alone(run, sets, tmp_path):
    for suffix in ("", ".json"):
        shutil.copy(f"{sets['train']}{suffix}", f"{tmp_path / 'train.beton'}{suffix}")
    typed = ["linear", str(run), "--train", str(tmp_path / "train.beton"), "--test", str(sets["both"])]
    typed += ["--probe", "sgd", "--epochs", "1"]
    assert main(typed) == 0
    (run / "linear.json").unlink()
    for suffix in ("", ".json"):  # another set under the same name
        shutil.copy(f"{sets['both']}{suffix}", f"{tmp_path / 'train.beton'}{suffix}")
    assert main(typed) == 2
    assert main([*typed, "--overwrite"]) == 0
