"""Compare the kernels, in Triton's interpreter, with the reference in fp64. Run by test_gpu.py.

TRITON_INTERPRET=1 python tests/losses/kernels_interpreted.py
"""

import json
import sys

import torch
from error_budget import assert_within_budget, awkward
from triton.runtime.interpreter import InterpretedFunction

from lvssl.losses import anchors, chunked, gpu
from lvssl.losses import ntxent as module
from lvssl.losses.block import Weighed
from lvssl.losses.ntxent import ntxent
from lvssl.losses.variants import decoupled_ntxent

# Logits are kept in units of ln 2 and converted back, which rounds more often than the chunked form. This
# shows in the gradient of tau when all positives are found: terms of 1 / tau^2 cancel (7 ulp at tau = 0.01).
ULP = 2**-20
KINDS = ("duplicates", "zeros", "huge", "tiny", "aligned")
# Images: one, below a tile, around tiles of 64 and 128, several tiles. Length of a vector: one that is
# masked, one that fits, one that is processed in chunks.
SIZES = ((1, 32), (2, 32), (3, 17), (63, 32), (64, 64), (65, 33), (129, 32), (40, 130))


def main() -> None:
    assert isinstance(gpu.log_sum_exp_kernel, InterpretedFunction)
    anchors.engine_of = lambda x: gpu
    module.FAST_FROM = 0
    checked = 0
    for n, (images, d) in enumerate(SIZES):
        # This selects other tiles; the interpreter's dot itself is exact in fp32.
        torch.set_float32_matmul_precision(("highest", "high")[n % 2])
        for temperature in (0.01, 0.1, 10.0) if images < 100 else (0.05,):
            assert_within_budget(ntxent, awkward("aligned", 2 * images, d), temperature, ULP)
            checked += 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in KINDS:
            if dtype == torch.float16 and kind in ("huge", "tiny"):  # out of range
                continue
            assert_within_budget(ntxent, awkward(kind, 46).to(dtype), 0.1, ULP)
            checked += 1
    print(json.dumps({"within the budget": checked, "two blocks": two_blocks(), "decoupled": decoupled()}))


def two_blocks() -> str:
    """Compare rows against another rank's columns, as in the ring, with the chunked engine."""
    blocks = []
    for count in (70, 45):
        x = torch.randn(count, 24)
        blocks.append(Weighed(x, 3 / x.norm(dim=1), 2 + torch.rand(count), torch.rand(count)))
    for rows, columns in (blocks, blocks[::-1]):
        expected = chunked.log_sum_exp(rows, columns, (), 9.0), chunked.gradient(rows, columns, (), 9.0)
        found = gpu.log_sum_exp(rows, columns, (), 9.0), gpu.gradient(rows, columns, (), 9.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return "right"


def decoupled() -> str:
    x = awkward("aligned", 70).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found = decoupled_ntxent(x, 0.2)
    found.backward()
    anchors.engine_of = lambda x: chunked
    expected = decoupled_ntxent(y, 0.2)
    expected.backward()
    torch.testing.assert_close((found, x.grad), (expected, y.grad), rtol=1e-5, atol=1e-6)
    return "right"


if __name__ == "__main__":
    sys.exit(main())
