"""A loop up to a number passed to the kernel, in Triton's interpreter; some versions can't run it.

    TRITON_INTERPRET=1 python tests/interpreted_loop.py

Triton 3.6 with NumPy 2.4 fails here with its own TypeError. Run by triton_kernels.py.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def counting(out, n):
    count = 0
    for _ in range(0, n):
        count += 1
    tl.store(out, count)


if __name__ == "__main__":
    found = torch.zeros(1, dtype=torch.int32)
    counting[(1,)](found, 3)
    assert found.item() == 3
