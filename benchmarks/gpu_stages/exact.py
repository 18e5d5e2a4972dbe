"""Check every kernel against fp64 on the device, on fresh inputs whose seeds are in the rows.

A result is right if |fast - exact| <= 2 |naive - exact| + an allowance. The naive form is plain torch in fp32
with TF32 off, the exact form the same in fp64, and the allowance is the cost of the number formats. Memory
that a kernel fills holds NaN beforehand, so that elements left out are noticed. Each kernel then runs fifty
times on one input and must give the same bits.

On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set by the parent).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_stages.case import Case, Row, Setup, as_argument, last_line

SIDES = (8, 9, 33, 65, 224, 512)  # one tap; odd, below a tile; around tiles of 32 and 64; the usual; large
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Number of vectors and their length: smallest; below a tile; several tiles; whole tiles; partial; chunked.
VECTORS = ((2, 17), (126, 17), (1000, 128), (4096, 128), (126, 130), (1000, 512))
FAMILIES = ("bernoulli", "gaussian", "categorical")
DRAWS = ((64, 2048, 4), (3, 37, 6), (256, 512, 1))  # rows, dimensions, samples
REPEATS = 50
KERNELS = (
    "luma_sums", "views", "log_sum_exp_kernel", "gradient_kernel",
    "bernoulli_kernel", "bernoulli_backward_kernel", "gaussian_kernel", "gaussian_backward_kernel",
    "categorical_kernel", "categorical_backward_kernel", "log_gammas_kernel", "crops",
)  # fmt: skip

# Tolerances of views, in levels of 1/255, beyond the rounding of the result: in half precision the blur's
# products are in fp16. Solarise has a step of one level, and a value may fall on either side of it.
MEAN = {torch.float32: 0.001, torch.float16: 0.05, torch.bfloat16: 0.05}
MOST = {torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.25}
STEP = 1.05
STEPPED = 1e-3  # share of fp32 values on the other side of that step
# Tolerances of the loss: logits are kept in units of ln 2; the gradient is rounded to the vectors' type, and
# for bf16 the shares are rounded before their product. Tensor cores truncate what a sum of 16-bit products
# loses, one bit for each 16 of them, instead of rounding it (Fasi et al. 2021, "Numerical behavior of NVIDIA
# tensor cores"), so that a long product is too small. Measured on an H100: 1.9e-5 of the loss at d 512.
ULP = 2**-20
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8 + 2**-9}
SHARES = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-9}


def cases(setup: Setup) -> Iterator[Case]:
    yield Case("memory is poisoned", partial(poison, setup))
    for side in (8, 9) if setup.dry else SIDES:
        for dtype in DTYPES:
            yield Case(f"views, {side} px, {name(dtype)}", partial(views, setup, side, dtype))
    yield Case("luma", partial(luma, setup))
    for count, d in ((2, 17), (46, 32)) if setup.dry else VECTORS:
        for dtype in DTYPES:
            where = f"{count} x {d}, {name(dtype)}"
            yield Case(f"NT-Xent, {where}", partial(loss, setup, count, d, dtype, False))
    for dtype in DTYPES:
        size = (46, 32) if setup.dry else (1000, 128)
        yield Case(f"decoupled, {name(dtype)}", partial(loss, setup, *size, dtype, True))
    yield Case("two blocks", partial(blocks, setup))
    for family in FAMILIES:
        for rows, dim, count in ((3, 16, 4),) if setup.dry else DRAWS:
            where = f"{family} head, {rows} x {dim}, K {count}"
            yield Case(where, partial(head, setup, family, rows, dim, count))
    yield Case("gamma variates", partial(gammas, setup))
    yield Case("fifty repeats", partial(repeats, setup), seconds=90)
    if setup.device == "cuda":
        for tool in ("memcheck", "racecheck"):
            yield Case(f"compute-sanitizer, {tool}", partial(sanitized, setup, tool), seconds=120)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seeded(setup: Setup, label: str) -> tuple[torch.Generator, int]:
    """A CPU generator for the case, and its seed."""
    seed = (setup.seed * 1_000_003 + sum(map(ord, label)) * 7919) % 2**31
    return torch.Generator().manual_seed(seed), seed


@contextmanager
def poisoned() -> Iterator[None]:
    """Make `torch.empty` and the like return NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def kernels_everywhere(setup: Setup) -> Iterator[None]:
    """Use true fp32; on a CPU, also send the loss through the kernels, which only the interpreter can run."""
    from lvssl.losses import anchors, ntxent

    kept = (
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        anchors.engine_of,
        ntxent.FAST_FROM,
    )
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if setup.device == "cpu":
        from lvssl.losses import gpu

        of_device = anchors.engine_of
        anchors.engine_of = lambda x: of_device(x) if x.dtype == torch.float64 else gpu
        ntxent.FAST_FROM = 0
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept[0]
        torch.set_float32_matmul_precision(kept[1])
        anchors.engine_of, ntxent.FAST_FROM = kept[2:]


