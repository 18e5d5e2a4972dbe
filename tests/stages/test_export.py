"""What is exported loads elsewhere, strictly, and computes the same."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from lvssl.commands.main import main
from lvssl.evaluation.outputs import network_outputs
from lvssl.models.network import LVNet
from lvssl.runs import checkpoint
from lvssl.runs.run import create_run, load_run
from lvssl.settings.pretrain import PRESETS, ModelSettings
from pipelines.kernels.pack import pack_bits

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx isn't installed: pip install 'lvssl[export]'",
)


def made_run(
    folder: Path, preset: str, backbone: str, family: str = "bernoulli", dim: int = 0, side: int = 0
) -> Path:
    """A run of untrained weights whose statistics are not those that any fresh network has."""
    base = PRESETS[preset]
    latent = dataclasses.replace(base.latent, family=family, dim=dim)
    view = dataclasses.replace(base.view, resolution=side or base.view.resolution)
    model = ModelSettings(backbone, 32, 16)
    settings = dataclasses.replace(base, out=folder, model=model, latent=latent, view=view)
    create_run(settings, 0, resume=False)
    torch.manual_seed(0)
    network = LVNet(settings.model, settings.latent, settings.view.resolution)
    with torch.no_grad():
        mean, std = (torch.tensor(x) for x in (settings.view.mean, settings.view.std))
        images = (torch.from_numpy(crops(settings.view.resolution, 8)) / 255 - mean) / std
        images = images.permute(0, 3, 1, 2)
        for _ in range(3):
            network.train().backbone(images)
        features = network.eval().backbone(images)
        network.head.calibrate(features)
    checkpoint.save(folder / "checkpoints", 7, {"network": network.state_dict(), "step": 7})
    return folder


def crops(side: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> tuple[Path, Path]:
    """A run of ResNet-50 with ImageNet's stem, at 96 px for speed, and its export without ONNX."""
    folder = tmp_path_factory.mktemp("r50")
    run = made_run(folder / "run", "folder-r50", "resnet50", side=96)
    assert main(["export", str(run), "--out", str(folder / "out"), "--no-onnx"]) == 0
    return run, folder / "out"


@torch.no_grad()
def test_resnet50_loads_strictly_into_torchvision_timm_and_torch_hub(photographs, tmp_path, monkeypatch):
    run, out = photographs
    encoder = load_run(run).network.backbone
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = encoder(images)

    by_torchvision = torchvision.models.resnet50()
    by_torchvision.fc = torch.nn.Identity()
    by_torchvision.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))
    models = {
        "torchvision": by_torchvision.eval(),
        "timm, checkpoint": timm.create_model(
            "resnet50", num_classes=0, checkpoint_path=out / "model.safetensors"
        ).eval(),
        "timm, folder": timm.create_model(f"local-dir:{out}", pretrained=True).eval(),
        "torch.hub": torch.hub.load(str(out), "backbone", source="local"),
    }
    for name, model in models.items():
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-5), name
    data = timm.data.resolve_data_config({}, model=models["timm, folder"])
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406) and data["crop_pct"] == 0.875
    assert tuple(data["input_size"]) == (3, 96, 96) and data["interpolation"] == "bilinear"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["checkpoint"] == load_run(run).digest


def test_a_full_torchvision_classifier_lacks_its_last_layer_alone(photographs):
    model = torchvision.models.resnet50()
    missing = model.load_state_dict(load_file(photographs[1] / "model.safetensors"), strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"] and not missing.unexpected_keys


@torch.no_grad()
@pytest.mark.parametrize("preset, backbone", [("cifar10-r18", "resnet18"), ("digits", "tiny")])
def test_small_images_backbones_load_through_torch_hub(tmp_path, monkeypatch, preset, backbone):
    run = made_run(tmp_path / "run", preset, backbone)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--no-onnx"]) == 0
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))
    model = torch.hub.load(str(tmp_path / "out"), "backbone", source="local")
    side = PRESETS[preset].view.resolution
    images = torch.randn(3, 3, side, side)
    assert torch.allclose(model(images), load_run(run).network.backbone(images), rtol=1e-5, atol=1e-6)
    assert "architecture" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "timm.create_model" not in (tmp_path / "out" / "README.md").read_text()


def skip_where_the_exporter_is_at_fault(path: Path) -> None:
    """Skip if torch can't even write a convolution and its batch norm; torch 2.6 with onnx_ir 1.1 can't."""
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    try:
        torch.onnx.export(plain, (torch.zeros(1, 3, 8, 8),), str(path), dynamo=True, verbose=False)
    except Exception as error:
        pytest.skip(f"torch {torch.__version__} can't write a batch norm as ONNX: {type(error).__name__}")


