"""`lvssl launch --dry-run`: show the pipeline, its scripts and their expected costs, changing nothing."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.amounts import size_text, time_text
from pipelines.datasets.imagenet import TRAIN_IMAGES, VALIDATION_IMAGES
from pipelines.datasets.parts import parts_of
from pipelines.errors import InputError
from pipelines.formats.beton import count_in
from slurm.pipeline import Pipeline
from slurm.records import last_row, remaining
from slurm.stages import Stage
from slurm.work import Work, awaited, executor

CHECKPOINTS = 3  # the last two, and the one being written
NUMBERS_A_PARAMETER = 3  # the weight and the optimiser's two moments
# (pretraining's settings, images, GPUs) -> (GPU-hours, and what they were measured on).
GpuHours = Callable[[Any, int, int], tuple[float, str]]
IMAGENET = {"ILSVRC2012_img_train.tar": TRAIN_IMAGES, "ILSVRC2012_img_val.tar": VALIDATION_IMAGES}
# Bytes per image of an ImageNet beton by --max-resolution, over 1,000 images, one per class
# (docs/imagenet.md).
CONVERTED = {256: 16_665, 400: 35_483, 500: 102_716, 1 << 16: 114_018}
COUNTED = 200_000  # the size of a source folder with so many files isn't added up


class Sizes(NamedTuple):
    """Sizes of the files that a run's network writes."""

    parameters: int
    kept: int  # bytes per image in the run's store of features
    for_now: int  # bytes per image of the untrained network's store while a large set is evaluated; else 0


SizesOf = Callable[[Any, int], Sizes]  # (pretraining's settings, count of training images) -> sizes


def describe(pipeline: Pipeline, stages: list[Stage], works: Sequence[Work], cluster: str,
             sizes: SizesOf | None, gpu_hours: GpuHours | None) -> str:  # fmt: skip
    """Describe the graph, the scripts (for Slurm), GPU-hours and disk space as text."""
    lines = [f"# {pipeline.name}: {pipeline.file} -> {pipeline.out}", "", *graph(works)]
    if cluster == "slurm":
        code = pipeline.out / "code" / "SNAPSHOT"
        for work in works:
            if work.tasks:
                after = [f"JOB-OF-{name.upper()}" for name in awaited(work, works) if tasks_of(works, name)]
                script = executor(pipeline, work.stage, code, after).script(len(work.tasks))
                lines += ["", f"# ---- {work.stage.name}: sbatch", script.rstrip(), "", "# which runs"]
                lines += [
                    f"#   {shlex.join(('python', '-m', task.module, *task.arguments))}" for task in work.tasks
                ]
    lines += ["", *costs(works), *expected(pipeline, works, gpu_hours), *disk(pipeline, works, sizes)]
    return "\n".join(lines)


def tasks_of(works: Sequence[Work], name: str) -> bool:
    return any(work.tasks for work in works if work.stage.name == name)


def graph(works: Sequence[Work]) -> list[str]:
    lines = []
    for work in works:
        stage = work.stage
        after = f" after {', '.join(stage.after)}" if stage.after else ""
        size = f"{stage.cluster.nodes} node{'s' * (stage.cluster.nodes > 1)} x {stage.cluster.ranks_per_node}"
        todo = f"{len(work.tasks)} of {len(stage.tasks)} tasks, {size}, at most {stage.cluster.time}"
        lines.append(f"{stage.name:10}{after or ' at once'}: {todo if work.tasks else work.why}")
    return lines


def costs(works: Sequence[Work]) -> list[str]:
    """Upper bounds from the time limits: what Slurm charges if every job runs until its limit."""
    gpu = cpu = 0.0
    for work in works:
        cluster = work.stage.cluster
        hours = len(work.tasks) * cluster.nodes * cluster.minutes / 60
        gpu += hours * cluster.gpus
        cpu += hours * cluster.ranks_per_node * max(1, cluster.cpus)
    return [
        f"GPU-hours: at most {gpu:,.1f} (CPU-hours: {cpu:,.1f}), by the time limits, without requeued time"
    ]


