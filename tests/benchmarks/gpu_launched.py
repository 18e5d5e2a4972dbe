"""See which kernels the calls launch that are repeated and run under compute-sanitizer, in the interpreter.

    TRITON_INTERPRET=1 python tests/benchmarks/gpu_launched.py

Prints a JSON object: the kernels there are, those launched, and those that the sanitizer's rows look for.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from benchmarks.gpu_stages import exact
from benchmarks.gpu_stages.case import Setup
from lvssl.latents import fused_triton, noise_triton
from lvssl.losses import gpu as loss_kernels
from pipelines.augment import gpu as augment_kernels
from pipelines.decode import gpu as crop_kernels

SETUP = Setup("exact", "", "", device="cpu", dry=True, seed=11)
MODULES = (augment_kernels, crop_kernels, fused_triton, loss_kernels, noise_triton)


def main() -> None:
    launched, run = set(), GridExecutor.__call__

    def seen(executor: Any, *args: Any, **options: Any) -> Any:
        launched.add(executor.fn.__name__)
        return run(executor, *args, **options)

    with patch.object(GridExecutor, "__call__", seen), exact.kernels_everywhere(SETUP):
        for call in exact.kernel_calls(SETUP, smallest=True).values():
            call()
    there = [
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and not name.startswith("_")
    ]
    print(json.dumps({"there": sorted(there), "launched": sorted(launched), "named": sorted(exact.KERNELS)}))


if __name__ == "__main__":
    sys.exit(main())
