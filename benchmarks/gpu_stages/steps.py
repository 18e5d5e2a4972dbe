"""Whole training steps: the engine eager, recorded as a CUDA graph and compiled, on prepared batches and with
the loader; a bare loop; and the pipeline commonly used.

images_per_second  with two views each
mfu                the backbone's operations, forward and backward, over the card's dense bf16 peak
launches, busy     from torch.profiler: kernels and copies per step; share of the time in which one ran
waiting            share of the time in which the host waited for a batch
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_stages import today
from benchmarks.gpu_stages.case import Case, Row, Setup
from pipelines.cores import loader_threads

Step = Callable[[Any], Any]  # takes a batch
CLASSES = 10
WARM_UP = 6  # steps; the first are slow, and make the recordings


@dataclass(frozen=True)
class Work:
    name: str
    preset: str
    backbone: str
    side: int
    batch: int  # images
    steps: int  # that are timed


def works(setup: Setup) -> tuple[Work, ...]:
    if setup.dry:
        return (Work("tiny, 16 px, 16 images", "cifar10-small", "tiny", 16, 16, 3),)
    return (
        Work("ResNet-50, 224 px, 256 images", "folder-r50", "resnet50", 224, 256, 12),
        Work("ResNet-18, 32 px, 512 images", "cifar10-r18", "resnet18", 32, 512, 60),
    )


def cases(setup: Setup) -> Iterator[Case]:
    """The most important first, so that an interrupted stage has these."""
    large, small = works(setup)[0], works(setup)[-1]

    def case(how: str, work: Work) -> Case:
        return Case(f"engine, {how}, {work.name}", partial(engine_rows, setup, work, how), seconds=120)

    for work in works(setup):
        yield case("eager", work)
    for work in reversed(works(setup)):
        yield case("recorded", work)
    yield Case(f"bare loop, {large.name}", partial(bare, setup, large))
    yield case("compiled", large)
    yield Case(f"what people have today, {small.name}", partial(what_people_have, setup, small))
    for how in ("recorded, beta", "recorded, vmf"):  # their keyed noise is many small operations
        yield case(how, small)
    if large != small:
        yield Case(f"bare loop, {small.name}", partial(bare, setup, small))
        yield case("compiled", small)
    for how in ("compiled and recorded", "deterministic"):  # the latter last, as it affects its whole process
        for work in works(setup):
            yield case(how, work)


def settings_of(setup: Setup, work: Work, how: str = "eager") -> Any:
    from benchmarks.engine import LOG_EVERY
    from lvssl.settings.pretrain import EngineSettings, preset

    base = preset(work.preset)
    family = how.rpartition(", ")[2] if ", " in how else base.latent.family
    return replace(
        base,
        batch_size=work.batch,
        device=setup.device,
        out=Path(setup.scratch) / "steps",
        checkpoint_minutes=1e6,
        log_every=LOG_EVERY,
        latent=replace(base.latent, family=family, beta_schedule="constant"),  # as after warm-up
        model=replace(base.model, backbone=work.backbone),
        view=replace(base.view, resolution=work.side),
        engine=EngineSettings(
            compile="on" if "compiled" in how else "off",
            graph="on" if "recorded" in how else "off",
            deterministic=how == "deterministic",
        ),
    )


def engine(setup: Setup, work: Work, how: str = "eager") -> Step:
    """The engine's work for a batch, between its log lines and its checks for signals."""
    from benchmarks.engine import LOG_EVERY, Batches, engine_step
    from lvssl.training.trainer import Trainer

    settings = settings_of(setup, work, how)
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, CLASSES, cast(Any, Batches()), place(setup))
    trainer.step = LOG_EVERY - WARM_UP + 1  # so that a logged step is among the untimed ones
    return engine_step(trainer)


def synthetic(setup: Setup, work: Work, count: int = 2) -> list[Any]:
    """Noise in the loader's layout and type, on the device."""
    from pipelines.loader import ViewBatch

    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    made = []
    for _ in range(count):
        shape = (2, work.batch, work.side, work.side, 3)
        views = torch.randn(shape, device=setup.device, dtype=dtype).permute(0, 1, 4, 2, 3)
        labels = torch.randint(CLASSES, (work.batch,), device=setup.device)
        indices = torch.arange(work.batch, device=setup.device)
        made.append(ViewBatch(views, labels, indices, torch.empty(0, device=setup.device)))
    return made


