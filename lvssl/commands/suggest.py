"""Choose the settings of `lvssl pretrain` without a preset, from the images and the device.

    images (median of the shorter sides)   on a CPU                     on a GPU
    up to 64 px                            cifar10-small, up to 32 px   cifar10-r18, 32 or 64 px
    larger                                 cifar10-small, 32 px         folder-r50, 224 px

Batch sizes are the preset's, halved as long as an epoch has fewer than 16 steps, down to 64, and as far as
the number of images or a GPU's memory requires. A CPU trains for some 300 steps, as in docs/results.md; a GPU
as long as the preset. A CPU that multiplies bf16 numbers trains ResNets in bf16 (docs/training.md). A
`--backbone` with layer normalisation, a transformer or ConvNeXt, is trained with a recipe for these, at a
multiple of its patch size.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvssl.models.backbone import RESNETS, SMALL, of_layers, patch
from lvssl.models.device import multiplies_bf16, pick_device, precision
from lvssl.plan import GIB, footprint, largest_batch
from lvssl.settings.fields import options
from lvssl.settings.pretrain import DEFAULTS, PretrainSettings, preset, require_backbone
from lvssl.settings.start import of_pretraining
from pipelines.cores import cores, loader_threads
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import DamagedSample, Reader, open_reader

SMALL_SIDE = 64  # ResNets use the stem for small images up to this many pixels
LOOKED_AT = 256  # number of images whose sizes are read
STEPS, MOST_EPOCHS, LEAST_EPOCHS = 300, 100, 5  # of a training on a CPU
STEPS_AN_EPOCH, LEAST_BATCH = 16, 64
# Transformers' recipe: weight decay of DeiT and ConvNeXt, learning rate of DINO for 256 images.
OF_LAYERS: dict[str, Any] = {"optimiser": "adamw", "lr": 5e-4, "weight_decay": 0.05, "clip": 1.0}
WARMUP = 0.1  # share of the epochs in that recipe


def suggest(data: Path, source: str, device: str, backbone: str, epochs: int) -> tuple[PretrainSettings, str]:
    """Return settings to start from, and a description of what they were chosen for. `backbone` and `epochs`
    are those given by the user, if any.

    Raises:
        InputError: no images there, no such device, or no such backbone.
    """
    if backbone:
        require_backbone(backbone)
    chosen = pick_device(device)
    memory = torch.cuda.get_device_properties(chosen).total_memory if chosen.type == "cuda" else 0
    images = open_reader(data, source, str(chosen))
    side = median_side(images)
    where = f"{cores()} CPU cores" if not memory else f"a GPU of {memory / GIB:.0f} GiB"
    settings = suited(len(images), side, memory, backbone, epochs, bool(multiplies_bf16()))
    return settings, f"{len(images):,} images of {side} px on {where}"


def median_side(images: Reader) -> int:
    """Return the median of the shorter sides of up to 256 images, in pixels, skipping unreadable ones."""
    sides = []
    for index in evenly_spaced(len(images), LOOKED_AT):
        try:
            sides.append(min(int(size[0]) for size in images.sizes(np.array([index]))))
        except DamagedSample:  # the training reports it, or leaves it out
            continue
    return int(np.median(sides)) if sides else SMALL_SIDE


def suited(
    count: int, side: int, memory: int, backbone: str = "", epochs: int = 0, bf16: bool = False
) -> PretrainSettings:
    """Return the settings for `count` images whose shorter sides have `side` pixels. `memory` is the GPU's in
    bytes, 0 for a CPU; `bf16`: whether the CPU multiplies such numbers. `backbone` and `epochs`, if given,
    override the choice."""
    small = side <= SMALL_SIDE
    settings = preset("cifar10-small" if not memory else "cifar10-r18" if small else DEFAULTS)
    resolution = settings.view.resolution
    if not memory:
        resolution = min(resolution, max(8, side - side % 4))
    elif small and side > 48:
        resolution = SMALL_SIDE
    model = replace(settings.model, backbone=backbone or settings.model.backbone)
    resolution = -(-resolution // patch(model.backbone)) * patch(model.backbone)
    settings = replace(settings, model=model, view=replace(settings.view, resolution=resolution))
    batch = settings.batch_size
    while batch > LEAST_BATCH and count < STEPS_AN_EPOCH * batch:
        batch //= 2
    while batch > max(count, 2):
        batch //= 2
    if memory:
        plan = replace(of_pretraining(settings), memory=memory / GIB)
        most = largest_batch(plan, footprint(plan))
        while batch > max(most, 2):
            batch //= 2
    if not epochs:
        wanted = -(-STEPS // max(count // batch, 1))
        epochs = settings.epochs if memory else min(max(wanted, LEAST_EPOCHS), MOST_EPOCHS)
    optimiser = settings.optimiser
    if of_layers(model.backbone):
        optimiser = replace(optimiser, **OF_LAYERS, warmup_epochs=WARMUP * epochs)
    engine = settings.engine
    if bf16 and not memory and model.backbone in (*SMALL, *RESNETS):  # others may be slower in it
        engine = replace(engine, precision="bf16")
    return replace(settings, batch_size=batch, epochs=epochs, optimiser=optimiser, engine=engine)


def in_words(settings: PretrainSettings, what: str) -> str:
    """Describe the choice in one line, as the options that would change it."""
    kind = str(precision(settings.engine, pick_device(settings.device))).removeprefix("torch.")
    flags = {
        "preset": settings.preset,
        "objective": settings.latent.objective,
        "resolution": settings.view.resolution,
        "batch_size": settings.batch_size,
        "epochs": settings.epochs,
        "workers": loader_threads(settings.workers),
        "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[kind],
    }
    if of_layers(settings.model.backbone):
        flags |= {name: getattr(settings.optimiser, name) for name in (*OF_LAYERS, "warmup_epochs")}
    return f"for {what}: {' '.join(options(flags))} (each can be given)"
