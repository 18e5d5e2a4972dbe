"""The time that a call takes on the device, and its theoretical minimum."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_stages.case import Row, Setup

CACHE = 60 * 2**20  # L2 cache of an H200 in bytes, the largest of the intended cards


def timed(setup: Setup, call: Callable[[], Any]) -> Row:
    """Median seconds of a call, with quantiles at 0.2 and 0.8.

    On a GPU it uses `triton.testing.do_bench`, which warms up, measures with events and empties the cache
    before each call; on a CPU, the median of three calls.
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
    """Call one after the other, each with its own inputs."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def sets_beyond_cache(size: int) -> int:
    """The number of input sets of `size` bytes that exceed the L2 cache three times; at most 16."""
    return max(1, min(16, -(-3 * CACHE // max(size, 1))))


def peak_memory(setup: Setup, call: Callable[[], Any]) -> Row:
    """Device memory in bytes that a call takes in addition to what was there before."""
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
    """Bytes and operations of the call, the resulting floor, and how close the measured time comes to it."""
    floor = max(moved / best["bytes"], operations / best["operations"])
    return {
        **row,
        "bytes": moved,
        "operations": operations,
        "floor_seconds": floor,
        "share_of_ceiling": floor / row["seconds"],
    }
