"""Compile the augmentation's kernels ahead of time, without a GPU; prints a JSON object per kernel.

    python tests/pipelines/augment_kernels_compiled.py [side ...]

Run by test_augment_gpu.py.
"""

import json
import os
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_kernels import resources, source

from pipelines.augment import gpu
from pipelines.views import ViewSettings

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compiled(kernel, capability: int, side: int, dtype: torch.dtype) -> dict:
    """Return registers, spilled bytes and shared memory of one kernel."""
    view = ViewSettings(resolution=side)
    options = gpu.sum_options(side) if kernel is gpu.luma_sums else gpu.view_options(view, side, dtype)
    warps = options.pop("num_warps")
    pointers = {
        "crops": "*u8",
        "table": "*fp32",
        "orders": "*i32",
        "sums": "*fp32",
        "out": f"*{NAMES[dtype]}",
    }
    signature = {name: pointers.get(name, "fp32") for name in kernel.arg_names} | {"stride": "i32"}
    signature |= dict.fromkeys(options, "constexpr")
    aligned = [name for name in kernel.arg_names if signature[name].startswith("*")]
    binary = triton.compile(
        source(kernel, signature, options, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    return {
        "kernel": kernel.__name__, "sm": capability, "side": side, "dtype": NAMES[dtype], "warps": warps,
        "shared": binary.metadata.shared, **resources(binary.asm["cubin"]),
        "coalesced": coalesced(binary.asm["ttgir"]),
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma)", binary.asm["ptx"])),
    }  # fmt: skip


def coalesced(ttgir: str) -> bool:
    """Return whether the threads of a warp access adjacent memory in all reads and writes of tensors."""
    lanes = dict(
        re.findall(
            r"^(#\w+) = #(?:ttg|triton_gpu)\.blocked<\{.*?threadsPerWarp = \[([\d, ]+)\]", ttgir, re.MULTILINE
        )
    )
    moved = re.findall(r"tt\.(?:load|store).*?tensor<(?:\d+x)+!tt.ptr<(?:i8|bf16|f16|f32)>, (#\w+)>", ttgir)
    return bool(moved) and all(lanes[layout].split(", ")[-1] == "32" for layout in moved)


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for side in map(int, sys.argv[1:] or ("8", "32", "224", "512")):
        for capability in (80, 90):
            print(json.dumps(compiled(gpu.luma_sums, capability, side, torch.bfloat16)), flush=True)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                print(json.dumps(compiled(gpu.views, capability, side, dtype)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
