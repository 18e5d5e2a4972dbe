"""Stages on sets that aren't a sound .beton: damaged images, tables with numbers, files as they are."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_folders import make_folders, sound
from PIL import Image

from lvssl.commands.main import main
from lvssl.evaluation.finetune import finetune
from lvssl.evaluation.linear import linear
from lvssl.evaluation.nearest import knn
from lvssl.evaluation.sets import labelled_pair
from lvssl.evaluation.study import study
from lvssl.runs.identity import SAMPLED, same_images
from lvssl.runs.labels import Subset, open_labelled, readable
from lvssl.runs.run import load_run
from lvssl.settings.measure import StudySettings
from lvssl.settings.pretrain import PRESETS
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, TwoViewLoader

SHORT = ["--epochs", "1", "--min-steps", "0", "--lr", "0.1", "--weight-decay", "0"]


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory) -> dict[str, Path]:
    return make_folders(digits, tmp_path_factory.mktemp("folders"))


def test_a_damaged_image_stops_every_stage_unless_it_is_to_be_skipped(run, folders, capsys):
    for stage in (["linear"], ["knn"], ["finetune", *SHORT]):
        arguments = [*stage[:1], str(run), *stage[1:], "--train", str(folders["train"]), "--test"]
        assert main([*arguments, str(folders["test"])]) == 2
        assert "can't be decoded" in (said := capsys.readouterr().err) and "Traceback" not in said
        assert main([*arguments, str(folders["test"]), "--on-error", "skip", "--overwrite"]) == 0, stage
        said = capsys.readouterr().err
        where = f"{folders['test']}: 2 of 60 images can't be decoded and are left out; the first is sample 0"
        assert where in said, stage
        trained = "replacements of damaged samples (3 distinct)"
        assert (trained if stage[0] == "finetune" else "3 of 200 images") in said
        name = {"finetune": "finetune-1.0/result.json"}.get(stage[0], f"{stage[0]}.json")
        result = json.loads((run / name).read_text())
        assert result["settings"]["on_error"] == "skip" and "--on-error skip" in result["command"]
        assert result["results"]["features"]["count"] == 58 and result["data"]["test_images"] == 60


def test_what_is_left_out_changes_nothing_else(run, folders):
    """The figures are those of the same folders without the damaged files."""
    whole = {split: sound(folder) for split, folder in folders.items()}
    for stage, settings in ((knn, KnnSettings), (linear, LinearSettings)):
        skipping = stage(settings(run, **folders, on_error="skip", out=run / f"{stage.__name__}-a.json"))
        without = stage(settings(run, **whole, out=run / f"{stage.__name__}-b.json"))
        assert skipping.done["results"] == without.done["results"]


def test_one_of_two_ranks_does_the_exact_stages_and_the_other_leaves(run, monkeypatch):
    """No process group is opened, so that none can time out while the first works on."""
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for stage, settings in ((knn, KnnSettings(run)), (linear, LinearSettings(run))):
        assert stage(settings).done is None and not torch.distributed.is_initialized()
    assert not (run / "knn.json").exists() and not (run / "linear.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert knn(KnnSettings(run)).done is not None and not torch.distributed.is_initialized()


def test_a_subset_names_damaged_images_by_its_own_positions(folders):
    """The loader puts the next image of the part in its place; by the whole set's position it never would."""
    data = open_labelled(folders["train"], on_error="skip").only(np.array([70, 3, 4, 77, 90]))
    view = PRESETS["digits"].view
    with TwoViewLoader(data.source, view, LoaderSettings(5, workers=1, on_error="skip", views=1)) as loader:
        (batch,) = loader
    assert set(batch.indices.tolist()) == {0, 4} and loader.skipped == 3
    found = [rows.tolist() for _, rows in readable(data.source, view, on_error="skip")]
    assert found == [[0, 4]]
    assert [r.tolist() for _, r in readable(data.source, view, 1, "skip", np.array([4, 1, 0]))] == [[4, 0]]
    with pytest.raises(InputError, match="can't be decoded"):
        list(readable(data.source, view))