def poison(setup: Setup) -> Row:
    with poisoned():
        bare = torch.empty(1000, device=setup.device)
    return {"ok": bool(bare.isnan().all())}


# Views


def drawn_views(setup: Setup, side: int, count: int) -> tuple[Tensor, Tensor, Any, int]:
    """Smooth crops with black, white and grey pixels; parameters of every kind; the settings; a seed."""
    from pipelines.parameters import SIGMA, draw_parameters
    from pipelines.views import ViewSettings

    generator, seed = seeded(setup, f"views {side}")
    view = ViewSettings(
        resolution=side, jitter=0.9, blur=0.7, solarise=0.3, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 1.0)
    )
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    crops = (smooth * 300 - 20).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    crops[:, 0, 0], crops[:, 0, 1], crops[:, 1, 0] = 0, 255, 128
    sizes = np.full(count, side)
    table = torch.from_numpy(draw_parameters(view, seed, 0, np.arange(count), sizes, sizes)[:, 0].copy())
    table[0, SIGMA] = 1.3
    return crops.to(setup.device), table.to(setup.device), view, seed


def views(setup: Setup, side: int, dtype: torch.dtype) -> Row:
    from pipelines.augment import gpu, reference
    from pipelines.parameters import SOLARISE

    count = 2 if setup.dry else (4 if side > 224 else 16)
    crops, table, view, seed = drawn_views(setup, side, count)
    exact = reference.augment(crops, table, view, torch.float64)
    with kernels_everywhere(setup):
        with poisoned():
            found = gpu.augment(crops, table, view, dtype)
        naive = reference.augment(crops, table, view, torch.float32).to(dtype)  # with a blur without TF32
    std = torch.tensor(view.std, dtype=torch.float64, device=exact.device).view(3, 1, 1)
    error, own = (((x.double() - exact).abs() * std * 255).flatten(1) for x in (found, naive))
    # In half precision a step can't be distinguished from rounding: solarised images may differ by one more
    # level.
    solarised = (table[:, SOLARISE] != 0).double()
    stepped = torch.zeros_like(error, dtype=torch.bool)
    if dtype == torch.float32:
        stepped, of_naive = ((x > 0.9) & (solarised[:, None] > 0) for x in (error, own))
        error, own = torch.where(stepped, 0.0, error), torch.where(of_naive, 0.0, own)
        solarised = 0 * solarised
    allowed = 2 * own.max() + MOST[dtype] + STEP * solarised
    mean, mean_allowed = error.mean().item(), 2 * own.mean().item() + MEAN[dtype]
    share = stepped.double().mean().item()
    right = mean <= mean_allowed and bool((error.amax(1) <= allowed).all()) and share < STEPPED
    right = right and found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    worst = int((error.amax(1) - allowed).nan_to_num(nan=torch.inf).argmax())
    row = {"ok": right, "error": error[worst].max().item(), "allowed": allowed[worst].item(), "of": "levels"}
    row |= {"mean": mean, "mean_allowed": mean_allowed, "stepped": share, "seed": seed}
    return row | {"unwritten": int(found.isnan().sum())}


