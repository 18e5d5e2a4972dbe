"""Helpers for the tests of Triton kernels: run scripts in their own processes, check resources.

The processes are needed because the variable that selects the interpreter must be set before Triton's import.
"""

import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Shared memory available to a block: A100 (sm_80) 163 KiB, H100 (sm_90) 227 KiB.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    """Return the lines printed by a script of tests/. Skips if Triton itself is at fault."""
    done = process(script, *arguments, **environment)
    if done.returncode and "TRITON_INTERPRET" in environment:
        skip_at_a_fault_of_the_interpreter(done.stderr)
    if done.returncode == -signal.SIGABRT and triton_version() < (3, 6):
        # This is an assertion in the compiler's C++, not a raised error: 3.2 can't compile all kernels.
        name = f"the compiler of Triton {metadata.version('triton')}"
        pytest.skip(f"{name} aborts: {last_line(done.stderr)[:150]}")
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout.splitlines()


def triton_version() -> tuple[int, ...]:
    return tuple(map(int, metadata.version("triton").split(".")[:2]))


def process(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
    return subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        timeout=900,
    )


def skip_at_a_fault_of_the_interpreter(stderr: str) -> None:
    """Skip if a kernel that only loops fails with the same error as the kernels under test."""
    loop = process("interpreted_loop.py", TRITON_INTERPRET="1")
    if loop.returncode and last_line(loop.stderr) == last_line(stderr):
        versions = f"Triton {metadata.version('triton')} with NumPy {metadata.version('numpy')}"
        pytest.skip(f"{versions}: Triton's interpreter can't run a loop: {last_line(stderr)}")


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def source(kernel, signature: dict[str, str], constants: dict[str, object], aligned: Iterable[str] = ()):
    """Return the input of `triton.compile`: argument types, values known at compile time, multiples of 16.

    Args:
        signature: the type of each argument; "constexpr" for those in `constants`.
    """
    from triton.compiler import ASTSource

    signature = {name: signature[name] for name in kernel.arg_names}
    place = kernel.arg_names.index
    if "constexprs" in inspect.signature(ASTSource).parameters:
        attributes = {(place(name),): [["tt.divisibility", 16]] for name in aligned}
        values = {(place(name),): value for name, value in constants.items()}
        return ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor  # Triton 3.2

    attributes = AttrsDescriptor.from_hints({place(name): 16 for name in aligned})
    return ASTSource(kernel, signature=signature, constants=constants, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers per thread and bytes of stack (for spilled registers), from Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def assert_fits(rows: list[dict]) -> None:
    """Assert that nothing is spilled and that shared memory is within the limit of a block."""
    assert rows
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["sm"]], row
