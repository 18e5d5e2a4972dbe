"""The engine in Triton: as in flash attention, tiles of logits never leave the chip.

Each program owns BLOCK_M rows and loops over all columns. Nothing is summed between programs, so results are
the same from run to run. Vectors are read as given: their normalisation and the temperature are applied to
the logits, as one factor for the row and one for the column, so that 16-bit vectors go into the tensor cores
without further rounding. Sums are kept in fp32.

What is rounded before a dot product, and by how much at most, relative to its value (by the formats; verified
on an H100):

    vectors   precision   logits               shares times vectors
    bf16      any         nothing              shares, 2^-8
    fp16      any         nothing              as fp32, with the precision of fp32
    fp32      tf32x3      2^-22                2^-22
    fp32      tf32        2^-11 each           2^-11 each

fp32 vectors follow `torch.get_float32_matmul_precision()`: "highest" is tf32x3, "high" and "medium" are tf32.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvssl.losses.block import Block, Weighed

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(x, index, count, k, d, UPCAST: tl.constexpr):
    """Load numbers k of vectors `index`, [len(index), len(k)], with zeros where there are none."""
    inside = (index < count)[:, None] & (k < d)[None, :]
    vectors = tl.load(x + index.to(tl.int64)[:, None] * d + k[None, :], mask=inside, other=0.0)
    return vectors.to(tl.float32) if UPCAST else vectors


@triton.jit
def _logits(
    rows, x, i, of_row, M, y, j, of_column, N, d, half,
    D: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, DECOUPLED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """v_i . v_j in units of ln 2, -inf where i and j are not compared. Uses `rows` if CHUNK is all of D."""
    if CHUNK == D:
        found = tl.dot(rows, tl.trans(_load(y, j, N, tl.arange(0, D), d, UPCAST)), input_precision=PRECISION)
    else:
        found = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
        for first in range(0, D, CHUNK):
            k = first + tl.arange(0, CHUNK)
            row_chunk = _load(x, i, M, k, d, UPCAST)
            column_chunk = _load(y, j, N, k, d, UPCAST)
            found = tl.dot(row_chunk, tl.trans(column_chunk), found, input_precision=PRECISION)
    found = found * (of_row * LOG2E)[:, None] * of_column[None, :]
    compared = (j < N)[None, :]
    if OWN:
        compared = compared & (i[:, None] != j[None, :])
    if DECOUPLED:
        apart = i[:, None] - j[None, :]
        compared = compared & (apart != half) & (apart != -half)
    return tl.where(compared, found, float("-inf"))


@triton.jit
def log_sum_exp_kernel(
    x, of_rows, y, of_columns, out, M, N, d, half,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr,
    DECOUPLED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out_i = log sum_j exp(v_i . v_j), by a running maximum and sum over the columns."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = _load(x, i, M, tl.arange(0, CHUNK), d, UPCAST)
    of_row = tl.load(of_rows + i, mask=i < M, other=0.0)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        of_column = tl.load(of_columns + j, mask=j < N, other=0.0)
        logits = _logits(
            rows, x, i, of_row, M, y, j, of_column, N, d, half, D, CHUNK, OWN, DECOUPLED, PRECISION, UPCAST
        )
        higher = tl.maximum(highest, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was compared so far
        total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        highest = higher
    tl.store(out + i, (highest + tl.log2(total)) / LOG2E, mask=i < M)


@triton.jit
def gradient_kernel(
    x, of_rows, row_denominators, row_weights,
    y, of_columns, column_denominators, column_weights, out, M, N, d, half,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr,
    DECOUPLED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j (g_i exp(v_i . v_j - denominator_i) + g_j exp(v_i . v_j - denominator_j)) v_j.

    A program computes CHUNK numbers of its rows; if d is longer, each of its programs computes the logits.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = _load(x, i, M, tl.arange(0, CHUNK), d, UPCAST)
    of_row = tl.load(of_rows + i, mask=i < M, other=0.0)
    row_denominator = tl.load(row_denominators + i, mask=i < M, other=0.0) * LOG2E
    row_weight = tl.load(row_weights + i, mask=i < M, other=0.0)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    grad = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        of_column = tl.load(of_columns + j, mask=j < N, other=0.0)
        column_denominator = tl.load(column_denominators + j, mask=j < N, other=0.0) * LOG2E
        column_weight = tl.load(column_weights + j, mask=j < N, other=0.0)
        logits = _logits(
            rows, x, i, of_row, M, y, j, of_column, N, d, half, D, CHUNK, OWN, DECOUPLED, PRECISION, UPCAST
        )
        shares = tl.exp2(logits - row_denominator[:, None]) * row_weight[:, None]
        shares += tl.exp2(logits - column_denominator[None, :]) * column_weight[None, :]
        shares *= of_column[None, :]
        columns = _load(y, j, N, k, d, UPCAST)
        if columns.dtype == tl.float16:  # shares of a large batch underflow it
            grad = tl.dot(shares, columns.to(tl.float32), grad, input_precision=PRECISION)
        else:
            grad = tl.dot(shares.to(columns.dtype), columns, grad, input_precision=PRECISION)
    inside = (i < M)[:, None] & (k < d)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * d + k[None, :], grad, mask=inside)


def log_sum_exp(rows: Block, columns: Block, excluded: tuple[int, ...], bound: float) -> Tensor:
    """As `chunked.log_sum_exp`; `bound` isn't used."""
    out = torch.empty_like(rows.factors)
    sizes = (len(rows.x), len(columns.x), rows.x.shape[1], max(excluded, default=0))
    launch = launch_options(rows.x.shape[1], rows.x.dtype, backward=False)
    grid = (triton.cdiv(len(rows.x), launch["BLOCK_M"]),)
    if grid[0]:
        with torch.cuda.device_of(out):  # Triton launches on the current device, which may be another
            log_sum_exp_kernel[grid](
                rows.x, rows.factors, columns.x, columns.factors, out, *sizes, **compared(excluded), **launch
            )
    return out


