"""The presets by name: purposes, settings, and differences between two of them."""

from dataclasses import replace
from typing import Any

from lvssl.settings.fields import command_line, flat, runtime, to_dict
from lvssl.settings.pretrain import DEFAULTS, PRESETS, choice
from lvssl.settings.stages import STAGE_PRESETS

ABOUT = {
    "digits": "scikit-learn's digits at 8 px: takes seconds, for tests",
    "fashion-mnist": "greyscale at 28 px: takes minutes on two CPU cores",
    "cifar10-small": "CIFAR-10 with a network small enough for two CPU cores",
    "cifar10-r18": "CIFAR-10, ResNet-18 with the stem for small images",
    "folder-r50": "any folder of photographs at 224 px, on one GPU",
    "simclr-cifar10-r50": "original SimCLR, without a latent, on CIFAR-10 (Chen et al. 2020, B.9)",
    "simclr-imagenet-r50-100ep": "original SimCLR on ImageNet: batch 4,096, LARS (Chen et al. 2020)",
    "simclr-imagenet-r50-200ep": "the same for 200 epochs",
    "simclr-imagenet-r50-800ep": "the same for 800 epochs, as in the published results",
    "bernoulli-cifar10-r50": "SimCLR's recipe on CIFAR-10 with a Bernoulli latent",
    "bernoulli-imagenet-r50-100ep": "SimCLR's recipe on ImageNet with a Bernoulli latent",
    "bernoulli-imagenet-r50-200ep": "the same for 200 epochs",
    "bernoulli-imagenet-r50-800ep": "the same for 800 epochs, as in SimCLR's published results",
    "imagenet-linear": "linear evaluation, 90 epochs (Chen et al. 2020, B.6)",
    "imagenet-finetune": "fine-tuning with 1 %, 10 % or all labels, no search (Chen et al. 2020, B.5)",
}


def command(name: str, settings: Any) -> str:
    """Return the command for these settings, starting from their preset if it is known."""
    if "preset" not in runtime(settings):
        return command_line(name, settings)
    default = PRESETS[DEFAULTS] if name == "pretrain" else None  # without a preset, pretrain would choose one
    start: Any = {**PRESETS, **STAGE_PRESETS}.get(settings.preset, default)
    return command_line(name, replace(settings, preset=start.preset if start else ""), start)


def settings_of(name: str) -> dict[str, Any]:
    """Return every setting of a preset as JSON values. Raises InputError listing the known names."""
    known = {**PRESETS, **STAGE_PRESETS}
    choice("preset", name, tuple(known))
    return {key: value for key, value in to_dict(known[name]).items() if key != "run"}  # which users choose


def listing() -> str:
    """Return a line for each preset."""
    lines, width = [], max(map(len, ABOUT))
    for name, preset in PRESETS.items():
        size = f"{preset.model.backbone}, {preset.view.resolution} px, {preset.epochs} epochs"
        lines.append(f"{name:{width}} pretrain  {size:34} {ABOUT[name]}")
    for name, stage in STAGE_PRESETS.items():
        epochs = f"{vars(stage)['epochs']} epochs"
        kind = type(stage).__name__.removesuffix("Settings").lower()
        lines.append(f"{name:{width}} {kind:9} {epochs:34} {ABOUT[name]}")
    return "\n".join(lines)


def difference_of(a: str, b: str) -> str:
    """Return the settings in which two presets differ, one per line."""
    first, second = flat(settings_of(a)), flat(settings_of(b))
    names = [name for name in {**first, **second} if name != "preset" and first.get(name) != second.get(name)]
    if not names:
        return f"{a} and {b} have the same settings"
    rows = [("", a, b), *((name, _text(first, name), _text(second, name)) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{n:{widths[0]}}  {x:{widths[1]}}  {y}".rstrip() for n, x, y in rows)


def _text(values: dict[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "-"