@pytest.fixture(scope="module")
def tables(digits, tmp_path_factory) -> dict[str, Path]:
    """The mean grey level of images' upper halves, in a table of paths."""
    root, found = tmp_path_factory.mktemp("tables"), {}
    for split, count in (("train", 300), ("test", 100)):
        source, rows = open_reader(digits[split]), []
        (root / split).mkdir()
        for i in range(count):
            pixels = source.encoded(0, i)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            rows.append(f"{split}/{i}.png,{pixels[:4].mean():.4f}")
        found[split] = root / f"{split}.csv"
        found[split].write_text("path,top\n" + "\n".join(rows) + "\n")
    return found


def test_a_tables_numbers_are_regressed_without_conversion(run, tables, tmp_path):
    """As those of the .beton made of it, and of tars with their index."""
    given = {"target": "top", "workers": 1}
    straight = linear(LinearSettings(run, train=tables["train"], **given)).done  # test.csv lies beside it
    assert straight["results"]["features"]["targets"]["top"]["r2"] > 0.5
    betons, tars = {}, {}
    for split, table in tables.items():
        betons[split], tars[split] = tmp_path / f"{split}.beton", tmp_path / split
        convert(str(table), betons[split], Settings(targets=["top"]), ConvertOptions(webdataset=tars[split]))
    for name, sets in (("beton", betons), ("tars", tars)):
        other = linear(LinearSettings(run, **sets, **given, out=run / f"{name}.json")).done
        assert other["results"] == straight["results"], name
    with pytest.raises(InputError, match="no float target 'age'; its targets: top"):
        knn(KnnSettings(run, train=tables["train"], target="age"))


def test_a_source_that_cannot_read_the_set_is_refused(run, folders, digits, capsys):
    assert main(["knn", str(run), "--source", "folder"]) == 2
    assert ".beton can only be read by --source beton or auto" in capsys.readouterr().err
    assert main(["knn", str(run), "--source", "zip"]) == 2
    assert "unknown source 'zip'; known: auto" in capsys.readouterr().err
    assert main(["linear", str(run), "--on-error", "ignore"]) == 2
    assert "unknown on_error 'ignore'" in capsys.readouterr().err
    sets = ["--train", str(digits["train"]), "--test", str(digits["test"])]
    assert main(["knn", str(run), "--source", "beton", *sets]) == 0
    assert main(["knn", str(run), *sets]) == 0, "another reader is no other work"


def test_test_images_that_are_the_training_images_are_noted(run, digits, tmp_path, capsys):
    copied = Path(shutil.copy(digits["train"], tmp_path / "test.beton"))
    for test, expected in ((copied, 1), (digits["test"], 0)):
        for measure in (
            lambda test=test: knn(KnnSettings(run, test=test, out=tmp_path / f"{test.parent.name}.json")),
            lambda test=test: labelled_pair(load_run(run), None, None, test),
            lambda test=test: study(StudySettings(digits["train"], test, "digits", ood=(tmp_path / "none",))),
        ):
            with suppress(InputError):  # of the study, at its other images
                measure()
            assert capsys.readouterr().err.count("the test images are the training images") == expected


def test_other_images_are_told_by_the_first(digits):
    """Large PNGs take half a second each, and nothing is printed meanwhile."""

    class Counting(Subset):
        reads = 0

        def encoded(self, row, index):
            Counting.reads += 1
            return super().encoded(row, index)

    source = open_reader(digits["train"])
    one, other = (Counting(source, rows) for rows in (np.arange(1, 300), np.arange(299)))
    assert same_images(one, one) and Counting.reads == 2 * SAMPLED
    assert not same_images(one, other) and Counting.reads == 2 * SAMPLED + 2


def test_what_takes_long_says_how_far_it_is(run, monkeypatch, capsys):
    monkeypatch.setattr("lvssl.runs.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("lvssl.runs.progress.FIRST_LINE_AFTER", 0.0)
    knn(KnnSettings(run))
    said = capsys.readouterr().err
    assert "knn: train.beton: image 1297/1297" in said and "knn: votes by features: image 500/500" in said
    shutil.rmtree(run / "features")
    linear(LinearSettings(run))
    said = capsys.readouterr().err
    assert "linear: test.beton: image 500/500" in said and "linear: fits of the probe: image" in said
    finetune(FinetuneSettings(run, label_fraction=0.1, epochs=1, min_steps=0, lr=(0.1,), weight_decay=(0.0,)))
    assert "finetune: test.beton: image 500/500" in capsys.readouterr().err
