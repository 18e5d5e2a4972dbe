"""Compile the crop kernel ahead of time, without a GPU; prints a JSON object per size and architecture.

    python tests/pipelines/crop_kernel_compiled.py [side ...]

Run by test_decode_gpu.py.
"""

import json
import os
import sys

import triton
from augment_kernels_compiled import coalesced
from triton.backends.compiler import GPUTarget
from triton_kernels import resources, source

from pipelines.decode import gpu


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for side in map(int, sys.argv[1:] or ("8", "32", "224", "512")):
        for capability in (80, 90):
            signature = {"table": "*i64", "out": "*u8", "SIDE": "constexpr", "BLOCK": "constexpr"}
            given = source(gpu.crops, signature, {"SIDE": side, "BLOCK": gpu.BLOCK}, ("table", "out"))
            binary = triton.compile(
                given, target=GPUTarget("cuda", capability, 32), options={"num_warps": gpu.WARPS}
            )
            row = {"sm": capability, "side": side, "shared": binary.metadata.shared}
            row |= resources(binary.asm["cubin"]) | {"coalesced": coalesced(binary.asm["ttgir"])}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
