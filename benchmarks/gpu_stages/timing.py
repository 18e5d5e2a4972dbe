"""How long a call takes on the device, and what it could take at best."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_stages.case import Row, Setup

CACHE = 60 * 2**20  # bytes of an H200's second-level cache, the largest of the cards this is meant for


def timed(setup: Setup, call: Callable[[], Any]) -> Row:
    """Median seconds of a call, with quantiles at 0.2 and 0.8.

    On a GPU by `triton.testing.do_bench`, which warms up, measures with events and empties the cache before
    each call; on a CPU the median of three.
    """
    if setup.device == "cuda":
        from triton.testing import do_bench

        middle, low, high = (ms / 1e3 for ms in do_bench(call, 10, 60, quantiles=[0.5, 0.2, 0.8]))
        return {"seconds": middle, "low": low, "high": high}
    call()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times), "low": min(times), "high": max(times)}


def rotated(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other, each with inputs of its own."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def sets_beyond_cache(size: int) -> int:
    """How many sets of inputs of `size` bytes exceed the second-level cache three times; at most 16."""
    return max(1, min(16, -(-3 * CACHE // max(size, 1))))


def peak_memory(setup: Setup, call: Callable[[], Any]) -> Row:
    """Bytes that a call takes on the device beyond what was there before it."""
    if setup.device != "cuda":
        return {"peak_mib": None}
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def view_bytes(side: int, dtype: torch.dtype) -> int:
    """Bytes that an augmented view with contrast reads and writes: the crop twice, the output once."""
    return 3 * side * side * (2 + dtype.itemsize)


def against_floor(row: Row, moved: float, operations: float, best: Row) -> Row:
    """Bytes and operations of the call, the floor that they set, and how near the measured time comes."""
    floor = max(moved / best["bytes"], operations / best["operations"])
    return {
        **row,
        "bytes": moved,
        "operations": operations,
        "floor_seconds": floor,
        "share_of_ceiling": floor / row["seconds"],
    }