def expected(pipeline: Pipeline, works: Sequence[Work], gpu_hours: GpuHours | None) -> list[str]:
    """The expected duration of pretraining, from the rate of its own last steps if it has started, otherwise
    from the rate measured for its backbone."""
    (work,) = (work for work in works if work.stage.name == "pretrain")
    task, gpus = work.stage.tasks[0], work.stage.cluster.nodes * work.stage.cluster.gpus
    if not work.tasks:
        return []
    settings = pipeline.stages["pretrain"].points[0].settings
    assert task.run is not None
    if row := last_row(task.run / "metrics.jsonl"):
        _, speed, seconds = remaining(row, settings)
        if seconds > 0:
            charged = f", {gpus * seconds / 3600:,.1f} GPU-hours" if gpus else ""
            left = time_text(max(seconds, 1))
            return [f"pretrain: {left} left{charged}, at its rate of {speed:,.0f} img/s so far"]
    images = images_in(pipeline, "train", task.reads[0])
    if not gpus or gpu_hours is None or images is None:
        return []
    hours, basis = gpu_hours(settings, images, gpus)
    return [f"pretrain: about {hours:,.1f} GPU-hours for {images:,} images, {basis}"]


def images_in(pipeline: Pipeline, name: str, path: Path) -> int | None:
    """The number of images in the set "train" or "test" at `path`; None if it isn't there and isn't known."""
    with suppress(OSError, InputError):
        return sum(map(count_in, parts_of(path)))
    if (source := pipeline.convert.get(name)) is None:
        return None
    return source.subset or IMAGENET.get(Path(source.source).name)


def disk(pipeline: Pipeline, works: Sequence[Work], sizes: SizesOf | None) -> list[str]:
    """The data that will be written to the pipeline's folder and, if images are staged, to each node, and the
    free space there."""
    rows = [betons(pipeline)] if tasks_of(works, "convert") else []
    to_do = {work.stage.name: work.tasks[0] for work in works if work.tasks}
    (reads,) = (work.stage.tasks[0].reads for work in works if work.stage.name == "pretrain")
    train = images_in(pipeline, "train", reads[0]) or 0
    of = sizes(pipeline.stages["pretrain"].points[0].settings, train) if sizes else None
    if of is not None and "pretrain" in to_do:
        what = f"checkpoints of {of.parameters:,} parameters"
        rows.append((4 * of.parameters * NUMBERS_A_PARAMETER * CHECKPOINTS, what))
    if of is not None and (task := to_do.get("evaluate") or to_do.get("knn")):
        images = train + (images_in(pipeline, "test", task.reads[1]) or 0)
        rows.append((images * of.kept, f"features and codes, {of.kept:,} bytes per image"))
        if "evaluate" in to_do and of.for_now:
            rows.append((images * of.for_now, "features of the untrained network, while evaluate runs"))
    folder = pipeline.out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = sum(size for size, _ in rows)
    text = "; ".join(f"{size_text(size)} {what}" for size, what in rows) or "next to nothing"
    warning = "  TOO LITTLE" if needed > free else ""
    lines = [f"Disk: about {size_text(needed)} ({text}); {size_text(free)} free at {folder}{warning}"]
    if places := sorted({work.stage.cluster.stage_to for work in works if work.tasks} - {""}):
        lines.append(f"and on each node, in {', '.join(places)}, copies of the images that its stages read")
    return lines


def betons(pipeline: Pipeline) -> tuple[int, str]:
    """Size in bytes of the sets that are converted, and a description of them."""
    sizes = [converted_size(pipeline, name) for name in pipeline.convert]
    if None in sizes:
        return 0, "betons (size of the sources not known)"
    twice = any(source.shards > 1 for source in pipeline.convert.values())
    known = sum(size for size in sizes if size is not None)
    return known * (1 + twice), "betons" + (", twice while the parts are merged" if twice else "")


def converted_size(pipeline: Pipeline, name: str) -> int | None:
    """Bytes of a set's beton: for ImageNet by the measured rates, for others at most the source's size."""
    source = pipeline.convert[name]
    if (images := IMAGENET.get(Path(source.source).name)) is None:
        return folder_size(Path(source.source))
    limit = source.max_resolution or max(CONVERTED)
    rate = next((CONVERTED[side] for side in sorted(CONVERTED) if side >= limit), CONVERTED[max(CONVERTED)])
    return (source.subset or images) * rate


def folder_size(source: Path) -> int | None:
    """Bytes of a file or of a folder's files (a beton keeps JPEGs unchanged); None if it isn't a path, or if
    the folder has COUNTED files or more."""
    if source.is_file():
        return source.stat().st_size
    if not source.is_dir():
        return None
    total = count = 0
    for path in source.rglob("*"):
        if path.is_file():
            total, count = total + path.stat().st_size, count + 1
        if count >= COUNTED:
            return None
    return total
