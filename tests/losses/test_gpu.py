"""The Triton kernels without a GPU: interpreted, and compiled ahead of time for sm_80 and sm_90.

Both in processes of their own: the interpreter is chosen by a variable that must be set before the import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")

# Shared memory a block may have: A100 (sm_80) 163 KiB, H100 (sm_90) 227 KiB.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def run(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])} | environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted_kernels_are_as_exact_as_the_reference():
    checks = json.loads(run("kernels_interpreted.py", TRITON_INTERPRET="1"))
    assert checks["within the budget"] == 35 and checks["two blocks"] == checks["decoupled"] == "right"


def assert_fits(rows: list[dict]) -> None:
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["sm"]], row
        assert row["tensor_cores"], row


def test_kernels_compile_for_a_gpu():
    rows = [json.loads(line) for line in run("kernels_compiled.py", "128").splitlines()]
    assert {(row["sm"], row["kernel"]) for row in rows} == {
        (sm, kernel) for sm in (80, 90) for kernel in ("log_sum_exp_kernel", "gradient_kernel")
    }
    assert_fits(rows)


@pytest.mark.slow
def test_kernels_of_every_length_compile():
    rows = [json.loads(line) for line in run("kernels_compiled.py", "32", "64", "256", "512").splitlines()]
    assert {row["d"] for row in rows} == {32, 64, 256, 512}
    assert_fits(rows)