@needs_onnx
@pytest.mark.parametrize(
    "preset, backbone, family, dim",
    [
        ("digits", "tiny", "bernoulli", 13),  # a length that isn't a whole number of bytes
        pytest.param("cifar10-r18", "resnet18", "bernoulli", 0, marks=pytest.mark.slow),
        *(
            pytest.param("digits", "tiny", family, dim, marks=pytest.mark.slow)
            for family, dim in [
                ("none", 0), ("sign", 0), ("gaussian", 24), ("laplace", 24), ("categorical", 32),
                ("beta", 24), ("mixture", 12), ("vmf", 12), ("power_spherical", 12),
                ("gaussian+bernoulli", 20), ("categorical+vmf", 64), ("beta+mixture", 20),
            ]
        ),
    ],
)  # fmt: skip
def test_onnx_gives_the_bits_that_encode_gives(tmp_path, capsys, preset, backbone, family, dim):
    import onnxruntime

    run = made_run(tmp_path / "run", preset, backbone, family, dim)
    status = main(["export", str(run), "--out", str(tmp_path / "out")])
    if status:
        assert status == 2 and "can't write it" in capsys.readouterr().err
        skip_where_the_exporter_is_at_fault(tmp_path / "plain.onnx")
    assert status == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"))
    for count in (1, 40):
        images = crops(PRESETS[preset].view.resolution, count)
        codes = session.run(None, {"crops": images})[0]
        loaded = load_run(run)
        expected = pack_bits(network_outputs(loaded.network, images, loaded.settings.view).bits)
        assert codes.dtype == np.uint8 and codes.shape == expected.shape
        differing = np.unpackbits(codes ^ expected).sum()
        # Only a logit within rounding of its threshold may fall on the other side.
        assert differing <= 2e-4 * 8 * codes.size, f"{differing} of {8 * codes.size} bits"
    spread = np.unpackbits(codes, axis=1).std(axis=0)
    assert (spread > 0).mean() > 0.5, "codes that are all the same would prove nothing"


def test_the_head_and_the_card_with_the_runs_figures(run, tmp_path):
    assert main(["linear", str(run)]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--no-onnx"]) == 0
    head = load_run(run).network.head
    loaded = load_file(tmp_path / "out" / "head.safetensors")
    assert loaded.keys() == head.state_dict().keys() and len(loaded) > 0
    assert all(torch.equal(loaded[name], value) for name, value in head.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((run / "linear.json").read_text())
    assert f"top-1 {result['results']['features']['top1']:.2f} %" in card and result["command"] in card
    assert load_run(run).digest in card
    (run / "linear.json").write_text(json.dumps(result | {"checkpoint": "of another"}))
    assert main(["export", str(run), "--out", str(tmp_path / "again"), "--no-onnx"]) == 0
    assert "No figures were measured on this checkpoint" in (tmp_path / "again" / "README.md").read_text()


def card_of(run: Path, out: Path) -> str:
    assert main(["export", str(run), "--out", str(out), "--no-onnx"]) == 0
    return (out / "README.md").read_text()


def test_a_card_says_how_far_an_interrupted_training_came(run, tmp_path):
    assert "`train.beton`, 6 epochs, batch 128" in card_of(run, tmp_path / "whole")
    state = checkpoint.load_latest(run / "checkpoints")[1]
    config = json.loads((run / "config.json").read_text())
    steps = config["data"]["images"] // 128
    checkpoint.save(run / "checkpoints", 6 * steps + 1, state | {"step": 3 * steps})
    said = f"interrupted at step {3 * steps} of {6 * steps}, 3.0 of 6 epochs"
    assert said in card_of(run, tmp_path / "half")
    (run / "config.json").write_text(json.dumps(config | {"data": None}))
    assert f"step {3 * steps} of a training of 6 epochs" in card_of(run, tmp_path / "older")


def test_a_card_names_the_library_that_loads_the_encoder(run, photographs, tmp_path):
    assert "library_name: timm\n" in (photographs[1] / "README.md").read_text()
    assert "library_name: lvssl\n" in card_of(run, tmp_path / "out")


def test_a_run_whose_name_is_no_text_is_exported(run, tmp_path):
    named = tmp_path / "b\udcff"
    shutil.copytree(run, named, ignore=shutil.ignore_patterns("features"))
    assert "# b\\udcff\n" in card_of(named, tmp_path / "out")


def test_public_needs_a_repository(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--no-onnx", "--public"]) == 2
    assert "pass --push USER/NAME as well" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_nothing_is_left(run, small_disk, fill, capsys):
    fill()
    assert main(["export", str(run), "--out", str(small_disk / "export"), "--no-onnx"]) == 1
    assert capsys.readouterr().err == f"error: {small_disk / 'export'}: No space left on device\n"
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_nothing_is_overwritten_and_nothing_half_written_is_left(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert main(["export", str(run), "--out", str(tmp_path / "there")]) == 2
    assert "there exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lvssl.export.card", full)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--no-onnx"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
