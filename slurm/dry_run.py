"""`lvssl launch --dry-run`: the chain, its scripts, and what it will cost, without touching anything."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.amounts import size_text, time_text
from pipelines.datasets.imagenet import TRAIN_IMAGES
from pipelines.datasets.parts import parts_of
from pipelines.errors import InputError
from pipelines.formats.beton import count_in
from slurm.pipeline import Pipeline
from slurm.records import last_row, remaining
from slurm.stages import Stage
from slurm.work import Work, executor

CHECKPOINTS = 3  # the last two, and the one that is being written
NUMBERS_A_PARAMETER = 3  # the weight and an optimiser's two moments
# Pretraining's settings and a count of images -> GPU-hours, and what they were measured on.
GpuHours = Callable[[Any, int], tuple[float, str]]
COUNTED = 200_000  # files of a source folder, after which its size is not added up any further


def describe(pipeline: Pipeline, stages: list[Stage], works: Sequence[Work], cluster: str,
             parameters: Callable[[Any], int] | None, gpu_hours: GpuHours | None) -> str:  # fmt: skip
    """Graph, scripts (for Slurm), GPU-hours and disk, as text."""
    lines = [f"# {pipeline.name}: {pipeline.file} -> {pipeline.out}", "", *graph(works)]
    if cluster == "slurm":
        code = pipeline.out / "code" / "SNAPSHOT"
        for work in works:
            if work.tasks:
                after = [f"JOB-OF-{name.upper()}" for name in work.stage.after if tasks_of(works, name)]
                script = executor(pipeline, work.stage, code, after).script(len(work.tasks))
                lines += ["", f"# ---- {work.stage.name}: sbatch", script.rstrip(), "", "# which runs"]
                lines += [
                    f"#   {shlex.join(('python', '-m', task.module, *task.arguments))}" for task in work.tasks
                ]
    lines += ["", *costs(works), *expected(pipeline, works, gpu_hours), *disk(pipeline, works, parameters)]
    return "\n".join(lines)


def tasks_of(works: Sequence[Work], name: str) -> bool:
    return any(work.tasks for work in works if work.stage.name == name)


def graph(works: Sequence[Work]) -> list[str]:
    lines = []
    for work in works:
        stage = work.stage
        after = f" after {', '.join(stage.after)}" if stage.after else ""
        size = f"{stage.cluster.nodes} node{'s' * (stage.cluster.nodes > 1)} x {stage.cluster.ranks_per_node}"
        todo = (
            f"{len(work.tasks)} of {len(stage.tasks)} tasks, {size}, at most {stage.cluster.time}"
            if work.tasks
            else work.why
        )
        lines.append(f"{stage.name:10}{after or ' at once'}: {todo}")
    return lines


def costs(works: Sequence[Work]) -> list[str]:
    """From the time limits: what Slurm may charge if every job runs to its end."""
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
    """How long the pretraining takes, by the rate of its own last steps where it was begun, else by the rate
    that was measured for its backbone."""
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
            return [f"pretrain: {left} left{charged}, at its own {speed:,.0f} img/s so far"]
    images = images_in(pipeline, task.reads[0])
    if not gpus or gpu_hours is None or images is None:
        return []
    hours, basis = gpu_hours(settings, images)
    return [f"pretrain: about {hours:,.1f} GPU-hours for {images:,} images, {basis}"]


def images_in(pipeline: Pipeline, train: Path) -> int | None:
    """Of the training set; None where it isn't there and its source doesn't say."""
    with suppress(OSError, InputError):
        return sum(map(count_in, parts_of(train)))
    source = pipeline.convert["train"]
    whole = TRAIN_IMAGES if Path(source.source).name == "ILSVRC2012_img_train.tar" else None
    return source.subset or whole


def disk(pipeline: Pipeline, works: Sequence[Work], parameters: Callable[[Any], int] | None) -> list[str]:
    """What will be written to the pipeline's folder, and what is free there."""
    rows = []
    if tasks_of(works, "convert"):
        sizes = [folder_size(Path(source.source)) for source in pipeline.convert.values()]
        known = [size for size in sizes if size is not None]
        twice = any(source.shards > 1 for source in pipeline.convert.values())
        if len(known) == len(sizes):
            rows.append(
                (
                    sum(known) * (2 if twice else 1),
                    "betons" + (", twice while the parts are merged" if twice else ""),
                )
            )
        else:
            rows.append((0, "betons (size of the sources not known)"))
    if tasks_of(works, "pretrain") and parameters is not None:
        count = parameters(pipeline.stages["pretrain"].points[0].settings)
        rows.append((4 * count * NUMBERS_A_PARAMETER * CHECKPOINTS, f"checkpoints of {count:,} parameters"))
    folder = pipeline.out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = sum(size for size, _ in rows)
    text = "; ".join(f"{size_text(size)} {what}" for size, what in rows) or "next to nothing"
    warning = "  TOO LITTLE" if needed > free else ""
    return [f"Disk: about {size_text(needed)} ({text}); {size_text(free)} free at {folder}{warning}"]


def folder_size(source: Path) -> int | None:
    """Bytes of a file or of a folder's files (a beton keeps JPEGs as they are); None for what is no path."""
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