class Endless:
    """Endless batches, and the seconds spent waiting for them."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.batches = loader, iter(loader)

    def __next__(self) -> Any:
        while (batch := next(self.batches, None)) is None:
            self.batches = iter(self.loader)
        return batch

    def __iter__(self) -> Iterator[Any]:
        return self

    @property
    def waited(self) -> float:
        return self.loader.waited

    def close(self) -> None:
        cast(Any, self.batches).close()
        self.loader.close()


def through_loader(setup: Setup, work: Work) -> Endless:
    """Batches from a few hundred images, repeated, through the project's own path."""
    from benchmarks.gpu_stages import images
    from lvssl.runs.labels import Subset
    from pipelines.augment import augmenter_for
    from pipelines.decode import open_reader
    from pipelines.loader import LoaderSettings, TwoViewLoader

    given = setup.images if work.side > 64 else ""
    path = given or images.beton(Path(setup.scratch) / "images", 32 if setup.dry else 384, work.side)
    source = open_reader(path)
    subset = Subset(source, np.resize(np.arange(len(source)), 200 * work.batch))
    subset.labels = subset.labels % CLASSES  # the classes that the network has
    device = place(setup)
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    return Endless(TwoViewLoader(
        cast(Any, subset), settings_of(setup, work).view, LoaderSettings(work.batch,
        augmenter=augmenter_for(device, "auto", dtype), device=device,
    )))  # fmt: skip


def engine_rows(setup: Setup, work: Work, how: str) -> Iterator[Row]:
    step = engine(setup, work, how)
    row = measured(setup, work, step, cycle(synthetic(setup, work)))
    yield {"name": f"engine, synthetic, {how}, {work.name}", **row}
    batches = through_loader(setup, work)
    row = measured(setup, work, step, batches)
    batches.close()
    yield {"name": f"engine, loader, {how}, {work.name}", "workers": loader_threads(), **row}


def bare(setup: Setup, work: Work) -> Row:
    """A minimal hand-written loop with the same network, loss and optimiser."""
    from benchmarks.engine import bare_step

    step = bare_step(settings_of(setup, work), place(setup))
    return measured(setup, work, step, cycle(synthetic(setup, work)))


def what_people_have(setup: Setup, work: Work) -> Row:
    step, batches, row = today.pipeline(setup, work, settings_of(setup, work), place(setup))
    found = measured(setup, work, step, batches)
    batches.close()
    return {**row, **found}


def measured(setup: Setup, work: Work, step: Step, batches: Iterator[Any]) -> Row:
    """Speed over two stretches of steps, and the profiler's figures for three more."""
    from lvssl.models.utilisation import operations, peak_flops

    numbers = 2 * work.batch * operations(work.backbone, work.side)
    for _ in range(2 if setup.dry else WARM_UP):
        loss = step(next(batches))
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stretches = [stretch(setup, work, step, batches) for _ in range(2)]
    seconds, waited = (sum(s[k] for s in stretches) / 2 for k in range(2))
    row: Row = {
        "ok": True,
        "images_per_second": work.batch / seconds,
        "seconds": seconds,
        "us_per_view": 1e6 * seconds / (2 * work.batch),
        "spread": abs(stretches[0][0] - stretches[1][0]) / seconds,
        "waiting": waited / seconds,
    }
    if setup.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        best = peak_flops(place(setup))
        row["mfu"] = numbers / seconds / best if best else None
    if isinstance(loss, Tensor):
        row["ok"] = bool(loss.isfinite())
    return row | {"tflop_per_step": numbers / 1e12} | profiled(setup, step, batches)


def stretch(setup: Setup, work: Work, step: Step, batches: Iterator[Any]) -> tuple[float, float]:
    """Seconds per step, and the host's share of waiting for a batch: by the loader's own measurement if it
    has one, because on a GPU the loader also limits how far the host runs ahead."""
    started, waited = now(setup), 0.0
    before = getattr(batches, "waited", None)
    for _ in range(work.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    if before is not None:
        waited = cast(Endless, batches).waited - before
    return (now(setup) - started) / work.steps, waited / work.steps


def place(setup: Setup) -> torch.device:
    return torch.device("cuda", 0) if setup.device == "cuda" else torch.device("cpu")


def now(setup: Setup) -> float:
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def profiled(setup: Setup, step: Step, batches: Iterator[Any], steps: int = 3) -> Row:
    """Launches per step and busy share, from the profiler's trace; on a CPU, calls of operators."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setup.device == "cuda")
    with profile(activities=kinds) as trace:
        for _ in range(steps):
            step(next(batches))
        now(setup)
    path = Path(setup.scratch) / f"trace-{os.getpid()}.json"
    trace.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    path.unlink()
    if setup.device != "cuda":
        return {"operators": sum(e.get("cat") == "cpu_op" for e in events) / steps}
    return busy([e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")], steps)


def busy(events: list[dict[str, Any]], steps: int) -> Row:
    """`events`: ts and dur in microseconds; overlapping events count once."""
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events)
    if not spans:
        return {"launches": 0.0, "busy": None}
    covered, end = 0.0, spans[0][0]
    for first, last in spans:
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return {"launches": len(spans) / steps, "busy": covered / (end - spans[0][0])}
