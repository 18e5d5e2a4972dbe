"""How much does NT-Xent cost? Times ours, lightly's and pytorch-metric-learning's, forward and backward.

    python -m benchmarks.loss --json FILE        each at 2B = 512 ... 16,384, ours also at 65,536
    python -m benchmarks.loss --crossover        reference against fast form, to set ntxent.FAST_FROM

d = 128, temperature 0.1. Times are medians over rounds in which the forms alternate, so that a slow minute of
the machine affects all of them. Memory is the growth of a fresh process's peak beyond the input, with one
process per figure. Before timing, the losses and gradients of all forms are compared with each other.

Why ours is faster: the logits are symmetric, and one exponential serves a row and a column; tiles stay in the
caches, whereas the others write, mask, copy and read back whole matrices in fresh pages.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import versions_of
from benchmarks.script import new_file, parser_of, save, timing
from lvssl.commands.main import guarded
from lvssl.losses import ntxent as module
from lvssl.losses.ntxent import ntxent, reference
from lvssl.runs.run import versions
from pipelines.errors import InputError

D, TEMPERATURE = 128, 0.1
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LARGEST = 65536

Loss = Callable[[Tensor], Tensor]


def lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda u: loss(*u.chunk(2))


def metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda u: loss(u, torch.arange(len(u) // 2).repeat(2))


FORMS: dict[str, Callable[[], Loss]] = {
    "ours": lambda: lambda u: ntxent(u, TEMPERATURE),
    "reference": lambda: lambda u: reference(u, TEMPERATURE),
    "lightly": lightly,
    "pytorch-metric-learning": metric_learning,
}
# It compares each positive pair with all negative pairs of the batch: above this size, tens of GiB.
MOST_VECTORS = {"pytorch-metric-learning": 512}


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="vectors, 2B")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--largest", type=int, default=LARGEST, help="ours alone at this size; 0: not at all")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of timing for each size, at least 3 rounds"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument(
        "--crossover", action="store_true", help="where the fast form overtakes the reference"
    )
    parser.add_argument("--peak-of", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=new_file, help="where the figures go")
    options = parser.parse_args(arguments)
    threads = options.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    if options.peak_of:
        print(json.dumps(peak(options.peak_of[0], int(options.peak_of[1]))))
        return
    if any(size < 2 or size % 2 for size in [*options.sizes, options.largest or 2]):
        raise InputError("--sizes and --largest must be even numbers of vectors, 2 at least")
    absent = missing(options.forms)
    options.forms = [name for name in options.forms if name not in absent]
    rows = crossover(options) if options.crossover else compared(options, threads)
    result: dict[str, Any] = {
        "versions": versions() | versions_of("lightly", "pytorch-metric-learning"),
        "absent": absent,
        "threads": threads,
        "d": D,
        "temperature": TEMPERATURE,
        "rows": rows,
        "ratios": ratios(rows),
    }
    for name, value in result["ratios"].items():
        print(f"{name:32}{value:8.3f}")
    for name, why in absent.items():
        print(f"{name:32}absent: {why}")
    save(options.json, "loss", arguments, result)


def missing(forms: list[str]) -> dict[str, str]:
    """{form: reason} of those whose package isn't installed."""
    found = {}
    for name in forms:
        try:
            FORMS[name]()
        except ImportError as error:
            found[name] = str(error)
    return found


