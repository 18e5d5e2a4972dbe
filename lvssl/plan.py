"""`lvssl plan`: estimate the memory of a batch on each GPU, the largest that fits, and the time of a run.

Activations are counted, not estimated: the network runs forward once on tensors without contents, and every
tensor that autograd keeps for the backward pass is added up. The reserve covers what libraries take in
addition (workspaces, the CUDA context, fragmentation in the allocator). With `--recompute`, a residual block
keeps only its input, except for the block being recomputed; with `--chunk`, the backbone keeps the
activations of one chunk. Latent samples are counted as in the composed form; some need
less on a GPU.
"""

import dataclasses
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvssl.latents.noise import keyed
from lvssl.losses.distributed import RING_FROM
from lvssl.models.backbone import BLOCKS
from lvssl.models.device import pick_device
from lvssl.models.network import LVNet
from lvssl.models.utilisation import PEAK_FLOPS, operations, worth_compiling
from lvssl.settings.fields import flag
from lvssl.settings.pretrain import LatentSettings, ModelSettings, PretrainSettings
from lvssl.settings.start import PlanSettings, of_pretraining
from pipelines.errors import InputError

GIB = 2**30
CONTEXT = 1.0 * GIB  # CUDA context, cuDNN and NCCL
SLACK = 0.08  # share of everything else: workspaces and fragmentation
# Maximum number of bytes kept per pixel of a view in fp32, with the small-image stem (no downsampling).
MOST_A_PIXEL = {"tiny": 8_000, "small": 8_000, "resnet18": 30_000, "resnet50": 60_000}  # others are counted
CHANGES = ("chunk", "batch_size", "backbone", "resolution")  # what can be reduced to save memory
# Share of a card's peak in bf16 that was measured for a step including the loader (docs/gpu.md). Other cards
# are assumed to reach that of an H100.
MEASURED = {
    "H100": {"resnet18": 0.19, "resnet50": 0.10},
    "H200": {"resnet18": 0.21, "resnet50": 0.118},
}
MEASURED_SIDE = {"resnet18": 32, "resnet50": 224}  # px, in bf16
COMPILED = {"H200": {"resnet50": 0.165}}  # the same with `--compile`
GUESSED = {"tiny": 0.01, "small": 0.05}  # 0.10 for other backbones
CARD_GIB = {"A100": 80.0, "H100": 80.0, "H200": 140.0, "L4": 22.5}  # as in nvidia-smi, rounded
MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}  # numbers kept per weight


@dataclass(frozen=True)
class Footprint:
    """Bytes per view, and bytes that don't depend on the batch."""

    backbone: float  # kept for the backward pass, per view
    heads: float  # kept for the backward pass by all later layers, per view
    casts: float  # kept independently of the batch: 16-bit copies of the weights
    parameters: int  # number of parameters
    buffers: float  # bytes of running statistics


def footprint(settings: PlanSettings) -> Footprint:
    """Count what one training step of this network keeps, using tensors without contents."""
    at_two, at_four = (_kept(settings, views) for views in (2, 4))
    backbone, heads = ((more - few) / 2 for more, few in zip(at_four, at_two[:2]))
    return Footprint(backbone, heads, at_two[0] + at_two[1] - 2 * (backbone + heads), *at_two[2:])


