"""Where and how exactly a network computes: device, precision and memory layout."""

import importlib
import os
import platform
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lvssl.settings.pretrain import EngineSettings
from pipelines.errors import InputError

OLDEST_TRITON = (3, 6)  # as in torch 2.11; the compiler of 3.2 aborts the process on some of our shapes
GPU = Path("/dev/nvidia0")  # there once a driver has found a GPU, whatever torch makes of it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of that name; `auto` is a GPU if there is one, and `cuda` the rank's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():  # if Slurm shows a rank its own GPU alone, that is 0
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:0 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU is usable here; leave out --device to use the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--device {name}: this machine has {count} GPUs, numbered from 0")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
            raise InputError(f"--device {name}: this torch can't use one; known: cpu, cuda") from error
    return device


def claim(device: torch.device, dtype: torch.dtype = torch.float32, deterministic: bool = False) -> None:
    """Make a GPU the current one, before anything is allocated, and set how exactly it computes.

    Kernels that are launched without naming a device then run there, not on the first GPU. Convolutions use
    the fastest algorithm for their shape, which is the same throughout a run. Products of fp32 numbers use
    TF32, which keeps 11 bits of each, unless the run asks for fp32: 24 bits, in convolutions too.

    deterministic: torch uses algorithms that give the same bits each time, and refuses operations that have
    none; convolutions are then not tuned. Our own kernels are deterministic in any case.

    Raises InputError if Triton is missing or too old for the kernels.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at a device's first product
        torch.use_deterministic_algorithms(True)
        switches: Any = torch.utils.deterministic
        switches.fill_uninitialized_memory = False  # a debugging aid, which costs launches
    if device.type != "cuda":
        return
    require_triton()
    if device.index is not None:  # "cuda" is the current device, which torch refuses to set
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


def require_triton() -> None:
    """Raise InputError unless the installed Triton can compile the GPU kernels."""
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


def layout(engine: EngineSettings) -> torch.memory_format:
    return torch.channels_last if engine.channels_last else torch.contiguous_format


def autocast(engine: EngineSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Context of a forward pass: bf16 on a GPU and fp32 on a CPU, unless the settings say otherwise."""
    dtype = precision(engine, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def precision(engine: EngineSettings, device: torch.device) -> torch.dtype:
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[engine.precision]


def encoding_precision(engine: EngineSettings, device: torch.device) -> torch.dtype:
    """Precision in which a trained network reads images: that of its training on a GPU; fp32 on a CPU, so
    that codes depend on the processor's rounding alone."""
    return precision(engine, device) if device.type == "cuda" else torch.float32


def multiplies_bf16() -> bool | None:
    """Whether this x86 processor has instructions for products of bf16 numbers: it trains ResNets about twice
    as fast in these (docs/training.md). Others convert each number, which is slower than fp32. None if that
    isn't known: on other processors, and not on Linux."""
    if platform.machine() != "x86_64":
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return None
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def note_if_slow(asked: str, engine: EngineSettings, device: torch.device) -> None:
    """Print a note if a training on the CPU leaves out a GPU that `asked`, auto, would have taken, or would
    be faster in fp32."""
    if device.type != "cpu":
        return
    if asked == "auto" and GPU.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        said = "this machine has an NVIDIA GPU, which torch can't use (built for CPUs? an old driver?)"
        print(f"note: {said}; --device cpu leaves it out", file=sys.stderr, flush=True)
    if engine.precision == "bf16" and multiplies_bf16() is False:
        said = "this processor converts bf16 numbers, which takes 2 to 10 times as long as fp32"
        print(f"note: {said}: begin anew with --precision fp32", file=sys.stderr, flush=True)
