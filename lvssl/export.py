"""`lvssl export`: write a run's encoder as files that other software can load.

DIR/model.safetensors   the backbone, with torchvision's names
    head.safetensors    the posterior's head: h -> parameters of the latent
    encoder.onnx        crops uint8 [N, R, R, 3] -> packed codes uint8 [N, bytes], as by `lvssl encode`
    quantisers/         for the codes that `lvssl encode --bits` has fitted
    config.json         timm's format (if timm has the architecture), with what `lvssl.load` needs
    density.safetensors the density for uncertainties, if `lvssl encode` has fitted it
    hubconf.py          for torch.hub.load(DIR, "backbone", source="local")
    README.md           the model card, with the figures in the run's result files
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save
from torch import Tensor

from lvssl.codes.quantiser import Quantiser
from lvssl.evaluation.density import FILE as DENSITY
from lvssl.evaluation.density import stored_density
from lvssl.evaluation.quantisers import chosen_code, fitted_quantiser, own_bits, stored_quantisers
from lvssl.evaluation.stage import in_words
from lvssl.models.backbone import CIFAR_STEM_UP_TO, RESNETS, feature_dim
from lvssl.models.network import LVNet
from lvssl.runs.hub import Upload
from lvssl.runs.result import read_json, require_result
from lvssl.runs.run import Run, image_count, load_run, versions
from lvssl.settings.apply import ExportSettings
from lvssl.settings.fields import to_dict
from lvssl.settings.pretrain import BACKBONES
from pipelines.errors import InputError
from pipelines.files import NO_SPACE
from pipelines.normalise import normalise
from pipelines.order import steps_per_epoch
from pipelines.views import ViewSettings

OPSET = 18


def export(settings: ExportSettings) -> Path:
    """Write the folder, completely or not at all, upload it if requested, and return it.

    Raises InputError: no such run, an existing folder, ONNX requested but not installed, a quantiser that
    isn't fitted yet, or an upload that the Hub refuses (the folder stays).
    """
    if settings.public and not settings.push:
        raise InputError("--public is of the repository that --push creates: pass --push USER/NAME as well")
    if settings.out.exists():
        raise InputError(f"{settings.out} exists: choose another --out")
    if settings.onnx and importlib.util.find_spec("onnxscript") is None:
        raise InputError("encoder.onnx needs onnx and onnxscript: pip install 'lvssl[export]', or --no-onnx")
    run = load_run(settings.run)
    code = chosen_code(run, settings.bits, settings.code)
    bits = settings.bits or own_bits(run)
    quantiser = fitted_quantiser(run, code, bits)
    upload = Upload(settings.push, settings.public) if settings.push else None
    network = run.network.cpu()
    network.precision = torch.float32
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{settings.out.name}.", dir=settings.out.parent))
    try:
        about = {"checkpoint": run.digest, "format": "pt"}
        (aside / "model.safetensors").write_bytes(save(tensors(network.backbone), about))
        if head := head_tensors(network):
            (aside / "head.safetensors").write_bytes(save(head, about))
        (aside / "config.json").write_text(json.dumps(config(run), indent=2) + "\n")
        (aside / "hubconf.py").write_text(hubconf(run))
        if stored_density(run) is not None:
            shutil.copyfile(run.folder / DENSITY, aside / DENSITY)
        for path in stored_quantisers(run):
            (aside / "quantisers").mkdir(exist_ok=True)
            shutil.copyfile(path, aside / "quantisers" / path.name)
        if settings.onnx:
            write_onnx(CodeOf(network, run.settings.view, bits, quantiser), aside / "encoder.onnx")
        form = f"{bits // 8} bytes of opq" if code == "opq" else f"{bits} bits, d in byte d // 8 at d % 8"
        text = card(run, form if settings.onnx else "")  # names of folders may not be text
        (aside / "README.md").write_bytes(text.encode("utf-8", "backslashreplace"))
        for path in (aside, *aside.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(aside, settings.out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            error.filename, error.filename2 = str(settings.out), None
        raise
    if upload is not None:
        upload.send(settings.out)
    return settings.out


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as safetensors requires it: contiguous in memory, without shared tensors."""
    return {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}


def head_tensors(network: LVNet) -> dict[str, Tensor]:
    """Return the weights from h to the posterior's parameters; for site `proj` including the projector."""
    before = tensors(network.projector) if network.latent.site == "proj" else {}
    return {f"projector.{name}": value for name, value in before.items()} | tensors(network.head)


def has_torchvisions_stem(run: Run) -> bool:
    """Return whether the backbone is torchvision's (and timm's) own, without the stem for small images."""
    return run.settings.model.backbone in RESNETS and run.settings.view.resolution > CIFAR_STEM_UP_TO


def is_timms(run: Run) -> bool:
    """Return whether timm has the architecture."""
    return has_torchvisions_stem(run) or run.settings.model.backbone not in BACKBONES


