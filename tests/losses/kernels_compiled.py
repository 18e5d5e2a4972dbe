"""Compile the loss's kernels ahead of time, without a GPU; a JSON object per kernel. Run by test_gpu.py.

python tests/losses/kernels_compiled.py [d ...]
"""

import json
import os
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_kernels import resources, source

from lvssl.losses import gpu

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOATS = {
    gpu.log_sum_exp_kernel: ("of_rows", "of_columns", "out"),
    gpu.gradient_kernel: (
        "of_rows", "row_denominators", "row_weights",
        "of_columns", "column_denominators", "column_weights", "out",
    ),
}  # fmt: skip


def compiled(kernel, capability: int, d: int, dtype: torch.dtype, matmul_precision: str) -> dict:
    """Return registers, spilled bytes and shared memory of one kernel."""
    torch.set_float32_matmul_precision(matmul_precision)
    options = gpu.launch_options(d, dtype, backward=kernel is gpu.gradient_kernel)
    options |= {"UPCAST": False, "OWN": True, "DECOUPLED": False}
    tuning = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"x": f"*{NAMES[dtype]}", "y": f"*{NAMES[dtype]}"}
    signature |= dict.fromkeys(FLOATS[kernel], "*fp32") | dict.fromkeys(options, "constexpr")
    # As on a GPU: pointers and d are multiples of 16.
    aligned = [n for n in kernel.arg_names if signature[n].startswith("*") or n == "d"]
    binary = triton.compile(
        source(kernel, signature, options, aligned), target=GPUTarget("cuda", capability, 32), options=tuning
    )
    return {
        "kernel": kernel.__name__, "sm": capability, "d": d, "dtype": NAMES[dtype],
        "precision": options["PRECISION"],
        "shared": binary.metadata.shared, **resources(binary.asm["cubin"]), **tuning,
        "tile": [options["BLOCK_M"], options["BLOCK_N"]],
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma)", binary.asm["ptx"])),
    }  # fmt: skip


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for kernel in FLOATS:
        for capability in (80, 90):
            for d in map(int, sys.argv[1:] or ("32", "64", "128", "256", "512")):
                for dtype in NAMES:
                    for precision in ("highest", "high") if dtype != torch.bfloat16 else ("high",):
                        print(json.dumps(compiled(kernel, capability, d, dtype, precision)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