def compared(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    rows = []
    for size in options.sizes:
        forms = [name for name in options.forms if size <= MOST_VECTORS.get(name, size)]
        times = timed({name: FORMS[name]() for name in forms}, vectors(size), options.seconds)
        for name in forms:
            rows.append(row(name, size, times[name]) | measured_peak(name, size, threads))
            show(rows[-1])
    if options.largest and options.largest not in options.sizes:
        found = measured_peak("ours", options.largest, threads)
        rows.append({"form": "ours", "vectors": options.largest, **found})
        show(rows[-1])
    return rows


def crossover(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Reference and fast form at sizes around FAST_FROM."""
    rows = []
    for size in (2, 16, 64, 128, 256, 384, 512, 768, 1024, 2048):
        times = timed({"reference": FORMS["reference"](), "fast": fast}, vectors(size), options.seconds / 4)
        rows += [row(name, size, taken) for name, taken in times.items()]
        ratio = rows[-1]["seconds"] / rows[-2]["seconds"]
        print(f"{size:8,}  fast / reference {ratio:6.2f}", flush=True)
    return rows


def fast(u: Tensor) -> Tensor:
    kept, module.FAST_FROM = module.FAST_FROM, 0
    try:
        return ntxent(u, TEMPERATURE)
    finally:
        module.FAST_FROM = kept


def vectors(size: int) -> Tensor:
    """Vectors for which the softmax isn't flat: each anchor's positive stands out."""
    noise = torch.Generator().manual_seed(size)
    u = torch.randn(size, D, generator=noise)
    u[size // 2 :] = 0.7 * u[: size // 2] + 0.7 * u[size // 2 :]
    return u


def step(loss: Loss, u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.detach().requires_grad_()
    value = loss(u)
    value.backward()
    assert u.grad is not None
    return value.detach(), u.grad


def timed(forms: dict[str, Loss], u: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of each form in each round, after a check that the forms agree."""
    found = {name: step(loss, u) for name, loss in forms.items()}  # also the warm-up
    first = next(iter(found.values()))
    for name, pair in found.items():
        for kind, a, b in zip(("loss", "gradient"), pair, first):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (
                f"{name}: another {kind} than {next(iter(found))}"
            )
    del found, first
    times: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 3 or time.perf_counter() < end:
        for name, loss in forms.items():
            start = time.perf_counter()
            step(loss, u)
            times[name].append(time.perf_counter() - start)
    return times


def row(form: str, size: int, times: list[float]) -> dict[str, Any]:
    return {"form": form, "vectors": size} | timing(times)


def measured_peak(form: str, size: int, threads: int) -> dict[str, Any]:
    """Memory of one step in its own process."""
    command = ["-m", "benchmarks.loss", "--threads", str(threads), "--peak-of", form, str(size)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        return {"peak_bytes": None, "failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout)


def peak(form: str, size: int) -> dict[str, Any]:
    """Growth in bytes of the process's peak in one step, beyond the vectors; seconds; the total peak."""
    loss = FORMS[form]()
    step(loss, vectors(64))  # imports, thread pools
    step(fast, vectors(64))
    u = vectors(size)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, start = resident("VmHWM"), time.perf_counter()
    step(loss, u)
    seconds = time.perf_counter() - start
    after = resident("VmHWM")
    return {"peak_bytes": after - before, "process_bytes": after, "seconds_once": seconds}


def resident(name: str) -> int:
    """Peak resident bytes of this process. (getrusage's value is inherited from the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over lightly's, for sizes at which both were measured."""
    of = {(r["form"], r["vectors"]): r for r in rows}
    found = {}
    for size in sorted({r["vectors"] for r in rows}):
        ours, theirs = of.get(("ours", size)), of.get(("lightly", size))
        if ours and theirs:
            found[f"time_over_lightly_{size}"] = ours["seconds"] / theirs["seconds"]
            if ours.get("peak_bytes") is not None and theirs.get("peak_bytes"):
                found[f"memory_over_lightly_{size}"] = ours["peak_bytes"] / theirs["peak_bytes"]
    return found


def show(found: dict[str, Any]) -> None:
    seconds = found.get("seconds", found.get("seconds_once"))
    size = (
        f"{found['peak_bytes'] / 2**20:10,.0f} MiB" if found.get("peak_bytes") is not None else "    failed"
    )
    print(f"{found['vectors']:8,}  {found['form']:24}{1e3 * (seconds or 0):11.1f} ms{size}", flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
