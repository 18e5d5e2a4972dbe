"""A pipeline as stages: what each runs, what it writes, and a digest of everything it depends on.

A stage's digest covers its settings and the digests of its dependencies, so that a changed setting changes
only the digests of the stages that depend on it. Data and run folders have digests in their names: other
settings never use each other's files, and returning to earlier settings finds their results.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvssl.settings.fields import beyond_defaults, options
from lvssl.settings.pretrain import DEFAULTS
from pipelines.datasets.parts import files_of
from slurm.pipeline import FILLED_IN, MEASURING, ClusterSettings, ImageSource, Pipeline

# Results that always have the same path in the run's folder, whatever the settings.
ONE_PLACE = {"evaluate": "evaluation.json", "analyse": "analysis.json"}
CONVERT = "pipelines.convert.command"  # the module of `convert-beton`


@dataclass(frozen=True)
class Task:
    """One call of a command: a job, or one task of an array."""

    name: str
    digest: str
    module: str  # run as `python -m MODULE ARGUMENTS`
    arguments: tuple[str, ...]
    outputs: tuple[Path, ...]  # files that exist when it is done
    removes: tuple[Path, ...] = ()  # betons that aren't needed once it is done
    run: Path | None = None  # the run's folder
    label: str = ""  # in a sweep: how it differs from the other points
    reads: tuple[Path, ...] = ()  # the sets of images that it reads

    @property
    def key(self) -> str:
        """The name of its record, which differs between settings of the same task."""
        return f"{self.name}-{self.digest[:8]}"


@dataclass(frozen=True)
class Stage:
    name: str
    after: tuple[str, ...]  # stages that must have succeeded
    tasks: tuple[Task, ...]
    cluster: ClusterSettings
    intermediate: bool = False  # only needed while a stage that depends on it has to run
    swept: bool = False


def build_stages(pipeline: Pipeline) -> list[Stage]:
    """The stages of a pipeline in an order in which they can run."""
    stages, data = data_stages(pipeline)
    behind = tuple(stage.name for stage in stages[-1:])
    table = pipeline.stages["pretrain"]
    point = table.points[0]
    key = digest("pretrain", point.settings, data["train"][1])
    run = pipeline.out / f"pretrain-{key[:8]}"
    where = ("--data", str(data["train"][0]), "--out", str(run))
    arguments = ("pretrain", *where, *options({"preset": DEFAULTS} | point.given), "--resume")
    pretrain = Task(
        "pretrain", key, "lvssl", arguments, (run / "checkpoints",), run=run, reads=data["train"][:1]
    )
    stages.append(Stage("pretrain", behind, (pretrain,), table.cluster))
    measured = [measuring(pipeline, name, run, key, data) for name in MEASURING if name in pipeline.stages]
    stages += measured
    keys = [task.digest for stage in measured for task in stage.tasks]
    after = tuple(stage.name for stage in measured) or ("pretrain",)
    shown = digest("report", None, key, *keys)
    page = Task("report", shown, "lvssl", ("report", str(run)), (run / "report.html",), run=run)
    stages.append(Stage("report", after, (page,), pipeline.stages["report"].cluster))
    return stages


def measuring(
    pipeline: Pipeline, name: str, run: Path, run_key: str, data: dict[str, tuple[Path, str]]
) -> Stage:
    """A stage that evaluates a pretrained run: one task, or one for each point of its sweep."""
    table = pipeline.stages[name]
    tasks, test = [], data["test"]
    reads = (data["train"][0], test[0])
    for number, point in enumerate(table.points):
        key = digest(name, point.settings, run_key, test[1])
        result, extra = result_of(
            name, run, key, table.swept, getattr(point.settings, "representation", "features")
        )
        sets = (*moved(run, data["train"][0]), "--test", str(test[0]))
        arguments = (name, str(run), *sets, *options(point.given), *extra)
        title = f"{name}-{number + 1:02d}" if table.swept else name
        tasks.append(Task(title, key, "lvssl", arguments, (result,), (), run, point.label, reads))
    return Stage(name, ("pretrain",), tuple(tasks), table.cluster, swept=table.swept)


def moved(run: Path, train: Path) -> tuple[str, ...]:
    """The option that names the training images, for a run whose config.json names another place because the
    pipeline's folder was moved. Otherwise none: results made by hand, without it, have the same settings."""
    try:
        had = Path(json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]["data"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()  # not pretrained yet, or damaged, which the command reports
    return () if had.resolve() == train.resolve() else ("--train", str(train))


def result_of(name: str, run: Path, key: str, swept: bool, on: str) -> tuple[Path, tuple[str, ...]]:
    """The path of an evaluation's result (for the representation `on`), and the options that set it."""
    if name in ONE_PLACE:
        return run / ONE_PLACE[name], ("--overwrite",)
    if name == "finetune":
        result = run / f"finetune-{key[:8]}" / "result.json"
        return result, ("--out", str(result), "--overwrite")
    if swept:
        result = run / f"{name}-{key[:8]}.json"
        return result, ("--out", str(result), "--overwrite")
    suffix = "" if on == "features" else f"-{on}"
    return run / f"{name}{suffix}.json", ("--overwrite",)  # replaces the result of other settings


def data_stages(pipeline: Pipeline) -> tuple[list[Stage], dict[str, tuple[Path, str]]]:
    """The stages that make the betons, and each beton with its digest."""
    if pipeline.data is not None:
        sets = {"train": pipeline.data.train, "test": pipeline.data.test}
        return [], {name: (path, identities(path)) for name, path in sets.items()}
    parts: list[Task] = []
    merges: list[Task] = []
    data, folder = {}, pipeline.file.parent
    for name, source in pipeline.convert.items():
        key = digest("convert", source, identities(source.source))
        beton = pipeline.out / f"data-{key[:8]}" / f"{name}.beton"
        data[name] = (beton, key)
        whole = (beton, Path(f"{beton}.json"))
        if source.shards == 1:
            parts.append(Task(f"convert-{name}", key, CONVERT, convert(source, beton, folder), whole))
            continue
        made = [part(name, source, beton, folder, key, k) for k in range(1, source.shards + 1)]
        parts += made
        removes = tuple(task.outputs[0] for task in made)
        merges.append(Task(f"merge-{name}", key, CONVERT, ("--merge", str(beton)), whole, removes))
    cluster = pipeline.stages["convert"].cluster
    stages = [Stage("convert", (), tuple(parts), cluster, intermediate=True)]
    if merges:
        stages.append(Stage("merge", ("convert",), tuple(merges), cluster, intermediate=True))
    return stages, data


def part(name: str, source: ImageSource, beton: Path, folder: Path, key: str, k: int) -> Task:
    """The k-th job of a conversion's array."""
    shard = f"{k}/{source.shards}"
    out = beton.with_name(f"{beton.stem}.part-{k:03d}-of-{source.shards:03d}.beton")
    arguments = (*convert(source, beton, folder), "--shard", shard)
    return Task(
        f"convert-{name}-{k:03d}", digest("part", shard, key), CONVERT, arguments, (out, Path(f"{out}.json"))
    )


def convert(source: ImageSource, beton: Path, folder: Path) -> tuple[str, ...]:
    """The arguments of `convert-beton`; `folder`, the pipeline's, is that of torchvision's downloads, since a
    job's working folder is the copy of the code."""
    given = {
        k: v for k, v in dataclasses.asdict(source).items() if k not in ("source", "shards") and v is not None
    }
    if source.source.startswith("torchvision:"):
        given.setdefault("root", folder / "data")
    return (source.source, str(beton), *options(given))


def digest(stage: str, settings: Any, *inputs: str) -> str:
    """SHA-256 of a stage's settings (the semantic ones that aren't defaults) and of its inputs' digests.

    Paths that the pipeline fills in count only through the inputs' digests.
    """
    if dataclasses.is_dataclass(settings):
        settings = beyond_defaults(settings, FILLED_IN)
    content = [stage, settings, *inputs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identities(source: str | Path) -> str:
    """The `identity` of each file that a source names; a pattern or list changes with its files."""
    return "".join(map(identity, files_of(source)))


def identity(source: str | Path) -> str:
    """A text that changes with a source: path, size and time of a file, or of a folder and its entries.

    It doesn't notice an image that is replaced deep inside a folder: reading a million files' dates on a
    network file system takes longer than many stages. A name such as torchvision:CIFAR10 is only its own
    text.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    rows = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    return json.dumps(
        [[str(p), s.st_size if p.is_file() else 0, s.st_mtime_ns] for p in rows for s in [_status(p)]]
    )


def _status(path: Path) -> os.stat_result:
    """The status of what a path leads to; that of a link itself if it leads nowhere."""
    try:
        return path.stat()
    except OSError:
        return path.lstat()
