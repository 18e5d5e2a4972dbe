"""`lvssl pretrain` without a preset: what is chosen for images and device, and that it is said and kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvssl.commands.main import main
from lvssl.commands.suggest import in_words, suited
from lvssl.models.device import multiplies_bf16, note_if_slow
from lvssl.plan import GIB
from lvssl.runs.run import read_config
from lvssl.settings.presets import command
from lvssl.settings.pretrain import EngineSettings
from pipelines.convert.conversion import ConvertOptions, Settings, convert


@pytest.mark.parametrize(
    ("count", "side", "memory", "expected"),
    [
        (2150, 32, 0, ("cifar10-small", 32, 128, 19)),  # 16 steps an epoch, some 300 in all
        (1604, 480, 0, ("cifar10-small", 32, 64, 12)),
        (60_000, 28, 0, ("cifar10-small", 28, 256, 5)),
        (300, 375, 0, ("cifar10-small", 32, 64, 75)),
        (10, 375, 0, ("cifar10-small", 32, 8, 100)),
        (1, 4, 0, ("cifar10-small", 8, 2, 100)),  # refused later, for there are no two images
        (50_000, 32, 80 * GIB, ("cifar10-r18", 32, 256, 200)),
        (50_000, 64, 80 * GIB, ("cifar10-r18", 64, 256, 200)),
        (50_000, 375, 80 * GIB, ("folder-r50", 224, 256, 100)),
        (50_000, 375, 16 * GIB, ("folder-r50", 224, 128, 100)),
    ],
)
def test_what_is_chosen(count, side, memory, expected):
    chosen = suited(count, side, memory)
    assert (chosen.preset, chosen.view.resolution, chosen.batch_size, chosen.epochs) == expected
    chosen.validate()


def test_a_cpu_that_multiplies_bf16_trains_resnets_in_it():
    """Depthwise convolutions are slower in it, and a GPU chooses by itself."""
    chosen = {
        name: suited(2000, 32, 0, name, bf16=True).engine.precision
        for name in ("", "tiny", "resnet50", "convnext_tiny", "efficientnet_b0", "vit_small_patch16_224")
    }
    assert chosen == dict.fromkeys(chosen, "auto") | dict.fromkeys(("", "tiny", "resnet50"), "bf16")
    assert (
        suited(2000, 32, 0).engine.precision
        == suited(2000, 32, 16 * GIB, bf16=True).engine.precision
        == "auto"
    )


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_cpu_that_converts_it_is_noted(digits, tmp_path, monkeypatch, capfd, native):
    monkeypatch.setattr("lvssl.models.device.multiplies_bf16", lambda: native)
    options = ["--data", str(digits["test"]), "--out", str(tmp_path / "run"), "--device", "cpu"]
    small = ["--preset", "digits", "--epochs", "1", "--batch-size", "256", "--precision", "bf16"]
    assert main(["pretrain", *options, *small]) == 0
    noted = "2 to 10 times as long as fp32: begin anew with --precision fp32"
    assert (noted in capfd.readouterr().err) != native
    given = ["--train", str(digits["test"]), "--test", str(digits["test"]), "--epochs", "1"]
    for stage in (
        ["finetune", "--min-steps", "0", "--lr", "0.1", "--weight-decay", "0"],
        ["linear", "--probe", "sgd"],
    ):
        assert main([stage[0], str(tmp_path / "run"), *stage[1:], *given, "--device", "cpu"]) == 0
        assert capfd.readouterr().err.count(noted) == (not native), stage


def test_a_gpu_that_is_left_out_is_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lvssl.models.device.GPU", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for asked, kind, noted in (("auto", "cpu", True), ("cpu", "cpu", False), ("auto", "cuda", False)):
        note_if_slow(asked, EngineSettings(), torch.device(kind))
        assert ("an NVIDIA GPU, which torch can't use" in capsys.readouterr().err) == noted, (asked, kind)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    note_if_slow("auto", EngineSettings(), torch.device("cpu"))
    assert not capsys.readouterr().err


def test_a_model_that_normalises_by_layer_gets_its_recipe():
    resnets, tiny = (suited(50_000, 375, 80 * GIB, name) for name in ("", "resnet34"))
    assert tiny.optimiser == resnets.optimiser and tiny.model.backbone == "resnet34"
    for name, resolution in (
        ("vit_tiny_patch16_224", 32),
        ("convnext_atto", 28),
        ("vit_small_patch14_dinov2", 28),
    ):
        chosen = suited(60_000, 28, 0, name)
        chosen.validate()
        optimiser = chosen.optimiser
        assert (chosen.model.backbone, chosen.view.resolution) == (name, resolution)
        assert (optimiser.optimiser, optimiser.lr, optimiser.weight_decay) == ("adamw", 5e-4, 0.05)
        assert (optimiser.warmup_epochs, optimiser.clip) == (0.5, 1.0)  # of 5 epochs
        assert "--weight-decay 0.05 --clip 1.0 --warmup-epochs 0.5" in in_words(chosen, "images")
    large = suited(50_000, 375, 80 * GIB, "vit_tiny_patch16_224")
    assert (large.view.resolution, large.batch_size, large.optimiser.warmup_epochs) == (224, 256, 10.0)
    assert suited(50_000, 375, 80 * GIB, "vit_tiny_patch16_224", 30).optimiser.warmup_epochs == 3.0


def test_a_run_without_a_preset_says_what_was_chosen_and_is_made_again_by_its_command(tmp_path, capsys):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes()[:20])  # has no size to be read
    options = ["--data", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "2"]
    small = ["--backbone", "tiny", "--hidden", "16", "--epochs", "1", "--on-error", "skip"]
    assert main(["pretrain", *options, *small]) == 0
    said = capsys.readouterr().err
    assert "for 8 images of 20 px on " in said
    flags = "--preset cifar10-small --objective ntxent-vc --resolution 20 --batch-size 8 --epochs 1"
    assert f"{flags} --workers 2 --precision {'bf16' if multiplies_bf16() else 'fp32'}" in said
    settings, _ = read_config(tmp_path / "run")
    assert settings.preset == "cifar10-small" and settings.view.resolution == 20
    typed = command("pretrain", settings)
    assert "--preset cifar10-small" in typed and "--resolution 20" in typed and "--batch-size 8" in typed
    before = json.loads((tmp_path / "run/config.json").read_text())
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "for 8 images" not in capsys.readouterr().err  # a run goes on with what it was begun with
    assert json.loads((tmp_path / "run/config.json").read_text()) == before


def test_a_set_of_many_files_or_by_name_is_looked_at_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in (1, 2):
        convert("sklearn:digits", Path("d.beton"), Settings(subset=40), options=ConvertOptions(shard=(k, 2)))
    for data in ("d.part-*.beton", "sklearn:digits"):
        options = ["--device", "cpu", "--batch-size", "2000"]  # refused, before any work
        assert main(["pretrain", "--data", data, "--out", "run", *options]) == 2
        assert "--preset cifar10-small --objective ntxent-vc --resolution 8" in capsys.readouterr().err


def test_train_beton_is_looked_at_without_being_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert("sklearn:digits", Path("train.beton"), Settings(subset=40))
    assert main(["pretrain", "--out", "run", "--device", "cpu", "--batch-size", "2000"]) == 2
    assert "--preset cifar10-small --objective ntxent-vc --resolution 8" in capsys.readouterr().err


def test_the_help_looks_at_no_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--data", str(tmp_path / "empty"), "--help"])
    assert ended.value.code == 0 and "Without --preset, preset, resolution," in " ".join(
        capsys.readouterr().out.split()
    )
