"""Parameters for tests that run on a CPU and, if there is one, on a GPU."""

import pytest
import torch

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
on_cpu_and_gpu = pytest.mark.parametrize("device", ["cpu", GPU])
