"""Compile in advance, while the tests run: later stages find the artefacts on disk.

The parent gives all stages the same folder for the artefacts of inductor and Triton; numba keeps its own next
to the source.
"""

import time
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu_stages import steps, times
from benchmarks.gpu_stages.case import Case, Row, Setup


def cases(setup: Setup) -> Iterator[Case]:
    for work in steps.works(setup):
        yield Case(f"the loader, {work.name}", partial(loader, setup, work), seconds=120)
    for work in steps.works(setup):
        yield Case(f"compile {work.name}", partial(network, setup, work), seconds=180)
    for count in times.compiled_sizes(setup):
        for form in times.loss_forms(setup):
            if form.startswith("compiled"):
                yield Case(f"{form}, {count}", partial(matrix, setup, form, count), seconds=120)


def loader(setup: Setup, work: steps.Work) -> Row:
    """Make and convert images, and load a first batch, which compiles numba's functions."""
    started = time.perf_counter()
    batches = steps.through_loader(setup, work)
    shape = next(batches).views.shape
    batches.close()
    return {"ok": tuple(shape[:2]) == (2, work.batch), "seconds": time.perf_counter() - started}


def network(setup: Setup, work: steps.Work) -> Row:
    """Run the first step of the engine with --compile."""
    step = steps.engine(setup, work, "compiled")
    batch = steps.synthetic(setup, work)[0]
    started = steps.now(setup)
    step(batch)
    return {"ok": True, "seconds": steps.now(setup) - started}


def matrix(setup: Setup, form: str, count: int) -> Row:
    call = times.loss_forms(setup)[form](count)
    started = steps.now(setup)
    call()
    return {"ok": True, "seconds": steps.now(setup) - started}
