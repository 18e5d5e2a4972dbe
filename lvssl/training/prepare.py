"""A network made ready for a device and for several ranks: layout, precision, statistics, recomputation."""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lvssl.models.backbone import BLOCKS
from lvssl.models.device import claim, layout, precision
from lvssl.settings.pretrain import (
    COMPILED_FROM_IMAGES,
    COMPILED_FROM_SIDE,
    EngineSettings,
    PretrainSettings,
)
from lvssl.training.batchnorm import frozen_running_statistics, synchronised

N = TypeVar("N", bound=nn.Module)


def prepared(network: N, engine: EngineSettings, device: torch.device, ranks: int = 1) -> N:
    """The same network on the device, as the settings want its memory to lie; call before the optimiser.

    Names in its state_dict stay what they are.
    """
    claim(device, precision(engine, device), engine.deterministic)
    network = network.to(device)
    network = network.to(memory_format=layout(engine))
    if ranks > 1 and engine.sync_batch_norm:
        network = cast(N, synchronised(network))
    return network


def compiles(settings: PretrainSettings, images: int, device: torch.device, ranks: int = 1) -> bool:
    """Whether a run over `images` (of all epochs together) compiles its backbone, see `--compile`.

    On an H200 ResNet-50 at 224 px took 293 us an image compiled and 411 eager, and 63 s to compile: from half
    a million images on it is worth that. At 32 px a recorded step is faster (docs/gpu.md).
    """
    engine = settings.engine
    if engine.compile != "auto":
        return engine.compile == "on"
    worth = settings.view.resolution >= COMPILED_FROM_SIDE and images >= COMPILED_FROM_IMAGES
    other = engine.chunk or engine.recompute or engine.deterministic or engine.graph == "on"
    exact = precision(engine, device) == torch.float16
    return device.type == "cuda" and ranks == 1 and worth and not (other or exact)


def apply_recompute_and_compile(backbone: nn.Module, recompute: bool, compiled: bool) -> None:
    """Recomputation and compilation, in place; after copies (EMA) have been made, which do without."""
    if recompute:
        recompute_blocks(backbone)
    if compiled:
        backbone.compile()


def keep_compiled(folder: Path) -> None:
    """What the compiler makes goes to `folder`, so that all jobs of a run find it; unless the user has named
    another in $TORCHINDUCTOR_CACHE_DIR, where torch puts a default of its own as soon as it is loaded."""
    named = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    default = named.parent == Path(tempfile.gettempdir()) and named.name.startswith("torchinductor_")
    if default or named == Path():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def recompute_blocks(backbone: nn.Module) -> None:
    """Each residual block keeps its input alone, and is computed again in the backward pass.

    The second time leaves the running statistics alone: torch's `checkpoint` by itself moves them twice.
    """
    for block in backbone.modules():
        if isinstance(block, BLOCKS):
            contexts = partial(_contexts, block)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), frozen_running_statistics(block)