def luma(setup: Setup) -> Row:
    """The sums for a contrast that is the first operation, so that they are those of the crop itself."""
    from pipelines.augment import gpu
    from pipelines.augment.reference import GREY_WEIGHTS, ORDERS
    from pipelines.parameters import CONTRAST, ORDER

    side, count = (9, 2) if setup.dry else (224, 16)
    crops, table, _, seed = drawn_views(setup, side, count)
    table[:, ORDER], table[:, CONTRAST] = int(np.argmax(ORDERS[:, 0] == 1)), 0.5
    with poisoned():
        blocks = -(-side * side // gpu.SUM_BLOCK)
        sums = torch.empty((count, blocks), device=setup.device)
    orders = gpu.orders_on(crops.device)
    gpu.luma_sums[count, blocks](crops, table, orders, sums, crops.stride(0), **gpu.sum_options(side))
    weights = torch.tensor(GREY_WEIGHTS, dtype=torch.float64, device=crops.device)
    exact = (crops.double() / 255 @ weights).flatten(1).sum(1)
    naive = (crops.float() / 255 @ weights.float()).flatten(1).sum(1)
    return judged({"luma": (sums.double().sum(1), naive, exact, 2**-20 * float(exact.max()))}, seed)


# The loss

Judged = dict[str, tuple[Tensor, Tensor, Tensor, float]]  # name -> found, naive, exact, allowance


def judged(tensors: Judged, seed: int) -> Row:
    """The worst of several tensors, each against its budget; NaN never passes."""
    worst: Row = {}
    for label, (found, naive, exact, allowance) in tensors.items():
        error = (found.double() - exact).abs()
        allowed = 2 * float((naive.double() - exact).abs().max()) + allowance
        at = int(error.nan_to_num(nan=torch.inf).argmax())
        row: Row = {
            "ok": bool((error <= allowed).all()),
            "error": float(error.flatten()[at]),
            "allowed": allowed,
        }
        row |= {"of": label, "seed": seed}
        if not row["ok"]:
            row["failed"] = (
                f"{label}[{at}] is {float(found.flatten()[at])}, exactly {float(exact.flatten()[at])}"
            )
        if not worst or (not row["ok"], row["error"] / allowed) > (
            not worst["ok"],
            worst["error"] / worst["allowed"],
        ):
            worst = row
    return worst


def vectors(generator: torch.Generator, count: int, d: int) -> Tensor:
    """Vectors for which the softmax isn't flat: each anchor is nearest to its positive."""
    x = torch.randn(count, d, generator=generator)
    x[count // 2 :] = x[: count // 2] + 0.3 * x[count // 2 :]
    return x


def loss(setup: Setup, count: int, d: int, dtype: torch.dtype, decoupled: bool) -> Row:
    """The value, the gradient times the vector's length, and the temperature's gradient."""
    from lvssl.losses.ntxent import ntxent, reference
    from lvssl.losses.variants import decoupled_ntxent

    generator, seed = seeded(setup, f"loss {count} {d} {dtype} {decoupled}")
    x = vectors(generator, count, d).to(setup.device, dtype)
    temperature = 0.1
    fast, plain = (decoupled_ntxent, decoupled_ntxent) if decoupled else (ntxent, reference)
    with kernels_everywhere(setup):
        exact = value_and_slopes(plain, x.double(), temperature)
        with poisoned():
            found = value_and_slopes(fast, x, temperature)
    # In fp32 only the kernels have the decoupled loss; its budget is the allowance alone.
    naive = exact if decoupled else value_and_slopes(reference, x.float(), temperature)
    budget = ULP * (8 + 1 / temperature)
    if dtype != torch.float32:
        budget += 2**-23 * d / 16 / temperature
    # The temperature's gradient: shares (2 in total) times logits (at most 1 / temperature) over 2
    # temperature.
    of_shares = SHARES[dtype] / temperature**2
    scale = 1 + float(exact[0].abs())
    allowances = (
        budget * scale,
        (budget + ROUNDING[dtype]) / (count * temperature),
        budget * scale / temperature + of_shares,
    )
    names = ("loss", "gradient", "gradient of tau")
    return judged({n: (f, m, e, a) for n, f, m, e, a in zip(names, found, naive, exact, allowances)}, seed)


def value_and_slopes(form: Callable[..., Tensor], x: Tensor, temperature: float) -> list[Tensor]:
    x = x.clone().requires_grad_()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tau = torch.tensor(temperature, dtype=wide, device=x.device, requires_grad=True)
    value = form(x, tau)
    value.backward()
    assert x.grad is not None and tau.grad is not None
    lengths = x.detach().double().norm(dim=1, keepdim=True)
    return [value.detach().double(), x.grad.double() * lengths, tau.grad.double()]


def blocks(setup: Setup) -> Row:
    """Rows against another rank's columns, as in the exchange between ranks."""
    from lvssl.losses import chunked, gpu
    from lvssl.losses.block import Weighed

    generator, seed = seeded(setup, "blocks")
    made = []
    for count in (70, 45):
        x = torch.randn(count, 24, generator=generator)
        parts = (x, 3 / x.norm(dim=1), 2 + torch.rand(count, generator=generator))
        made.append([t.to(setup.device) for t in (*parts, torch.rand(count, generator=generator))])
    tensors: Judged = {}
    with kernels_everywhere(setup):
        for label, order in (("first", (0, 1)), ("second", (1, 0))):
            rows, columns = (Weighed(*made[k]) for k in order)
            wide_rows, wide_columns = (Weighed(*(t.double() for t in made[k])) for k in order)
            for what in ("log_sum_exp", "gradient"):
                with poisoned():
                    found = getattr(gpu, what)(rows, columns, (), 9.0)
                naive = getattr(chunked, what)(rows, columns, (), 9.0)
                exact = getattr(chunked, what)(wide_rows, wide_columns, (), 9.0)
                tensors[f"{what} of the {label}"] = (
                    found,
                    naive,
                    exact,
                    64 * 2**-20 * float(exact.abs().max()),
                )
    return judged(tensors, seed)


# Heads


def head(setup: Setup, kind: str, rows: int, dim: int, count: int) -> Row:
    """Sample, KL, entropy, gradient and packed bits. A discrete sample whose uniform number is within
    rounding of its probability may take either value: these are counted, and may be at most one in 10,000."""
    from lvssl.latents import family, fused

    generator, seed = seeded(setup, f"{kind} {rows} {dim} {count}")
    width = dim // 4 * 4 if kind == "categorical" else dim
    distribution = family(kind, categories=4)
    x = 2 * torch.randn(rows, distribution.parameter_count(width), generator=generator)
    grad = torch.randn(rows, width, generator=generator)
    key, places = torch.tensor([seed + 2**40]), torch.arange(rows) * 1_000_003 + 2**31 - 1
    x, grad, key, places = (t.to(setup.device) for t in (x, grad, key, places))

    def run(form: Callable[..., fused.Draw], given: Tensor) -> list[Tensor]:
        leaf = given.clone().requires_grad_()
        drawn = form(distribution, leaf, count, key, places)
        wide = grad.to(given.dtype)
        total = (drawn.sample * wide).sum() + 0.3 * drawn.kl.sum() - 0.7 * drawn.entropy.square().sum()
        total.backward()
        assert leaf.grad is not None
        return [t.detach() for t in (*drawn, leaf.grad)]

    with kernels_everywhere(setup):
        with poisoned():
            found = run(fused.draw, x)
        naive, exact = run(fused.reference, x), run(fused.reference, x.double())
    flips = torch.zeros(())
    if distribution.discrete:
        apart = (found[0].double() - exact[0]).abs() > 0.1 / count
        flips = apart.double().mean()
        for k in (found, naive):
            k[0] = torch.where(apart, exact[0].to(k[0].dtype), k[0])
    names = ("sample", "kl", "entropy", "packed", "gradient")
    tensors: Judged = {}
    for label, f, n, e in zip(names, found, naive, exact):
        if label != "packed":
            tensors[label] = (f, n, e.double(), 8e-6 * max(1.0, float(e.abs().max())))
    row = judged(tensors, seed)
    same_bits = bool(torch.equal(found[3], exact[3]))
    flipped = float(flips)
    row |= {"flipped": flipped, "ok": row["ok"] and same_bits and flipped <= max(1e-4, 1.01 / (rows * width))}
    return row if same_bits else row | {"failed": "the packed bits differ"}


def gammas(setup: Setup) -> Row:
    """The kernel's logarithms of gamma variates against plain torch's, both in fp64, for shapes of 10^-2 to
    10^6. Rounding may change which proposal is accepted: at most once in 10^12."""
    from lvssl.latents import noise_triton
    from lvssl.latents.noise import GAMMA_PROPOSALS, keyed, plain_log_gammas

    generator, seed = seeded(setup, "gamma variates")
    rows, dim, count = (3, 17, 2) if setup.dry else (512, 256, 4)
    shapes = (10 ** (8 * torch.rand(rows, dim, generator=generator) - 2)).to(setup.device)
    noise = keyed(seed, rows, setup.device)
    with poisoned():
        found = noise_triton.log_gammas(shapes, count, noise.key, noise.rows, 0, GAMMA_PROPOSALS)
    exact = plain_log_gammas(shapes, count, noise)
    return judged({"logarithm": (found, exact, exact, 1e-11 * float(exact.abs().max()))}, seed)


# The same bits


def kernel_calls(setup: Setup, smallest: bool = False) -> dict[str, Callable[[], list[Tensor]]]:
    """Each kernel on one input, drawn once."""
    from lvssl.latents import family, fused, noise_triton
    from lvssl.latents.noise import GAMMA_PROPOSALS, keyed
    from lvssl.losses import ntxent
    from pipelines.augment import gpu
    from pipelines.decode.gpu import crop_and_resize

    tiny = setup.dry or smallest
    generator, _ = seeded(setup, "repeats")
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        crops, table, view, _ = drawn_views(setup, 9 if tiny else 224, 1 if smallest else 8)
        calls[f"views {name(dtype)}"] = partial(one, gpu.augment, crops, table, view, dtype)
        x = vectors(generator, 6 if tiny else 4096, 17 if tiny else 128).to(setup.device, dtype)

        def loss_call(x: Tensor = x) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            value = ntxent.ntxent(leaf, 0.1)
            value.backward()
            assert leaf.grad is not None
            return [value.detach(), leaf.grad]

        calls[f"NT-Xent {name(dtype)}"] = loss_call
    for kind in FAMILIES:
        distribution = family(kind, categories=4)
        rows, width = (2, 8) if tiny else (256, 2048)
        given = torch.randn(rows, distribution.parameter_count(width), generator=generator).to(setup.device)
        key, places = torch.tensor([7], device=setup.device), torch.arange(rows, device=setup.device)

        def head_call(
            distribution: Any = distribution, given: Tensor = given, key: Tensor = key, at: Tensor = places
        ) -> list[Tensor]:
            leaf = given.clone().requires_grad_()
            drawn = fused.draw(distribution, leaf, 4, key, at)
            (drawn.sample.square().sum() + drawn.kl.sum() + drawn.entropy.sum()).backward()
            assert leaf.grad is not None
            return [*(t.detach() for t in drawn), leaf.grad]

        calls[f"{kind} head"] = head_call

    rows, width = (2, 8) if tiny else (256, 2048)
    shapes = (10 ** (8 * torch.rand(rows, width, generator=generator) - 2)).to(setup.device)
    noise = keyed(7, rows, setup.device)
    calls["gamma variates"] = partial(
        one, noise_triton.log_gammas, shapes, 4, noise.key, noise.rows, 1, GAMMA_PROPOSALS
    )
    height, width, side = (9, 7, 8) if tiny else (375, 500, 224)
    planes = [
        torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator).to(setup.device)
        for _ in range(2)
    ]
    # Whole images, and boxes that end with an image's last pixel, beyond which nothing may be read.
    boxes = np.array([[(0, 0, height, width), (height - 3, width - 2, 3, 2)]] * 2)
    calls["crops"] = partial(one, crop_and_resize, planes, boxes, np.array([[True, False]] * 2), side)
    return calls


def one(form: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    return [form(*arguments)]


def repeats(setup: Setup) -> Iterator[Row]:
    times = 3 if setup.dry else REPEATS
    with kernels_everywhere(setup):
        for label, call in kernel_calls(setup).items():
            try:
                first = call()
                different = sum(not all(map(torch.equal, first, call())) for _ in range(times - 1))
                row: Row = {"ok": different == 0, "times": times, "different": different}
            except Exception as error:
                row = {"ok": False, "failed": last_line(error)}
            yield {"name": f"same bits, {label}", **row}


# compute-sanitizer


def sanitized(setup: Setup, tool: str) -> Row:
    """The smallest case of each kernel under NVIDIA's checker, with torch's memory caching turned off."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"ok": None, "failed": "missing: compute-sanitizer"}
    module = "benchmarks.gpu_stages.exact"
    command = [program, "--tool", tool, sys.executable, "-m", module, as_argument(setup)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    summary = [line.strip("= ") for line in said.splitlines() if "SUMMARY" in line]
    if not summary or "smallest cases done" not in said:
        lines = said.strip().splitlines()
        return {
            "ok": None,
            "failed": f"{tool} could not run: {lines[-1][:200] if lines else done.returncode}",
        }
    clean = all(": 0 " in line for line in summary)
    # Findings in torch's own kernels are reported, but don't count as faults here.
    ours = [line.strip("= ") for line in said.splitlines() if any(kernel in line for kernel in KERNELS)]
    return {"ok": clean or not ours, "summary": "; ".join(summary), "failed": ours[0][:200] if ours else None}


def smallest(argument: str) -> None:
    setup = Setup(**{**json.loads(argument), "part": (0, 1)})
    with kernels_everywhere(setup):
        for call in kernel_calls(setup, smallest=True).values():
            call()
    if setup.device == "cuda":
        torch.cuda.synchronize()
    print("smallest cases done")


if __name__ == "__main__":
    smallest(sys.argv[1])
