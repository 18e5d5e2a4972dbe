"""timm's models as backbones, and weights to start from; `test_vit` and `test_convnext` are its smallest."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from test_export import made_run

import lvssl as library
from lvssl.commands.main import main
from lvssl.models.backbone import build_backbone
from lvssl.plan import plan
from lvssl.runs.initial import initial_weights
from lvssl.runs.run import load_run
from lvssl.settings.pretrain import ModelSettings
from lvssl.settings.start import PlanSettings
from pipelines.errors import InputError


def pretrained(digits, out: Path, *more: object) -> Path:
    small = ["--preset", "digits", "--data", digits["train"], "--out", out, "--epochs", 1, "--device", "cpu"]
    assert main(["pretrain", *map(str, [*small, "--workers", 2, "--threads", 1, *more])]) == 0
    return out


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_of_timm_trains_and_goes_back_to_timm(name, digits, tmp_path, monkeypatch):
    run = pretrained(digits, tmp_path / "run", "--backbone", name, "--resolution", 32, "--family", "none")
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--no-onnx"]) == 0
    network, images = load_run(run).network.backbone, torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))
    for model in (
        timm.create_model(f"local-dir:{out}", pretrained=True).eval(),
        torch.hub.load(str(out), "backbone", source="local"),
    ):
        assert torch.allclose(model(images), network(images), rtol=1e-4, atol=1e-5)
    assert "library_name: timm\n" in (out / "README.md").read_text()
    codes = [library.load(folder).encode(digits["test"]).code for folder in (run, out)]
    assert (codes[0] == codes[1]).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_known_models_give_their_features_and_have_a_plan(name):
    backbone, dim = build_backbone(name, 64)
    assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, dim)
    assert f"{name} at 64 px" in plan(PlanSettings(backbone=name, resolution=64, batch_size=64, gpus=1))


def test_what_does_not_fit_is_refused_before_anything_is_written(digits, tmp_path, capsys):
    begin = ["pretrain", "--preset", "digits", "--data", str(digits["train"]), "--out", str(tmp_path / "run")]
    for more, said in (
        (["--backbone", "vit_smal_patch16_224"], "such as vit_small_patch16_224"),
        (["--backbone", "inception_v3"], "--backbone inception_v3 doesn't take images of 8 px"),
        (
            ["--backbone", "vit_tiny_patch16_224", "--resolution", "40"],
            "of its patch size, 16 px, not 40",
        ),
        (["--backbone", "test_vit", "--recompute"], "--recompute only supports ResNets, not test_vit"),
        (["--init", "gone.safetensors"], "--init gone.safetensors: no such file"),
        (["--init", "pretrained"], "there are no pretrained weights of tiny"),
        (["--init", "hf://a/b/c"], "hf://a/b/c: "),
        (["--init", str(digits["train"])], f"--init {digits['train']}: "),
    ):
        assert main([*begin, *more]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_a_run_starts_from_another(digits, tmp_path):
    first = made_run(tmp_path / "first", "digits", "tiny")
    more = ("--lr", 1e-9, "--weight-decay", 0, "--seed", 1)  # without --init, seed 0 would give its weights
    then = pretrained(digits, tmp_path / "then", "--init", first, *more)
    pairs = zip(*(load_run(run).network.backbone.named_parameters() for run in (first, then)))
    assert all(torch.allclose(own, other, atol=1e-6) for (_, own), (_, other) in pairs)
    assert main(["export", str(first), "--out", str(tmp_path / "out"), "--no-onnx"]) == 0
    of_export, of_run = (
        initial_weights(ModelSettings("tiny", init=str(path)), 8) for path in (tmp_path / "out", first)
    )
    assert of_export.keys() == of_run.keys() and all(torch.equal(of_export[n], of_run[n]) for n in of_run)


@pytest.mark.parametrize("before", ["", "module.encoder.", "backbone."])
@pytest.mark.parametrize("form", ["safetensors", "pth", "nested.pth"])
def test_weights_of_other_programs(before, form, tmp_path):
    state = torchvision.models.resnet18().state_dict()  # with its classifier, which is left out
    renamed, path = {before + name: value for name, value in state.items()}, tmp_path / f"w.{form}"
    if form == "safetensors":
        save_file(renamed, path)
    else:
        torch.save({"state_dict": renamed, "epoch": 3} if form == "nested.pth" else renamed, path)
    found = initial_weights(ModelSettings("resnet18", init=str(path)), 96)
    assert found.keys() == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    with pytest.raises(InputError, match=r"conv1.weight is \[64, 3, 7, 7\], not \[64, 3, 3, 3\]"):
        initial_weights(ModelSettings("resnet18", init=str(path)), 32)
    with pytest.raises(InputError, match="doesn't fit resnet34: it lacks"):
        initial_weights(ModelSettings("resnet34", init=str(path)), 96)


def test_a_transformers_weights_go_to_another_resolution_as_timm_takes_them(tmp_path):
    made = timm.create_model("test_vit", img_size=96)  # with its classifier, which is left out
    torch.save(made.state_dict(), tmp_path / "w.pth")
    model = ModelSettings("test_vit", init=str(tmp_path / "w.pth"))
    overlay = {"file": str(tmp_path / "w.pth"), "num_classes": 1000}
    expected = timm.create_model("test_vit", True, img_size=64, num_classes=0, pretrained_cfg_overlay=overlay)
    found = initial_weights(model, 64)
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name
    assert torch.equal(initial_weights(model, 96)["pos_embed"], made.pos_embed)


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"conv1.weight": Dangerous()}))
    with pytest.raises(InputError, match=r"--init w.pth: "):
        initial_weights(ModelSettings("resnet18", init="w.pth"), 96)
    assert not (tmp_path / "touched").exists()


def test_other_names_and_code_in_a_file_are_one_line(tmp_path):
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    torch.save({"code": Path.cwd}, tmp_path / "code.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save(torch.zeros(2), tmp_path / "one.pth")
    for name, said in (
        ("numbers", "it lacks 54 of 54"),
        ("code", "which aren't loaded"),
        ("list", r"holds a list, not a dictionary of tensors by name; save the state_dict\(\)"),
        ("one", "holds a Tensor, not a dictionary"),
    ):
        with pytest.raises(InputError, match=f"{name}.pth.*{said}"):
            initial_weights(ModelSettings("tiny", init=str(tmp_path / f"{name}.pth")), 8)


def test_a_part_of_a_first_checkpoint_does_not_stand_for_one(digits, tmp_path):
    first, out = pretrained(digits, tmp_path / "first"), tmp_path / "out"
    more = ("--init", first, "--lr", 1e-9, "--weight-decay", 0)
    pretrained(digits, out, *more)
    for path in (out / "checkpoints").iterdir():
        path.rename(path.with_name(f".{path.name}.machine-1-0.partial"))  # as a kill leaves it
    (out / "metrics.jsonl").unlink()
    pretrained(digits, out, *more, "--resume")
    found, there = (initial_weights(ModelSettings("tiny", init=str(path)), 8) for path in (out, first))
    assert torch.allclose(found["0.weight"], there["0.weight"], atol=1e-5)