def _kept(settings: PlanSettings, views: int) -> tuple[float, float, int, float]:
    """Return the bytes kept for the backward pass of this many views, in the backbone and after it; the
    number of parameters; the bytes of the buffers."""
    with FakeTensorMode():
        model = ModelSettings(settings.backbone, settings.hidden, settings.projection)
        latent = LatentSettings(settings.family, samples=settings.samples)
        network = LVNet(model, latent, settings.resolution)
        own = {p.untyped_storage()._cdata for p in network.parameters()}
        kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

        place: list[nn.Module] = [network]  # the block being computed, or the network
        inputs: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> _Kept:
            holder = _Kept(tensor, place[-1])
            kept.add(holder)
            return holder

        def enter(block: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            place.append(block)
            inputs.append(arguments[0])

        for block in network.backbone.modules():
            if isinstance(block, BLOCKS):
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(lambda *_: (place.pop(), None)[1])

        images = torch.empty(views, 3, settings.resolution, settings.resolution)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                features = network.backbone(images)
                in_backbone = list(kept)
                outputs = network.heads(features, keyed(0, views))
        everything = _sizes((holder.tensor for holder in kept), own)
        whole = _sizes((holder.tensor for holder in in_backbone), own)
        after = sum(size for address, size in everything.items() if address not in whole)
        size = sum(whole.values())
        if settings.recompute:
            outside = [holder.tensor for holder in in_backbone if holder.place is network]
            blocks = {id(h.place): h.place for h in in_backbone if h.place is not network}.values()
            each = [_sizes((h.tensor for h in in_backbone if h.place is block), own) for block in blocks]
            size = sum(_sizes([*outside, *inputs], own).values())
            size += max((sum(sizes.values()) for sizes in each), default=0)
        count = sum(p.numel() for p in network.parameters())
        buffers = sum(b.numel() * b.element_size() for b in network.buffers())
        del outputs  # until here the graph was alive, with what it keeps
    return float(size), float(after), count, float(buffers)


def _sizes(tensors: Iterable[torch.Tensor], own: set[int]) -> dict[int, int]:
    """Return the bytes of the tensors' memory by address, each once, without the `own` weights."""
    found = {(s := tensor.untyped_storage())._cdata: s.nbytes() for tensor in tensors}
    return {address: size for address, size in found.items() if address not in own}


class _Kept:
    """Holder of a kept tensor that lives as long as its node of the graph; `place` is its block."""

    def __init__(self, tensor: torch.Tensor, place: nn.Module) -> None:
        self.tensor, self.place = tensor, place


def memory(settings: PlanSettings, of: Footprint) -> dict[str, float]:
    """Return the bytes on each GPU at the peak of a step, the end of the forward pass."""
    views = 2 * settings.batch_size // settings.gpus
    at_once = min(settings.chunk or views, views)
    parts = {
        "weights": 4.0 * of.parameters + of.buffers,
        "gradients": 4.0 * of.parameters * (2 if settings.gpus > 1 else 1),  # and all-reduce buckets
        "optimiser": MOMENTS[settings.optimiser] * 4.0 * of.parameters,
        "activations": at_once * of.backbone + views * of.heads + of.casts,
        "loss": loss_memory(settings),
    }
    if settings.ema:
        parts["average"] = parts["weights"]
    return parts | {"reserve": CONTEXT + SLACK * sum(parts.values())}


def loss_memory(settings: PlanSettings) -> float:
    """Return the bytes of our NT-Xent on one GPU: vectors, their fp32 gradients, and other ranks' blocks."""
    views, d = 2 * settings.batch_size // settings.gpus, settings.projection
    vector = d * (2 if settings.precision == "bf16" else 4) + 12  # with factor, denominator and weight
    own = views * (vector + 2 * 4 * d)
    everyone = 2 * settings.batch_size * vector
    if settings.gpus == 1:
        return own
    return own + (2 * views * vector if everyone >= RING_FROM else everyone)


def matrix_memory(settings: PlanSettings) -> float:
    """Return the bytes of the usual NT-Xent on one GPU: logits, masked, softmax; own rows by all columns."""
    return 3.0 * 4 * (2 * settings.batch_size // settings.gpus) * (2 * settings.batch_size)


def largest_batch(settings: PlanSettings, of: Footprint) -> int:
    """Return the largest number of images per step, a multiple of the number of GPUs; 0 if none fit."""

    def fits(each: int) -> bool:
        parts = memory(dataclasses.replace(settings, batch_size=each * settings.gpus), of)
        return sum(parts.values()) <= card_memory(settings) * GIB

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * settings.gpus


def require_memory(settings: PretrainSettings, ranks: int = 1) -> None:
    """Before a pretraining on a CPU, raise InputError with settings that would fit if a step needs more
    memory than the machine has; print a warning if it needs more than is free. GPUs report it."""
    settings.validate()
    view, model = settings.view, settings.model
    views = 2 * settings.batch_size // ranks
    size: float = views * view.resolution**2 * MOST_A_PIXEL.get(model.backbone, math.inf)
    size += 16.0 * model.hidden * (2048 + model.projection)
    total, free = host_memory()
    if pick_device(settings.device).type != "cpu" or size < free:  # upper bound: counting takes seconds
        return
    plan = dataclasses.replace(of_pretraining(settings), gpus=ranks, precision="fp32")
    needed = host_need(plan)
    if needed < free:
        return
    smaller: list[dict[str, Any]] = [{"chunk": 64}, {"batch_size": 64 * ranks}, {"batch_size": 16 * ranks}]
    tried = [dataclasses.replace(plan, **new) for new in smaller if max(new.values()) < plan.batch_size]
    tried.append(dataclasses.replace(plan, backbone="small", resolution=min(64, plan.resolution)))
    fitting = [other for other in tried if host_need(other) < free]
    options = [
        " ".join(f"{flag(n)} {getattr(o, n)}" for n in CHANGES if getattr(o, n) != getattr(plan, n))
        for o in fitting
    ]
    said = (
        f"{settings.out}: a step of {settings.batch_size:,} images at {view.resolution} px needs about "
        f"{needed / GIB:,.1f} GiB, and this machine has {total / GIB:.1f}, of which {free / GIB:.1f} are free"
        + (f": try {', or '.join(options)}" if options else "")
    )
    if needed > total:
        raise InputError(said)
    print(f"warning: {said}", file=sys.stderr, flush=True)


def host_need(settings: PlanSettings) -> float:
    """Return the bytes of a step on a CPU, which has no GPU context."""
    return sum(memory(settings, footprint(settings)).values()) - CONTEXT


def host_memory(root: Path = Path("/")) -> tuple[float, float]:
    """Return the bytes of main memory, (all, free); infinite if the system doesn't say (other than Linux).
    The limits of a container or job count, if there are any. `root`: where /proc and /sys are."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf, math.inf
    kib = {name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, free = 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]
    for limit, used in memory_limits(root):
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def memory_limits(root: Path) -> Iterator[tuple[float, float]]:
    """Yield (limit, bytes in use) of this process's memory cgroups, from its own, such as a Slurm job's, to
    the topmost one, by version 2 or 1 of cgroups. A cache of files isn't in use: it makes room."""
    folders: list[Path] = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
                inside = top / own.lstrip("/")
                folders += [inside, *(each for each in inside.parents if each.is_relative_to(top))]
    for folder in folders:
        with suppress(OSError, ValueError):  # no such file; "max" means no limit
            names = ("memory.max", "memory.current", "inactive_file")
            if not (folder / names[0]).exists():
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limit, used = (float(int((folder / name).read_text())) for name in names[:2])
            words = (folder / "memory.stat").read_text().split()
            cache = dict(zip(words[::2], words[1::2])).get(names[2], "0")
            yield limit, used - float(cache)


def hours(settings: PlanSettings) -> float:
    """Return the hours of training on all GPUs, from the number of operations and the measured share of the
    peak. It is assumed that the loader keeps up, that ranks don't wait for each other, that fp32 is half as
    fast, and that the backbone's second pass over a chunk or a recomputed block adds a third."""
    work = 2.0 * settings.images * settings.epochs * operations(settings.backbone, settings.resolution)
    chunked = 0 < settings.chunk < 2 * settings.batch_size // settings.gpus
    work *= 4 / 3 if chunked or settings.recompute else 1.0
    speed = PEAK_FLOPS[settings.gpu] * share_of_peak(settings)[0] * settings.gpus
    return work / speed / 3600 * (2 if settings.precision == "fp32" else 1)


def card_memory(settings: PlanSettings) -> float:
    """Return the memory of one GPU in GiB."""
    return settings.memory or CARD_GIB[settings.gpu]


def share_of_peak(settings: PlanSettings) -> tuple[float, bool]:
    """Return the share that a step reaches, and whether it was measured in exactly this case."""
    side, images = settings.resolution, settings.images * settings.epochs
    twice, fp16 = bool(settings.chunk or settings.recompute), settings.precision == "fp16"
    compiled = worth_compiling(settings.backbone, side, images, settings.gpus, twice, fp16)
    measured = (COMPILED if compiled else MEASURED).get(settings.gpu, {}).get(settings.backbone)
    if measured is not None:
        same = side == MEASURED_SIDE[settings.backbone] and settings.precision == "bf16"
        return measured, settings.gpus == 1 and same
    card = MEASURED.get(settings.gpu, MEASURED["H100"])
    share = card.get(settings.backbone, GUESSED.get(settings.backbone, 0.10))
    if compiled:  # assume the speed-up measured there
        share *= COMPILED["H200"]["resnet50"] / MEASURED["H200"]["resnet50"]
    return share, False


def time_of(settings: PlanSettings) -> str:
    took = hours(settings)
    if took >= 1:
        shown = f"{took:,.1f} hours"
    else:
        shown = f"{60 * took:,.0f} minutes" if 60 * took >= 1.5 else "a minute"
    share, measured = share_of_peak(settings)
    basis = "measured on this card" if measured else "extrapolated from one H100 and one H200"
    if settings.backbone not in MEASURED_SIDE:
        basis = f"a guess: {100 * share:.0f} % of the peak, as no step of this backbone was measured"
    epochs = f"{settings.epochs:,} epoch{'s' * (settings.epochs != 1)}"
    return (
        f"{epochs} of {settings.images:,} images: about {shown} on {settings.gpus} "
        f"{settings.gpu} ({basis}), if the loader keeps up."
    )


def plan(settings: PlanSettings) -> str:
    """Return the table that `lvssl plan` prints.

    Raises:
        InputError: an impossible setting.
    """
    settings.validate()
    of = footprint(settings)
    parts = memory(settings, of)
    total = sum(parts.values())
    each, most = settings.batch_size // settings.gpus, largest_batch(settings, of)
    rows = [
        f"{settings.backbone} at {settings.resolution} px, {settings.precision}, family {settings.family}: "
        f"{of.parameters / 1e6:.1f} M parameters, {settings.optimiser}",
        f"{settings.batch_size:,} images per step on {settings.gpus} GPU{'s' * (settings.gpus > 1)}: "
        f"{each:,} images ({2 * each:,} views) per GPU",
        "",
        *(f"  {name:12}{size / GIB:9.2f} GiB" for name, size in parts.items()),
        f"  {'total':12}{total / GIB:9.2f} GiB of {card_memory(settings):g}: "
        + ("fits" if total <= card_memory(settings) * GIB else "does not fit"),
        "",
        f"With its whole similarity matrix, the loss would take {matrix_memory(settings) / GIB:.2f} GiB.",
        f"Largest batch that fits: {most:,} images ({most // settings.gpus:,} per GPU).",
        time_of(settings),
    ]
    return "\n".join(rows)
