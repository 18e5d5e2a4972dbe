"""Prepare a network for a device and for several ranks: layout, precision, statistics, recomputation."""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lvssl.models.backbone import BLOCKS
from lvssl.models.device import claim, layout, precision
from lvssl.models.utilisation import worth_compiling
from lvssl.settings.pretrain import EngineSettings, PretrainSettings
from lvssl.training.batchnorm import frozen_running_statistics, synchronised

N = TypeVar("N", bound=nn.Module)


def prepared(network: N, engine: EngineSettings, device: torch.device, ranks: int = 1) -> N:
    """Move the network to the device, in the memory layout of the settings; call it before the optimiser.

    The names in its state_dict don't change.
    """
    claim(device, precision(engine, device), engine.deterministic)
    network = network.to(device).to(memory_format=layout(engine))
    if ranks > 1 and engine.sync_batch_norm:
        synchronised(network)
    return network


def compiles(settings: PretrainSettings, images: int, device: torch.device, ranks: int = 1) -> bool:
    """Whether a run over `images`, of all epochs together, compiles its backbone (see `--compile`)."""
    engine = settings.engine
    if engine.compile != "auto":
        return engine.compile == "on"
    if device.type != "cuda" or engine.deterministic or engine.graph == "on":
        return False
    twice, fp16 = bool(engine.chunk or engine.recompute), precision(engine, device) == torch.float16
    return worth_compiling(settings.model.backbone, settings.view.resolution, images, ranks, twice, fp16)


def keep_compiled(folder: Path) -> None:
    """Keep the compiler's cache in `folder`, where all jobs of a run find it, unless the user has set another
    $TORCHINDUCTOR_CACHE_DIR. torch sets that to a default of its own as soon as it is loaded."""
    named = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    default = named.parent == Path(tempfile.gettempdir()) and named.name.startswith("torchinductor_")
    if default or named == Path():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def recompute_blocks(backbone: nn.Module) -> None:
    """Let each residual block keep its input alone, and compute it again in the backward pass.

    The second time doesn't move the running statistics; torch's `checkpoint` by itself moves them twice.
    """
    for block in backbone.modules():
        if isinstance(block, BLOCKS):
            contexts = partial(_contexts, block)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), frozen_running_statistics(block)
