"""Plant errors into kernels, under Triton's interpreter, and see what the rows of the exactness stage report.

    TRITON_INTERPRET=1 python tests/benchmarks/gpu_planted.py

Prints a JSON object for each planted error: the verdicts ("ok") of its rows, before and after; then that of
gpu_launched.py, for which it would otherwise take another process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import gpu_launched
import torch

from benchmarks.gpu_stages import exact
from benchmarks.gpu_stages.case import Setup, figures
from lvssl.latents import fused_triton
from lvssl.losses import gpu as loss_kernels
from pipelines.augment import gpu as augment_kernels

SETUP = Setup("exact", "", "", device="cpu", dry=True, seed=11)


def changed(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[(0,) * tensor.ndim] = value
        return tensor

    return change


def scaled(part: int, factor: float) -> Callable[[tuple], tuple]:
    return lambda found: tuple(t * factor if k == part else t for k, t in enumerate(found))


class Sums:
    """Replace `luma_sums` by a version that adds a level to the first block."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(crops: Any, table: Any, orders: Any, sums: Any, *args: Any, **kwargs: Any) -> None:
            self.kernel[grid](crops, table, orders, sums, *args, **kwargs)
            sums[0, 0] += 1 / 255

        return run


def unsteady(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-6 * torch.rand(())


# Name: module, attribute, how it is changed, and the cases that must detect it.
PLANTS: dict[str, tuple[Any, str, Callable[[Any], Any], tuple[str, ...]]] = {
    "one wrong pixel": (
        augment_kernels,
        "augment",
        lambda f: changed(f, spoil(1.0)),
        ("views, 9 px, float32",),
    ),
    "one pixel not written": (
        augment_kernels,
        "augment",
        lambda f: changed(f, spoil(float("nan"))),
        ("views, 9 px, bfloat16",),
    ),
    "a luma one level off": (augment_kernels, "luma_sums", Sums, ("luma",)),
    "a denominator off by 1e-4": (
        loss_kernels,
        "log_sum_exp",
        lambda f: changed(f, lambda x: x + 1e-4),
        ("NT-Xent, 46 x 32, float32", "two blocks"),
    ),
    "a gradient off by one per cent": (
        loss_kernels,
        "gradient",
        lambda f: changed(f, lambda x: 1.01 * x),
        ("NT-Xent, 46 x 32, float32",),
    ),
    "a KL off by 1e-3": (
        fused_triton,
        "forward",
        lambda f: changed(f, scaled(1, 1.001)),
        ("bernoulli head, 3 x 16, K 4",),
    ),
    "a head's gradient off by 1e-3": (
        fused_triton,
        "backward",
        lambda f: changed(f, lambda x: 1.001 * x),
        ("categorical head, 3 x 16, K 4",),
    ),
    "other bits each time": (augment_kernels, "augment", lambda f: changed(f, unsteady), ("fifty repeats",)),
}


def verdicts(names: tuple[str, ...]) -> list[Any]:
    cases = [case for case in exact.cases(SETUP) if case.name in names]
    assert len(cases) == len(names), names
    rows = [{"name": case.name, **row} for case in cases for row in figures(case)]
    # Only the repeats of the views; the other kernels are unchanged.
    return [row["ok"] for row in rows if names != ("fifty repeats",) or "views" in row["name"]]


def main() -> None:
    for name, (where, attribute, change, names) in PLANTS.items():
        before = verdicts(names)
        with patch.object(where, attribute, change(getattr(where, attribute))):
            print(json.dumps({"plant": name, "before": before, "with": verdicts(names)}), flush=True)
    gpu_launched.main()


if __name__ == "__main__":
    sys.exit(main())
