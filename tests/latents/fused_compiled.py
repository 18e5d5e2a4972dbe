"""Compile the latents' kernels ahead of time, without a GPU; a line of JSON each. Run by test_fused.py.

python tests/latents/fused_compiled.py [categories ...]
"""

import json
import os
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton_kernels import resources, source

from lvssl.latents import family, fused_triton, noise_triton
from lvssl.latents.noise import GAMMA_PROPOSALS

POINTERS = {"keys": "*i64", "rows": "*i64", "packed": "*u8"}
KERNELS = {
    "bernoulli": (fused_triton.bernoulli_kernel, fused_triton.bernoulli_backward_kernel),
    "gaussian": (fused_triton.gaussian_kernel, fused_triton.gaussian_backward_kernel),
    "categorical": (fused_triton.categorical_kernel, fused_triton.categorical_backward_kernel),
}


def compiled(kernel, options: dict, capability: int, count: int = 4) -> dict:
    options = dict(options)
    warps = options.pop("num_warps")
    if "COUNT" in kernel.arg_names:
        options["COUNT"] = count
    integers = {name: "i32" for name in ("D", "G", "width", "size", "stream")}
    pointers = POINTERS | ({"out": "*fp64"} if kernel is noise_triton.log_gammas_kernel else {})
    signature = (
        dict.fromkeys(kernel.arg_names, "*fp32") | pointers | integers | dict.fromkeys(options, "constexpr")
    )
    aligned = [name for name in kernel.arg_names if signature[name].startswith("*")]
    binary = triton.compile(
        source(kernel, signature, options, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    return {"kernel": kernel.__name__, "sm": capability, **options, "shared": binary.metadata.shared,
            **resources(binary.asm["cubin"])}  # fmt: skip


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    for name, kernels in KERNELS.items():
        for categories in map(int, sys.argv[1:] or ("16",)) if name == "categorical" else (16,):
            options = fused_triton.options(family(name, categories=categories), 2048)
            for kernel in kernels:
                for capability in (80, 90):
                    print(json.dumps(compiled(kernel, options, capability)), flush=True)
    options = fused_triton.options(family("gaussian"), 2048)
    for kernel in KERNELS["gaussian"]:  # of many samples: unrolled, they took minutes and spilled
        print(json.dumps(compiled(kernel, options, 90, count=64)), flush=True)
    options = {"PROPOSALS": GAMMA_PROPOSALS, "BLOCK": noise_triton.BLOCK, "num_warps": 4}
    for capability in (80, 90):
        print(json.dumps(compiled(noise_triton.log_gammas_kernel, options, capability)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
