"""Crops of JPEGs decoded on a GPU: the kernel interpreted and compiled ahead of time; on a GPU all of it."""

import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch
import triton_kernels

from pipelines.augment import augmenter_for
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, TwoViewLoader, evaluation_batches
from pipelines.views import ViewSettings

pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
VIEW = ViewSettings(resolution=24)


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    return [json.loads(line) for line in triton_kernels.run(f"pipelines/{script}", *arguments, **environment)]


def assert_nearest(rows: Iterable[dict]) -> None:
    """Kernel and CPU are the nearest levels to the exact crop, as far as rounding lets them."""
    for row in rows:
        assert row["kernel"] <= 1 and row["cpu"] <= 1, row
        assert row["levels"] <= 1 and row["differ"] < 0.02, row


def assert_exact(rows: list[dict], mean: float) -> None:
    """`mean`: levels by which the readers may differ, whose decoders may be two."""
    found = {row.pop("case"): row for row in rows}
    empty, reader = found.pop("empty"), found.pop("reader")
    assert len(found) == 7
    assert_nearest(found.values())
    assert empty["shapes"] == [[0, 2, 9, 9, 3], [1, 0, 9, 9, 3]]
    assert reader["tensor is the array"] and reader["mean"] < mean, reader


def test_the_interpreted_kernel_crops_as_the_cpu_does():
    assert_exact(run("crop_kernel_interpreted.py", TRITON_INTERPRET="1"), mean=0.01)


def test_the_kernel_compiles_for_a_gpu():
    rows = run("crop_kernel_compiled.py", "32", "224")
    assert {(row["sm"], row["side"]) for row in rows} == {(sm, side) for sm in (80, 90) for side in (32, 224)}
    triton_kernels.assert_fits(rows)
    if triton_kernels.triton_version() >= (3, 6):  # older ones are refused on a GPU
        assert all(row["coalesced"] for row in rows), rows


def test_nvjpeg_wants_a_gpu(sources):
    with pytest.raises(InputError, match="decodes on a GPU, not on cpu: use --source auto"):
        open_reader(sources["folder"], "nvjpeg", "cpu")


def test_a_rank_decodes_on_its_own_gpu(sources):
    for name, expected in (("cuda", "cuda:0"), ("cuda:3", "cuda:3")):
        assert open_reader(sources["folder"], "nvjpeg", name).device == expected


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=gpu) for kind in ("nvjpeg", "dali")])
def test_on_the_gpu_an_epoch_is_the_same(sources, kind):
    """Batches and their parameters to the bit, pixels but for the decoder, in training and in evaluation."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    device = torch.device("cuda", 0)
    ours, theirs = open_reader(sources["folder"]), open_reader(sources["folder"], kind, "cuda:0")
    settings = LoaderSettings(8, workers=3, augmenter=augmenter_for(device), device=device)
    with TwoViewLoader(ours, VIEW, settings) as expected, TwoViewLoader(theirs, VIEW, settings) as found:
        for epoch in range(2):
            for loader in (expected, found):
                loader.set_epoch(epoch)
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one.indices, other.indices)
                assert torch.equal(one.parameters, other.parameters)
                assert (one.views - other.views).abs().mean() < 0.05  # of a standard deviation of pixels
    pairs = zip(evaluation_batches(ours, VIEW, 16), evaluation_batches(theirs, VIEW, 16), strict=True)
    for (one, rows), (other, same) in pairs:
        assert np.array_equal(rows, same) and other.is_cuda
        assert (one.float() - other.cpu().float()).abs().mean() < 3


@pytest.mark.slow
def test_the_interpreted_kernel_crops_to_and_from_every_size():
    assert_nearest(run("crop_kernel_interpreted.py", "160:90:8", "97:203:65", TRITON_INTERPRET="1"))


@pytest.mark.gpu
def test_the_kernel_on_the_gpu_crops_as_the_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert_exact(run("crop_kernel_interpreted.py", "cuda"), mean=3.0)
    assert_nearest(run("crop_kernel_interpreted.py", "cuda", "400:500:224", "500:375:32", "97:203:65"))
