"""A network made ready for a device and for several ranks: layout, precision, statistics, recomputation."""

import importlib
import re
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lvssl.config import EngineSettings
from lvssl.models.backbone import BLOCKS
from lvssl.training.batchnorm import frozen_running_statistics, synchronised
from pipelines.errors import InputError

N = TypeVar("N", bound=nn.Module)
OLDEST_TRITON = (3, 6)  # torch 2.11's; the compiler of 3.2 aborts the process on some shapes of our kernels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepared(network: N, engine: EngineSettings, device: torch.device, ranks: int = 1) -> N:
    """The same network on the device, as the settings want its memory to lie; call before the optimiser.

    Names in its state_dict stay what they are.
    """
    claim(device, precision(engine, device))
    network = network.to(device)
    network = network.to(memory_format=layout(engine))
    if ranks > 1 and engine.sync_batch_norm:
        network = cast(N, synchronised(network))
    return network


def claim(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Make a GPU this process's own, before anything is put there, and say how exactly it computes.

    What is launched without naming a device then goes there, and not to the first. Convolutions take the
    fastest algorithm for their shape, of which a run has one. Products of fp32 numbers are of TF32, which
    keeps 11 bits of each, unless fp32 is what the run asks for; it keeps 24 bits, in convolutions too.

    Raises InputError where Triton is absent or too old for the kernels.
    """
    if device.type != "cuda":
        return
    require_triton()
    if device.index is not None:  # "cuda" is the current one, and torch refuses to set it
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


def require_triton() -> None:
    """Raise InputError unless the Triton that comes with torch can compile the kernels of a GPU."""
    try:
        found = importlib.import_module("triton").__version__
    except ImportError:
        found = "none"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        raise InputError(
            f"a GPU needs Triton {needed} or newer, found {found}: install torch 2.11 or newer, or give "
            "--device cpu"
        )


def accelerate(backbone: nn.Module, engine: EngineSettings) -> None:
    """Recomputation and compilation, in place; after copies (EMA) have been made, which do without."""
    if engine.recompute:
        recompute_blocks(backbone)
    if engine.compile:
        backbone.compile()


def layout(engine: EngineSettings) -> torch.memory_format:
    return torch.channels_last if engine.channels_last else torch.contiguous_format


def autocast(engine: EngineSettings, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass; bf16 on a GPU and fp32 on a CPU, unless the settings say otherwise."""
    dtype = precision(engine, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def precision(engine: EngineSettings, device: torch.device) -> torch.dtype:
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[engine.precision]


def encoding_precision(engine: EngineSettings, device: torch.device) -> torch.dtype:
    """What a trained network reads images in: the training's own on a GPU; fp32 on a CPU, which gains nothing
    by less."""
    return precision(engine, device) if device.type == "cuda" else torch.float32


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