def config(run: Run) -> dict[str, Any]:
    """Return timm's config.json, as `timm.create_model("local-dir:DIR")` reads it; ours is in "lvssl"."""
    settings, view = run.settings, run.settings.view
    features = feature_dim(settings.model.backbone)
    ours = {
        "model": to_dict(settings.model),
        "latent": to_dict(settings.latent),
        "view": to_dict(view),
        "precision": settings.engine.precision,
        "code_bits": own_bits(run),
        "checkpoint": run.digest,
        "step": run.step,
        "versions": versions(),
    }
    pretrained = {
        "input_size": [3, view.resolution, view.resolution],
        "crop_pct": view.evaluation_crop,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": list(view.mean),
        "std": list(view.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    timm: dict[str, Any] = {"architecture": settings.model.backbone} if is_timms(run) else {}
    if settings.model.backbone not in BACKBONES:
        own: Any = run.network.backbone.pretrained_cfg
        pretrained |= {name: own.get(name) for name in ("first_conv", "classifier")}
        timm["model_args"] = model_args(run)
    return timm | {"num_classes": 0, "num_features": features, "pretrained_cfg": pretrained, "lvssl": ours}


def model_args(run: Run) -> dict[str, int]:
    """Return the arguments for timm's model: the side of the images, if the model depends on it."""
    side = run.settings.view.resolution
    sized = getattr(getattr(run.network.backbone, "patch_embed", None), "img_size", None)
    return {"img_size": side} if sized is not None else {}


def hubconf(run: Run) -> str:
    """Return a module for torch.hub; ResNets need torchvision, timm's models timm, small ones lvssl."""
    model, view = run.settings.model, run.settings.view
    if model.backbone in RESNETS:
        needs = "torchvision"
        lines = [f"net = torchvision.models.{model.backbone}()", "net.fc = nn.Identity()"]
        if not has_torchvisions_stem(run):
            lines += ["net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)", "net.maxpool = nn.Identity()"]
    elif is_timms(run):
        sized = "".join(f", {name}={value}" for name, value in model_args(run).items())
        needs, lines = "timm", [f"net = timm.create_model({model.backbone!r}, num_classes=0{sized})"]
    else:
        needs = "lvssl.models.backbone"
        lines = [f"net, _ = lvssl.models.backbone.build_backbone({model.backbone!r}, {view.resolution})"]
    built, package = "\n    ".join(lines), needs.split(".")[0]
    return HUBCONF.format(
        needs=needs, package=package, built=built, side=view.resolution, mean=view.mean, std=view.std
    )


HUBCONF = '''"""torch.hub.load(FOLDER, "backbone", source="local"): images -> features [N, D].

Images are [N, 3, {side}, {side}] in [0, 1], normalised with mean {mean} and standard deviation {std}.
"""

from pathlib import Path

import torch.nn as nn
import {needs}
from safetensors.torch import load_file

dependencies = ["torch", "{package}", "safetensors"]


def backbone(pretrained: bool = True) -> nn.Module:
    """The encoder without its head, in eval mode."""
    {built}
    if pretrained:
        net.load_state_dict(load_file(Path(__file__).with_name("model.safetensors")), strict=True)
    return net.eval()
'''


class CodeOf(nn.Module):
    """Map crops uint8 [N, R, R, 3] to packed codes uint8 [N, ceil(bits / 8)], least significant bit first:
    the first `bits` of the run's own code, or the quantiser's code.

    Images are normalised to exactly the values of `lvssl encode`. Another runtime may round the network's
    sums differently, so a bit whose logit is within fp32's rounding of 0 may differ. For a tiny ResNet whose
    logits have a deviation of 13, this margin is 0.0024, or one bit in 10,000; a byte of a product code may
    differ if its two nearest words are within it. See tests/evaluation/test_one_inference.py.
    """

    def __init__(
        self, network: LVNet, view: ViewSettings, bits: int, quantiser: Quantiser | None = None
    ) -> None:
        super().__init__()
        self.network, self.view, self.bits, self.quantiser = network.eval(), view, bits, quantiser
        self.register_buffer("powers", 2 ** torch.arange(8, dtype=torch.int32))
        for name, array in (asdict(quantiser) if quantiser else {}).items():
            self.register_buffer(name, torch.from_numpy(array))

    def forward(self, crops: Tensor) -> Tensor:
        features, posterior = self.network.encode(normalise(crops, self.view))
        if self.quantiser is None:
            return self.packed(posterior.code()[:, : self.bits])
        mean, scale, projection, words_PWE = map(self.get_buffer, ("mean", "scale", "projection", "words"))
        x = (features - mean) / scale @ projection
        if self.quantiser.hamming:
            return self.packed(x > 0)
        x_PNE = x.unflatten(1, (len(words_PWE), -1)).transpose(0, 1)
        # Squared distances to the words, less the squared norm of x, which is the same for all of them.
        squares_PNW = words_PWE.square().sum(dim=2)[:, None] - 2 * x_PNE @ words_PWE.transpose(1, 2)
        return squares_PNW.argmin(dim=2).T.to(torch.uint8)

    def packed(self, bits: Tensor) -> Tensor:
        padded = nn.functional.pad(bits.to(torch.int32), (0, -self.bits % 8))
        return (padded.unflatten(1, (-1, 8)) * self.get_buffer("powers")).sum(dim=2).to(torch.uint8)


def write_onnx(code: CodeOf, path: Path) -> None:
    """Write the ONNX model from images to packed codes, for any batch size.

    Raises InputError if the installed versions of torch and onnxscript are incompatible.
    """
    side = code.view.resolution
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            code.eval(),
            (example,),
            input_names=["crops"],
            output_names=["codes"],
            dynamic_shapes={"crops": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch, onnxscript and onnx_ir each raise their own
        versions = f"torch {torch.__version__} with onnxscript {metadata.version('onnxscript')}"
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"encoder.onnx: {versions} can't write it ({why}); take newer ones of both, or --no-onnx"
        ) from error
    assert program is not None
    program.save(path)


# ------------------------------------------------------------------- the model card


def card(run: Run, codes: str) -> str:
    """Return README.md: the files, how to load them, and the figures in the run's result files. `codes`
    describes the output of encoder.onnx; "" without it."""
    model, view, latent = run.settings.model, run.settings.view, run.settings.latent
    return CARD.format(
        name=run.folder.resolve().name,
        library="timm" if is_timms(run) else "lvssl",
        backbone=model.backbone,
        family=latent.family,
        features=feature_dim(model.backbone),
        bits=own_bits(run),
        data=run.settings.data.name,
        trained=trained(run),
        batch=run.settings.batch_size,
        seed=run.settings.seed,
        digest=run.digest,
        side=view.resolution,
        crop=view.evaluation_crop,
        mean=view.mean,
        std=view.std,
        loading=loading(run, codes),
        figures=figures(run),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


CARD = """---
library_name: {library}
tags: [self-supervised, contrastive-learning, image-feature-extraction]
---

# {name}

An image encoder trained without labels by latent-variable contrastive learning (lvssl; after *Stochastic
Contrastive Learning*, arXiv 2110.00552): {backbone}, {features} features, latent family `{family}`, codes of
{bits} bits.

- Training: `{data}`, {trained}, batch {batch}, seed {seed}; checkpoint {digest}.
- Input: RGB. The centre square with {crop:g} of the shorter side is cropped and resized to {side} x {side}
  (bilinear, anti-aliased); values in [0, 1] are normalised with mean {mean} and standard deviation {std}.
- Versions: {versions}.

## Loading

{loading}

## Figures

{figures}
"""


def trained(run: Run) -> str:
    """Return how far the checkpoint's training has come: "8 epochs", or where it was interrupted."""
    epochs, images = run.settings.epochs, image_count(run.folder)
    if not images:  # older runs don't record it
        return f"step {run.step:,} of a training of {epochs} epochs"
    per_epoch = steps_per_epoch(images, run.settings.batch_size)
    if run.step >= epochs * per_epoch:
        return f"{epochs} epoch{'s' * (epochs != 1)}"
    done = run.step / per_epoch
    return f"interrupted at step {run.step:,} of {epochs * per_epoch:,}, {done:.1f} of {epochs} epochs"


def loading(run: Run, codes: str) -> str:
    """Return code for each way of loading this backbone; `codes` as in `card`."""
    name = run.settings.model.backbone
    lines = [
        "```python",
        "found = lvssl.load(DIR).encode(images)  # .features, .code, .uncertainty",
        'net = torch.hub.load(DIR, "backbone", source="local")',
    ]
    if is_timms(run):
        lines.append('net = timm.create_model("local-dir:" + DIR, pretrained=True)')
    if has_torchvisions_stem(run):
        lines += [
            f"net = torchvision.models.{name}(); net.fc = torch.nn.Identity()",
            'net.load_state_dict(safetensors.torch.load_file(DIR + "/model.safetensors"))',
        ]
    if codes:
        lines.append("crops = lvssl.load(DIR).crops(images)")
        lines.append(
            'codes = onnxruntime.InferenceSession(DIR + "/encoder.onnx").run(None, {"crops": crops})[0]'
        )
    lines.append("```")
    if codes:
        lines += [
            "",
            f"`crops` are uint8 [N, R, R, 3], not normalised; `codes` are uint8, {codes}. "
            "Crops that other libraries resize may differ by one level in some pixels, and codes in a "
            "few bits.",
        ]
    if name in RESNETS and not has_torchvisions_stem(run):
        lines += [
            "",
            "The network has the stem for small images (3x3, no max-pool), which timm doesn't have.",
        ]
    return "\n".join(lines)


def figures(run: Run) -> str:
    """Return a table of all results of this checkpoint, each with its command."""
    rows = []
    for path in sorted([*run.folder.glob("*.json"), *run.folder.glob("finetune-*/result.json")]):
        result = read_json(path)
        if isinstance(result, dict) and "stage" in result and result.get("checkpoint") == run.digest:
            require_result(path, result)
            for representation, found in result["results"].items():
                share = f", {result['data']['images']:,} labels" if result["stage"] == "finetune" else ""
                what = f"{result['stage']}, {representation}{share}"
                rows.append(f"| {what} | {in_words(found)} | `{result['command']}` |")
    if not rows:
        return "No figures were measured on this checkpoint."
    head = "| what | test images | command |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n\nBrackets: 95 % interval over the test images."
