"""How much of a GPU's peak a training uses (MFU; Chowdhery et al. 2022, PaLM, appendix B)."""

import re
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lvssl.models.backbone import build_backbone

# Dense bf16, the makers' figures.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "L4": 121e12}
VARIANTS = {"H100 PCIe": 756e12, "H100 NVL": 835e12}  # likewise, of cards whose names contain another's

COMPILED_FROM_SIDE = 128  # px
COMPILED_FROM_WORK = 2.7e16  # operations of a run: 555,000 images of ResNet-50 at 224 px


def worth_compiling(backbone: str, side: int, images: int, ranks: int, twice: bool, fp16: bool) -> bool:
    """Whether a training on this many images, of two views each, makes up for the minute of `torch.compile`.

    On an H200, ResNet-50 at 224 px took 293 us per image compiled, 406 us uncompiled (as a CUDA graph), and
    63 s to compile, which 555,000 images recover. Other networks and sides are assumed to take images of the
    same total work. At 32 px a recorded step is faster. Nothing else was measured (docs/gpu.md), so these
    aren't compiled: several ranks, forward passes that run `twice` (--chunk, --recompute), fp16.
    """
    if ranks > 1 or twice or fp16 or side < COMPILED_FROM_SIDE:
        return False
    return 2 * images * operations(backbone, side) >= COMPILED_FROM_WORK


@cache
def operations(backbone: str, side: int) -> float:
    """Floating-point operations of a backbone for one view of `side` pixels, forward and backward: those of
    convolutions and matrix products, counted on fake tensors. A multiplication and its addition are two."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        network = build_backbone(backbone, side)[0]
        network(torch.empty(2, 3, side, side)).sum().backward()
    return counter.get_total_flops() / 2


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 operations per second of a GPU; None if it isn't known."""
    if device.type != "cuda":
        return None
    name, known = torch.cuda.get_device_name(device), VARIANTS | PEAK_FLOPS
    return next((flops for card, flops in known.items() if re.search(rf"\b{card}\b", name)), None)
