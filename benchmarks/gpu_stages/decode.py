"""From encoded images to two crops each: by CPU threads, by nvJPEG with our kernel, by DALI; and the kernel
alone. Crops made on the GPU stay there, and the CPU's are copied to it, as in training. The first two also
run with FEW cores, as on a machine with many GPUs.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_stages import images
from benchmarks.gpu_stages.case import Case, Row, Setup
from benchmarks.gpu_stages.machine import ceilings
from benchmarks.gpu_stages.steps import now, place
from benchmarks.gpu_stages.timing import against_floor, timed
from pipelines.cores import loader_threads

FEW = 4


def cases(setup: Setup) -> Iterator[Case]:
    """The most important first, so that an interrupted stage has these."""
    side = 16 if setup.dry else 224
    for decoder in ("CPU threads", "nvJPEG and our kernel", "DALI"):
        yield Case(f"decode by {decoder}, {side} px", partial(decode, setup, side, decoder), seconds=90)
    for decoder in ("CPU threads", "nvJPEG and our kernel"):
        name = f"decode by {decoder}, {side} px, {FEW} cores"
        yield Case(name, partial(on_few_cores, setup, side, decoder), seconds=90)
    for side in (16,) if setup.dry else (224, 32):
        yield Case(f"crop kernel, {side} px", partial(kernel, setup, side))


def on_few_cores(setup: Setup, side: int, decoder: str) -> Row:
    """`decode` with threads started while this one may only use FEW cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:FEW]))
    try:
        return decode(setup, side, decoder)
    finally:
        os.sched_setaffinity(0, before)


def decode(setup: Setup, side: int, decoder: str) -> Row:
    """Images per second in the loader, without augmentation, after a warm-up epoch; and the difference in
    levels between the crops and those of the CPU threads."""
    from lvssl.runs.labels import Subset
    from pipelines.decode import open_reader

    path = setup.images or str(images.beton(Path(setup.scratch) / "images", 32 if setup.dry else 384, side))
    plain = open_reader(path)
    source: Any = plain if decoder == "CPU threads" else reader(path, decoder, setup)
    few, many = np.arange(4 if setup.dry else 64), 16 if setup.dry else 8192
    with loader(setup, Subset(source, few), side, len(few)) as found:
        crops = next(iter(found)).views
    with loader(setup, Subset(plain, few), side, len(few)) as found:
        levels = (crops.float() - next(iter(found)).views.float()).abs()
    with loader(setup, Subset(source, np.resize(np.arange(len(source)), many)), side, many // 4) as batches:
        seconds = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            started = now(setup)
            for batch in batches:
                assert batch.views.device == place(setup)
            seconds.append(now(setup) - started)
    mean, most = levels.mean().item(), levels.max().item()
    return {
        "ok": most == 0 if decoder == "CPU threads" else mean < 5,
        "images_per_second": many / seconds[1],
        "seconds": seconds[1],
        "first_epoch": seconds[0],  # each JPEG is checked by libjpeg-turbo the first time
        "levels_mean": mean,
        "levels_max": most,
        "workers": loader_threads(),
    }


def reader(path: str, decoder: str, setup: Setup) -> Any:
    device = str(place(setup))
    if decoder == "DALI":
        import nvidia.dali  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  (a row without it)

        from pipelines.decode.dali import DALIReader

        return DALIReader(path, device)
    from pipelines.decode.nvjpeg import NvjpegReader

    return NvjpegReader(path, device)


def loader(setup: Setup, source: Any, side: int, batch: int) -> Any:
    from pipelines.loader import LoaderSettings, TwoViewLoader
    from pipelines.views import ViewSettings

    settings = LoaderSettings(batch, order="sequential", crops_only=True, device=place(setup))
    return TwoViewLoader(source, ViewSettings(resolution=side), settings)


def kernel(setup: Setup, side: int) -> Row:
    """Two crops of photographs' size each, drawn as in training."""
    from pipelines.decode.gpu import crop_and_resize
    from pipelines.parameters import crop_boxes, draw_parameters
    from pipelines.views import ViewSettings

    count, height, width = (2, 20, 24) if setup.dry else (64, 400, 500)
    generator = torch.Generator(device=setup.device).manual_seed(setup.seed)
    shape = (3, height, width)
    planes = [
        torch.randint(256, shape, dtype=torch.uint8, device=setup.device, generator=generator)
        for _ in range(count)
    ]
    sizes = np.full(count, height), np.full(count, width)
    table = draw_parameters(ViewSettings(resolution=side), setup.seed, 0, np.arange(count), *sizes)
    boxes, flips = crop_boxes(table), np.zeros((count, 2), bool)
    row = timed(setup, lambda: crop_and_resize(planes, boxes, flips, side))
    views = 2 * count
    read = 3 * boxes[..., 2].astype(float) * boxes[..., 3]
    row = against_floor(row, read.sum() + 3 * views * side * side, 0, ceilings(setup))
    return {"ok": True, **row, "views": views, "us_per_view": 1e6 * row["seconds"] / views}
