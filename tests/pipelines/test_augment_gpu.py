"""The augmentation's kernels: interpreted, compiled ahead of time, and, where there is a GPU, run."""

import json
import math
from collections.abc import Callable

import pytest
import torch
import triton_kernels

from pipelines.augment import augment
from pipelines.parameters import BRIGHTNESS, CONTRAST, SATURATION, P
from pipelines.views import ViewSettings

pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")
from pipelines.augment import gpu

# In levels of 1/255. Half precision: the result's own rounding is 0.25 (bf16), the step of solarise 1.
MEAN = {"float32": 0.001, "float16": 0.05, "bfloat16": 0.25}
MAX = {"float32": 0.02, "float16": 1.3, "bfloat16": 1.6}


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    lines = triton_kernels.run(f"pipelines/{script}", *arguments, **environment)
    return [json.loads(line) for line in lines]


def assert_faithful(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        assert row["mean"] <= MEAN[row["dtype"]], row
        assert row["max"] <= MAX[row["dtype"]], row
        assert row["stepped"] < 1e-3, row


def test_interpreted_kernels_are_the_reference():
    rows = run("augment_kernels_interpreted.py", TRITON_INTERPRET="1")
    assert {row["dtype"] for row in rows} == set(MEAN)
    assert_faithful(rows)


@pytest.mark.slow
def test_interpreted_kernels_of_many_sizes():
    cases = (
        "20:24:float32",
        "47:6:bfloat16",
        "65:4:float32",
        "97:3:float16",
        "224:3:bfloat16",
        "512:1:float16",
    )
    assert_faithful(run("augment_kernels_interpreted.py", *cases, TRITON_INTERPRET="1"))


def assert_fits(rows: list[dict]) -> None:
    triton_kernels.assert_fits(rows)
    for row in rows:
        without = row["kernel"] == "luma_sums" or row["side"] < 20
        if row["dtype"] == "fp32" and not gpu.TENSOR_CORES_TAKE_FP32:
            without = True  # see pipelines/augment/gpu.py
        assert row["tensor_cores"] or without, row


def test_kernels_compile_for_a_gpu():
    rows = run("augment_kernels_compiled.py", "224")
    assert {(row["sm"], row["kernel"]) for row in rows} == {
        (sm, kernel) for sm in (80, 90) for kernel in ("luma_sums", "views")
    }
    assert_fits(rows)
    if gpu.TENSOR_CORES_TAKE_FP32:  # older Tritons are refused on a GPU
        assert all(row["coalesced"] for row in rows), rows


@pytest.mark.slow
def test_kernels_of_every_size_compile():
    assert_fits(run("augment_kernels_compiled.py", "8", "32", "96", "512"))


@pytest.mark.gpu
def test_kernels_on_the_gpu_are_the_reference():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert_faithful(run("augment_kernels_interpreted.py", "cuda"))
    assert_faithful(run("augment_kernels_interpreted.py", "cuda", "224:16:bfloat16", "512:2:float32"))


def test_any_number_of_views_fits_the_grid(monkeypatch):
    """Axes y and z of a grid hold at most 65,535 programs, x 2^31 - 1: views belong there."""
    from pipelines.augment import gpu

    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append(grid)

    monkeypatch.setattr(gpu, "views", Kernel())
    monkeypatch.setattr(gpu, "luma_sums", Kernel())
    for count, side in ((70_000, 8), (70_000, 65), (1, 512)):
        view = ViewSettings(resolution=side)
        crops = torch.empty((1, side, side, 3), dtype=torch.uint8).expand(count, -1, -1, -1)
        table, out = torch.zeros(count, P), torch.empty((1, side, side, 3), dtype=torch.bfloat16)
        gpu._launch(crops, table, view, out)
        tiles = (side + 63) // 64
        assert [math.prod(grid) for grid in launched[-2:]] == [
            count * -(-side * side // gpu.SUM_BLOCK),
            count * tiles * tiles,
        ]
    assert all(axis <= 65_535 for grid in launched for axis in grid[1:])


@pytest.mark.gpu
def test_more_views_than_an_axis_holds_on_the_gpu():
    """Each of 66,000 views is the one that it is among few."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    view, generator = ViewSettings(resolution=8), torch.Generator("cuda").manual_seed(0)
    crops = torch.randint(256, (66_000, 8, 8, 3), dtype=torch.uint8, device="cuda", generator=generator)
    table = torch.zeros(66_000, P, device="cuda")
    table[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1.0
    table[:, CONTRAST] += torch.rand(66_000, device="cuda", generator=generator)
    found = augment(crops, table, view, "triton")
    for rows in (slice(0, 64), slice(65_500, 66_000)):
        assert torch.equal(found[rows], augment(crops[rows], table[rows], view, "triton"))
