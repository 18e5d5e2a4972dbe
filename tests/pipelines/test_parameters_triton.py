"""The stream in Triton against numba's, bit for bit: interpreted here, compiled for two GPUs, run on one."""

import os
import subprocess
import sys

import pytest
import torch

COMPARE = """
import sys
import numpy as np, torch
from pipelines.parameters import uniforms
from pipelines.parameters_triton import draw_uniforms

device = sys.argv[1]
indices = np.array([0, 1, 7, 1_281_166, 2**31 - 1, 2**31, 2**32 + 5, 2**40 + 3] + list(range(500)), np.int64)
seeds = (0, 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1)
for seed, epoch, block in zip(seeds, (0, 1, 99, 2**32 - 1, 2**31, 5, 2**20), (0, 1, 2, 16, 25, 0, 17)):
    ours = draw_uniforms(seed, epoch, torch.from_numpy(indices).to(device), block).cpu().numpy()
    for row in [*range(12), 507]:
        for view in range(2):
            expected = np.array(uniforms(np.uint64(seed), np.uint64(epoch), indices[row], view, block))
            assert np.array_equal(ours[row, view], expected), (seed, epoch, block, row, view)
print("equal")
"""


def compare(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, device], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr


def test_interpreted_it_is_numbas_stream():
    pytest.importorskip("triton")
    compare("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_it_is_numbas_stream():
    compare("cuda")


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_that_arent_here(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton_kernels import source

    from pipelines.parameters_triton import _draw_from

    types = {"keys": "*i64", "indices": "*i64", "out": "*fp32", "count": "i32"}
    types |= {"VIEWS": "constexpr", "BLOCK": "constexpr"}
    given = source(_draw_from, types, {"VIEWS": 2, "BLOCK": 256})
    compiled = triton.compile(given, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
