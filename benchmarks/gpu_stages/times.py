"""Seconds of each part on the device, next to its peers and its floor.

Bytes are those that must be moved (each input read once, each output written once), and operations those that
must be done; the floor is the larger of the two times at this card's measured limits.

Augmentation: peers draw their parameters within the call. Ours are drawn and copied before it, as in
training, where the loader's threads draw them ahead: 0.13 us a view on one core.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_stages.case import Case, Row, Setup
from benchmarks.gpu_stages.machine import ceilings
from benchmarks.gpu_stages.timing import (
    against_floor,
    peak_memory,
    rotated,
    sets_beyond_cache,
    timed,
    view_bytes,
)
from benchmarks.peers import kornia_chain, torchvision_chain

D, TEMPERATURE = 128, 0.1
Call = Callable[[], Any]


def cases(setup: Setup) -> Iterator[Case]:
    """The most important first, so that an interrupted stage has these."""
    for side in sides(setup):
        for blur in (0.5, 0.0, 1.0):
            yield Case(f"ours, {side} px, bf16, blur {blur}", partial(ours, setup, side, blur))
        for form in ("torchvision v2, one draw a batch", "torchvision v2", "kornia"):
            yield Case(f"{form}, {side} px, blur 0.5", partial(peer, setup, side, form))
        for dtype in (torch.float16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            yield Case(f"ours, {side} px, {kind}, blur 0.5", partial(ours, setup, side, 0.5, dtype))
        yield Case(f"reordering uint8 crops, {side} px", partial(reorder, setup, side))
    for count in loss_sizes(setup):
        for form in loss_forms(setup):
            if not form.startswith("compiled") or count in compiled_sizes(setup):
                yield Case(f"NT-Xent {form}, 2B {count}", partial(loss, setup, count, form))
    for kind in ("bernoulli", "gaussian", "categorical"):
        for form in ("fused", "composed"):
            yield Case(f"{kind} head, {form}", partial(head, setup, kind, form))
    for precision in ("highest", "high"):
        yield Case(f"decorrelation, {precision}", partial(decorrelation, setup, precision))
    for backbone in ("tiny",) if setup.dry else ("resnet50", "resnet18"):
        yield Case(f"guard, {backbone}", partial(guard, setup, backbone))
        for form in OPTIMISERS:
            yield Case(f"{form}, {backbone}", partial(optimiser, setup, form, backbone))


# Augmentation


def sides(setup: Setup) -> tuple[int, ...]:
    return (16,) if setup.dry else (224, 32)


def view_of(side: int, blur: float = 0.5) -> Any:
    from pipelines.views import ViewSettings

    return ViewSettings(resolution=side, blur=blur)


def crops_of(setup: Setup, side: int, count: int, seed: int) -> Tensor:
    """uint8 [N, R, R, 3]: smooth colours and noise."""
    generator = torch.Generator(device=setup.device).manual_seed(setup.seed + seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator, device=setup.device)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = 0.1 * torch.randn(smooth.shape, generator=generator, device=setup.device)
    return ((smooth + noise) * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def views_a_call(setup: Setup, side: int) -> int:
    return 2 if setup.dry else (512 if side > 64 else 4096)


def ours(setup: Setup, side: int, blur: float, dtype: torch.dtype = torch.bfloat16) -> Row:
    from pipelines.augment import gpu
    from pipelines.parameters import draw_parameters

    count, view = views_a_call(setup, side), view_of(side, blur)
    sizes = np.full(count, side)
    calls: list[Call] = []
    for k in range(1 if setup.dry else sets_beyond_cache(count * side * side * 3)):
        table = draw_parameters(view, setup.seed, k, np.arange(count), sizes, sizes)[:, 0].copy()
        given = crops_of(setup, side, count, k), torch.from_numpy(table).to(setup.device)
        calls.append(partial(gpu.augment, *given, view, dtype))
    found = timed(setup, rotated(calls))
    pixels = count * side * side
    # Some 60 operations per pixel; the blur's two passes over three colours take 2 operations per tap.
    operations = pixels * (60 + blur * 2 * 3 * 2 * view.kernel_size)
    row = against_floor(found, view_bytes(side, dtype) * count, operations, ceilings(setup))
    return {"ok": True, **row, "views": count, "us_per_view": 1e6 * row["seconds"] / count}


def reorder(setup: Setup, side: int) -> Row:
    """The copy that reorders a batch's crops from image by image to view by view."""
    count = views_a_call(setup, side)
    crops = crops_of(setup, side, count, 0).unflatten(0, (count // 2, 2))
    row = timed(setup, lambda: crops.transpose(0, 1).flatten(0, 1))
    row = against_floor(row, 2 * crops.nbytes, 0, ceilings(setup))
    return {"ok": True, **row, "views": count, "us_per_view": 1e6 * row["seconds"] / count}


def peer(setup: Setup, side: int, form: str) -> Row:
    """The same chain in other libraries on the same device, from uint8 crops to normalised bf16."""
    view = view_of(side)
    count = min(views_a_call(setup, side), 32 if form == "torchvision v2" else 512)  # one by one is slow
    crops = crops_of(setup, side, count, 0).permute(0, 3, 1, 2)
    chain = kornia_chain(view).to(setup.device) if form == "kornia" else torchvision_chain(view)
    if form == "kornia":
        call: Call = lambda: chain(crops.float() / 255).to(torch.bfloat16)  # noqa: E731
    elif form == "torchvision v2":  # a batch would share its random draws
        call = lambda: torch.stack([chain(crop) for crop in crops]).to(torch.bfloat16)  # noqa: E731
    else:
        call = lambda: chain(crops).to(torch.bfloat16)  # noqa: E731
    made = call()
    right = (
        made.shape == (count, 3, side, side) and bool(made.isfinite().all()) and made.dtype == torch.bfloat16
    )
    row = timed(setup, call)
    return {"ok": bool(right), **row, "views": count, "us_per_view": 1e6 * row["seconds"] / count}


# NT-Xent, forward and backward


def loss_sizes(setup: Setup) -> tuple[int, ...]:
    return (64,) if setup.dry else (32768, 8192, 1024, 2048, 4096, 16384)


def compiled_sizes(setup: Setup) -> tuple[int, ...]:
    """Numbers of vectors for which the matrix form is compiled; each takes the compiler some seconds."""
    return (64,) if setup.dry else (8192, 32768)


def loss_forms(setup: Setup) -> dict[str, Callable[[int], Call]]:
    """{form: vectors -> a call}. The matrix forms may use TF32, as users who want speed would; ours and one
    of the compiled forms multiply in the vectors' own bf16."""

    def ours(count: int) -> Call:
        from lvssl.losses.ntxent import ntxent

        return forward_and_backward(setup, count, lambda u: ntxent(u, TEMPERATURE))

    def matrix(count: int) -> Call:
        from lvssl.losses.ntxent import reference

        torch.set_float32_matmul_precision("high")
        return forward_and_backward(setup, count, lambda u: reference(u, TEMPERATURE))

    def compiled(count: int) -> Call:
        from lvssl.losses.ntxent import reference

        torch.set_float32_matmul_precision("high")
        form = torch.compile(reference, dynamic=False)
        return forward_and_backward(setup, count, lambda u: form(u, TEMPERATURE))

    def compiled_bf16(count: int) -> Call:
        form = torch.compile(matrix_in_bf16, dynamic=False)
        return forward_and_backward(setup, count, lambda u: form(u, TEMPERATURE))

    def lightly(count: int) -> Call:
        loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)
        torch.set_float32_matmul_precision("high")
        return forward_and_backward(setup, count, lambda u: loss(*u.float().chunk(2)))

    return {
        "ours": ours,
        "compiled matrix form": compiled,
        "compiled matrix form in bf16": compiled_bf16,
        "lightly": lightly,
        "matrix form": matrix,
    }


def matrix_in_bf16(u: Tensor, temperature: float) -> Tensor:
    """NT-Xent by its definition, as under autocast: the product of all pairs in bf16, the softmax in fp32."""
    unit = F.normalize(u.float(), dim=1).to(torch.bfloat16)
    logits = (unit @ unit.T).float() / temperature
    logits = logits.masked_fill(torch.eye(len(u), dtype=torch.bool, device=u.device), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(u), device=u.device).roll(len(u) // 2))


def forward_and_backward(setup: Setup, count: int, loss: Callable[[Tensor], Tensor]) -> Call:
    """bf16 vectors [2B, d], as under autocast."""
    u = torch.randn(count, D, device=setup.device, dtype=torch.bfloat16, requires_grad=True)

    def call() -> Tensor:
        u.grad = None
        value = loss(u)
        value.backward()
        return value.detach()

    return call


def loss(setup: Setup, count: int, form: str) -> Row:
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(setup.seed)
    call = loss_forms(setup)[form](count)
    value = call().item()
    row = timed(setup, call)
    # Forward: one product of all pairs; backward: the pairs again, and their shares times the vectors.
    row = against_floor(row, 4 * count * D * 2, 6 * count * count * D, ceilings(setup))
    expected = float(np.log(count - 1))  # approximate value for random vectors
    near = 0.5 * expected < value < 2 * expected + 2
    row |= {"us_per_view": 1e6 * row["seconds"] / count, "vectors": count, "loss": value}
    return {"ok": near, **row, **peak_memory(setup, call)}


# Heads, decorrelation


def head(setup: Setup, kind: str, form: str) -> Row:
    """Mean of K samples, KL, entropy, bits, and the gradient; by one kernel each way, or composed."""
    from lvssl.latents import family, fused
    from lvssl.latents.bits import pack
    from lvssl.latents.noise import Noise

    rows, dim, samples = (4, 16, 4) if setup.dry else (8192, 2048, 4)
    distribution = family(kind, categories=16)
    x = torch.randn(rows, distribution.parameter_count(dim), device=setup.device, requires_grad=True)
    key, places = torch.tensor([3], device=setup.device), torch.arange(rows, device=setup.device)

    def composed() -> list[Tensor]:
        posterior = distribution.posterior(x)
        return [
            posterior.sample(samples, Noise(key, places)).mean(dim=0),
            posterior.kl(),
            posterior.entropy(),
            pack(posterior.code()),
        ]

    def call() -> None:
        x.grad = None
        drawn = list(fused.draw(distribution, x, samples, key, places)) if form == "fused" else composed()
        torch.autograd.backward([t.sum() for t in drawn[:3]])

    row = timed(setup, call)
    parameters, numbers = x.numel(), rows * dim
    # Forward: parameters read, sample written; backward: both read, gradient written.
    row = against_floor(row, 4 * (3 * parameters + 2 * numbers), 0, ceilings(setup))
    return {
        "ok": x.grad is not None,
        **row,
        **peak_memory(setup, call),
        "us_per_view": 1e6 * row["seconds"] / rows,
    }


def decorrelation(setup: Setup, precision: str) -> Row:
    from lvssl.losses.objective import decorrelation as penalty

    rows, dim = (16, 16) if setup.dry else (8192, 2048)
    torch.set_float32_matmul_precision(precision)
    bits = torch.randn(rows, dim, device=setup.device).sign().requires_grad_()

    def call() -> None:
        bits.grad = None
        penalty(bits).backward()

    row = timed(setup, call)
    row = against_floor(row, 3 * bits.nbytes, 4 * rows * dim * dim, ceilings(setup))
    return {"ok": bits.grad is not None, **row, "us_per_view": 1e6 * row["seconds"] / rows}


# After the backward pass


def with_gradients(setup: Setup, backbone: str) -> Any:
    from lvssl.models.network import LVNet
    from lvssl.settings.pretrain import LatentSettings, ModelSettings

    network = LVNet(ModelSettings(backbone=backbone), LatentSettings(), 32, 10).to(setup.device)
    for parameter in network.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return network


def guard(setup: Setup, backbone: str) -> Row:
    """The norm of the gradients, and clipping."""
    from lvssl.training.gradients import clip_gradients

    parameters = list(with_gradients(setup, backbone).parameters())
    row = timed(setup, lambda: clip_gradients(parameters, clip=1.0))
    moved = sum(p.nbytes for p in parameters)
    return {"ok": True, **against_floor(row, 3 * moved, 0, ceilings(setup)), "tensors": len(parameters)}


def built(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    def build(network: Any) -> torch.optim.Optimizer:
        from lvssl.settings.pretrain import OptimiserSettings
        from lvssl.training.optimiser import build_optimiser

        on_gpu = next(network.parameters()).is_cuda
        return build_optimiser(network, replace(OptimiserSettings(), optimiser=kind), fused=on_gpu)

    return build


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW as the engine builds it": built("adamw"),
    "SGD as the engine builds it": built("sgd"),
    "LARS as the engine builds it": built("lars"),
    "AdamW, foreach": lambda n: torch.optim.AdamW(n.parameters(), foreach=True),
    "AdamW, fused": lambda n: torch.optim.AdamW(n.parameters(), fused=True),
    "SGD, foreach": lambda n: torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda n: torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, fused=True),
}


def optimiser(setup: Setup, form: str, backbone: str) -> Row:
    network = with_gradients(setup, backbone)
    stepper = OPTIMISERS[form](network)
    row = timed(setup, stepper.step)
    size = sum(p.nbytes for p in network.parameters())
    # Weights and states are read and written, gradients read; AdamW has two states, the others one.
    moved = size * (7 if form.startswith("AdamW") else 5)
    return {"ok": True, **against_floor(row, moved, 0, ceilings(setup))}