def gradient(rows: Weighed, columns: Weighed, excluded: tuple[int, ...], bound: float) -> Tensor:
    """As `chunked.gradient`; `bound` isn't used."""
    out = torch.empty(rows.x.shape, dtype=torch.float32, device=rows.x.device)
    sizes = (len(rows.x), len(columns.x), rows.x.shape[1], max(excluded, default=0))
    launch = launch_options(rows.x.shape[1], rows.x.dtype, backward=True)
    grid = (triton.cdiv(len(rows.x), launch["BLOCK_M"]), launch["D"] // launch["CHUNK"])
    if grid[0]:
        with torch.cuda.device_of(out):
            gradient_kernel[grid](
                rows.x, *rows.per_vector(), columns.x, *columns.per_vector(), out,
                *sizes, **compared(excluded), **launch,
            )  # fmt: skip
    return out


def compared(excluded: tuple[int, ...]) -> dict[str, bool]:
    """The kernels' flags for what is excluded: the anchor itself, it and its positive, or nothing."""
    return {"OWN": bool(excluded), "DECOUPLED": len(excluded) > 1}


def launch_options(d: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """Return tile, warps, stages and precision, chosen to avoid spills within an A100's shared memory.

    Vectors of up to 128 numbers are kept on the chip whole. Longer ones are taken CHUNK numbers at a time,
    and the backward pass recomputes the logits for each; with tf32x3, which splits operands, the limit is 32.
    """
    D = max(16, triton.next_power_of_2(d))
    wide = dtype == torch.float32 or (dtype == torch.float16 and backward)
    exact = torch.get_float32_matmul_precision() == "highest" and wide
    chunk = min(D, 32 if exact else 128)
    if exact:
        tile = (64, 32, 4, 1)
    elif wide:
        tile = (64, 32, 8, 1) if backward else (64, 64, 4 if D <= 128 else 8, 2)
    else:
        tile = (64, 64, 4 if D <= 128 else 8, 2) if backward else (128, 64, 8, 2)
    return {
        "D": D,
        "CHUNK": chunk,
        **dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile)),
        "PRECISION": "tf32x3" if exact else "tf32",
        # The interpreter's dot is wrong on bf16; a GPU gains nothing from upcasting.
        "UPCAST": os.environ.get("TRITON_INTERPRET") == "1",
    }
