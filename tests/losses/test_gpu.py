"""The Triton kernels without a GPU: interpreted, and compiled ahead of time for sm_80 and sm_90."""

import json

import pytest
import triton_kernels

pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")


def run(script: str, *arguments: str, **environment: str) -> list[dict]:
    lines = triton_kernels.run(f"losses/{script}", *arguments, **environment)
    return [json.loads(line) for line in lines]


def test_interpreted_kernels_are_as_exact_as_the_reference():
    (checks,) = run("kernels_interpreted.py", TRITON_INTERPRET="1")
    assert checks["within the budget"] == 35 and checks["two blocks"] == checks["decoupled"] == "right"


def assert_fits(rows: list[dict]) -> None:
    triton_kernels.assert_fits(rows)
    for row in rows:
        assert row["tensor_cores"], row


def test_kernels_compile_for_a_gpu():
    rows = run("kernels_compiled.py", "128")
    assert {(row["sm"], row["kernel"]) for row in rows} == {
        (sm, kernel) for sm in (80, 90) for kernel in ("log_sum_exp_kernel", "gradient_kernel")
    }
    assert_fits(rows)


@pytest.mark.slow
def test_kernels_of_every_length_compile():
    rows = run("kernels_compiled.py", "32", "64", "256", "512")
    assert {row["d"] for row in rows} == {32, 64, 256, 512}
    assert_fits(rows)
