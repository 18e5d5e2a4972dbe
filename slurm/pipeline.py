"""PIPELINE.toml: its content, read and checked before anything is submitted."""

import dataclasses
import difflib
import itertools
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvssl.settings.fields import RUNTIME, WRONG, flat_hints, replaced, typed
from pipelines.convert.store import Settings as Conversion
from pipelines.datasets.parts import is_by_name, parts_of
from pipelines.errors import InputError
from slurm.values import fields_of, is_path, words

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The stages that may have a table, in display order.
MEASURING = ("evaluate", "analyse", "linear", "knn", "finetune")
SPREAD = ("pretrain", "linear", "finetune")  # trained by several processes
STAGES = ("convert", "pretrain", *MEASURING, "report")
# Settings that the pipeline itself fills in.
FILLED_IN = ("run", "out", "data", "train", "test", "resume", "overwrite")

# {stage: function of a preset's name (or None) that returns the settings its command starts from}
Starts = Mapping[str, Callable[[str | None], Any]]


@dataclass(frozen=True)
class ClusterSettings:
    """What a stage's job asks of Slurm: [cluster] says it for every stage, [STAGE.cluster] for one."""

    partition: str = ""  # empty: the cluster's default
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = "24:00:00"  # as for sbatch: minutes, hours:minutes:seconds, days-hours
    nodes: int = 1  # above 1 for `pretrain`, `linear`, `finetune`, in their own tables
    tasks_per_node: int = 0  # processes on each node; 0: one for each GPU, or one
    gpus: int = 0  # on each node
    cpus: int = 0  # for each process; 0: the cluster's default
    memory: str = ""  # on each node, such as "64G"; empty: the cluster's default
    modules: tuple[str, ...] = ()  # `module load` each
    setup: tuple[str, ...] = ()  # shell lines before the command
    environment: Mapping[str, str] = field(default_factory=dict)
    stage_to: str = ""  # a local folder of the node, such as $TMPDIR, to which images are copied first
    python: str = ""  # interpreter on the nodes; empty: the one that submits
    # Words before each process's command, such as ("apptainer", "exec", "--nv", "lvssl.sif"); python3 is then
    # the container's.
    container: tuple[str, ...] = ()
    # Further options of sbatch, by their long names.
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    warning: int = 120  # seconds before the time limit at which the job is told to save and requeue
    concurrency: int = 8  # tasks of one stage at the same time
    crashes: int = 3  # restarts after crashes; preemptions and time limits don't count

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def minutes(self) -> int:
        return minutes_of(self.time)


@dataclass(frozen=True)
class LocalSettings:
    """Without a scheduler (--cluster local, debug)."""

    concurrency: int = 1  # tasks of one stage at the same time
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSource:
    """Options of `convert-beton`: of both sets in [convert], of one in [convert.train] and [convert.test]."""

    source: str = field(default="", metadata=RUNTIME)  # the digest has its `identity`
    split: str | None = None
    classes: Path | None = None
    devkit: Path | None = None
    subset: int | None = None
    shuffle_seed: int | None = None
    max_resolution: int | None = None
    max_pixels: int | None = None
    jpeg_quality: int | None = None
    raw_proportion: float | None = None
    on_error: str | None = None
    root: Path | None = None
    workers: int | None = field(default=None, metadata=RUNTIME)
    # Number of jobs in an array that convert one part each; one more job then merges them.
    shards: int = field(default=1, metadata=RUNTIME)


@dataclass(frozen=True)
class DataSettings:
    """Betons that exist already, each set one or several: [data] instead of [convert]."""

    train: Path = Path()
    test: Path = Path()


@dataclass(frozen=True)
class Point:
    """The settings for one call of a stage's command."""

    given: dict[str, Any]  # as in the file, with names as on the command line
    settings: Any  # with all defaults filled in
    label: str = ""  # in a sweep: how it differs from the other points


@dataclass(frozen=True)
class StageTable:
    """The table of one stage."""

    cluster: ClusterSettings
    points: tuple[Point, ...] = ()  # one point, or those of a sweep
    swept: bool = False


@dataclass(frozen=True)
class Pipeline:
    file: Path
    name: str
    out: Path
    stages: dict[str, StageTable]
    local: LocalSettings
    convert: dict[str, ImageSource]  # "train", "test"; empty if [data] names betons
    data: DataSettings | None


def read_pipeline(file: Path, starts: Starts, preset: str | None = None) -> Pipeline:
    """Read a pipeline from a file.

    Relative paths are relative to the file's folder. `preset` replaces the preset in [pretrain].

    Raises:
        InputError: the file doesn't exist or isn't TOML, or has an unknown key (named) or an impossible
        value.
    """
    if file.is_dir():
        raise InputError(f"{file}: is a folder; name the pipeline's file, PIPELINE.toml")
    try:
        content = tomllib.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not TOML ({error})") from error
    return _Reader(file.absolute(), starts).pipeline(content, preset)


class _Reader:
    """Converts tables to settings; every error names the file, the table and the key."""

    def __init__(self, file: Path, starts: Starts) -> None:
        self.file, self.starts = file, starts

    def wrong(self, text: str) -> InputError:
        return InputError(f"{self.file}: {text}")

    def pipeline(self, content: dict[str, Any], preset: str | None) -> Pipeline:
        stages = tuple(s for s in STAGES if s in self.starts or s in ("convert", "report"))
        self.known("", content, ("name", "out", "cluster", "local", "data", *stages))
        for name in ("name", "out"):
            self.typed("", name, content.get(name, ""), str)
        for name in ("cluster", "local", "data", *stages):
            self.typed("", name, content.get(name, {}), dict)
        if "pretrain" not in content:
            raise self.wrong("no [pretrain] table; it may be empty")
        if preset is not None:
            content["pretrain"]["preset"] = preset
        self.common = content.get("cluster", {})
        if self.common.get("nodes", 1) != 1:
            raise self.wrong(
                "[cluster] nodes: not every stage can use several nodes; move it to [pretrain.cluster]"
            )
        data, convert = self.data(content)
        tables = {name: self.stage(name, content[name]) for name in stages if name in content}
        tables.setdefault("report", self.stage("report", {}))
        name = content.get("name") or self.file.stem
        out = self.path(content.get("out") or f"runs/{name}")
        if "%" in str(out) or not str(out).isprintable():
            raise self.wrong(f"out: {str(out)!r} has a character that Slurm's file names can't have")
        local = self.instance("local", LocalSettings, content.get("local", {}))
        self.check_times(tables)
        return Pipeline(self.file, name, out, tables, local, convert, data)

    def path(self, text: str) -> Path:
        try:
            return Path(self.file.parent / Path(text).expanduser()).absolute()
        except RuntimeError as error:  # neither $HOME nor the user list resolves ~
            raise self.wrong(f"{text}: {error}; write the path in full") from error

    def absolute(self, value: Any) -> Any:
        return [self.absolute(each) for each in value] if isinstance(value, list) else str(self.path(value))

    def data(self, content: dict[str, Any]) -> tuple[DataSettings | None, dict[str, ImageSource]]:
        if ("data" in content) == ("convert" in content):
            raise self.wrong(
                "say where the images are: either [convert] (to convert them) or [data] (betons)"
            )
        if "data" in content:
            data = self.instance("data", DataSettings, content["data"])
            for name, path in (("train", data.train), ("test", data.test)):
                if name not in content["data"]:
                    raise self.wrong(f'[data] {name} is missing, such as {name} = "{name}.beton"')
                try:
                    absent = [file for file in parts_of(path) if not file.is_file()]
                except InputError as error:
                    raise self.wrong(f"[data] {name}: {error}") from error
                if absent:
                    raise self.wrong(f"[data] {name}: {absent[0]}: no such file")
            return data, {}
        table = dict(content["convert"])
        table.pop("cluster", None)
        halves = {name: table.pop(name, None) for name in ("train", "test")}
        self.known("convert", table, ("train", "test", "cluster", *fields_of(ImageSource)))
        sources = {}
        for name, half in halves.items():
            if not half:
                raise self.wrong(f'no [convert.{name}] table with the source, such as source = "photos/"')
            self.typed("convert", name, half, dict)
            source = self.instance(f"convert.{name}", ImageSource, {**table, **half})
            sources[name] = dataclasses.replace(source, source=self.source(name, source.source))
            if source.shards < 1:
                raise self.wrong(f"[convert.{name}] shards: must be at least 1, got {source.shards}")
            given = {f.name: getattr(source, f.name, None) for f in dataclasses.fields(Conversion)}
            try:
                Conversion(**{key: value for key, value in given.items() if value is not None}).check()
            except InputError as error:
                raise self.wrong(f"[convert.{name}] {error}") from error
        return None, sources

    def source(self, name: str, text: str) -> str:
        """Make a source's path absolute; `torchvision:NAME` and `sklearn:digits` stay unchanged. Something
        must be there, unless it is a pattern."""
        if is_by_name(text):
            return text
        path = self.path(text) if text else None
        if path is None or (not path.exists() and not any(c in text for c in "*?{[")):
            raise self.wrong(f"[convert.{name}] source: {text or 'missing'}: no such file or folder")
        return str(path)

    def stage(self, name: str, table: dict[str, Any]) -> StageTable:
        given = dict(table)
        cluster = self.cluster(name, given.pop("cluster", {}))
        if name == "convert":
            return StageTable(cluster)
        sweep = given.pop("sweep", None)
        if name not in self.starts:
            self.known(name, given, ("cluster",))
            return StageTable(cluster, (Point({}, None),))
        start = self.start(name, given.get("preset"))
        given = self.settings(name, start, given)
        if sweep is None:
            return StageTable(cluster, (Point(given, self.made(name, start, given)),))
        points = []
        for point in self.sweep(name, start, sweep):
            both = {**given, **point}
            label = ", ".join(f"{key}={value}" for key, value in point.items())
            points.append(Point(both, self.made(f"{name}.sweep", start, both), label))
        return StageTable(cluster, tuple(points), swept=True)

    def start(self, name: str, preset: Any) -> Any:
        try:
            return self.starts[name](self.typed(name, "preset", preset or "", str) or None)
        except InputError as error:
            raise self.wrong(f"[{name}] {error}") from error

    def settings(self, name: str, start: Any, table: dict[str, Any]) -> dict[str, Any]:
        """The settings in a table, with paths made absolute."""
        hints = flat_hints(type(start))
        own = tuple(n for n in hints if n not in FILLED_IN)
        self.known(name, table, (*own, "cluster", "sweep"), (*FILLED_IN, *hints))
        values = {}
        for key, value in table.items():
            value = self.typed(name, key, value, hints[key])
            values[key] = self.absolute(value) if is_path(hints[key]) else value
        return values

    def made(self, name: str, start: Any, given: dict[str, Any]) -> Any:
        """The command's final settings, after its own checks, which need no files."""
        made = replaced(start, given)
        if hasattr(made, "validate"):
            try:
                made.validate()
            except InputError as error:
                raise self.wrong(f"[{name}] {error}") from error
        return made

    def sweep(self, name: str, start: Any, sweep: Any) -> list[dict[str, Any]]:
        """The points of [STAGE.sweep]: the product of `grid`, or the entries of `list`."""
        where = f"{name}.sweep"
        if name in ("evaluate", "analyse"):
            raise self.wrong(f"[{where}]: its result always goes to the run's folder; leave it out")
        if name == "pretrain":
            raise self.wrong(
                "[pretrain.sweep]: all later stages depend on one pretraining; write a pipeline for each"
            )
        self.typed(name, "sweep", sweep, dict)
        self.known(where, sweep, ("grid", "list"))
        if ("grid" in sweep) == ("list" in sweep):
            raise self.wrong(f"[{where}] takes either `grid` or `list`")
        if "list" in sweep:
            points = self.typed(where, "list", sweep["list"], list)
        else:
            grid = self.typed(where, "grid", sweep["grid"], dict)
            for key, values in grid.items():
                self.typed(f"{where}.grid", key, values, list)
            points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        points = [self.settings(where, start, self.typed(where, "list", point, dict)) for point in points]
        if not points:
            raise self.wrong(f"[{where}] has no point")
        return points

    def cluster(self, name: str, table: Any) -> ClusterSettings:
        self.typed(name, "cluster", table, dict)
        merged = {**self.common, **table}
        for key in ("environment", "options"):
            both = [t.get(key, {}) for t in (self.common, table)]
            if all(isinstance(each, dict) for each in both):
                merged[key] = {**both[0], **both[1]}
        where = f"{name}.cluster" if table else "cluster"
        made = self.instance(where, ClusterSettings, merged)
        if name in ("convert", "report") and "gpus" not in table:  # these don't use GPUs
            made = dataclasses.replace(made, gpus=0, tasks_per_node=1)
        elif name not in SPREAD:
            made = dataclasses.replace(made, tasks_per_node=1)
        self.check_cluster(where, made, name)
        return made

    def check_cluster(self, where: str, made: ClusterSettings, stage: str) -> None:
        try:
            minutes = made.minutes
        except ValueError as error:
            raise self.wrong(f"[{where}] time: {error}") from error
        least = {"nodes": 1, "concurrency": 1, "warning": 1}
        for key in ("nodes", "tasks_per_node", "gpus", "cpus", "warning", "concurrency", "crashes"):
            if getattr(made, key) < least.get(key, 0):
                raise self.wrong(
                    f"[{where}] {key}: must be at least {least.get(key, 0)}, got {getattr(made, key)}"
                )
        if made.nodes > 1 and stage not in SPREAD:
            raise self.wrong(f"[{where}] nodes: only {', '.join(SPREAD)} can use several nodes")
        if made.memory and not re.fullmatch(r"\d+(\.\d+)?[KMGT]?B?", made.memory):
            raise self.wrong(f'[{where}] memory: {made.memory!r} is not a size such as "64G"')
        if made.stage_to and not re.match(r"[/$]", made.stage_to):
            raise self.wrong(
                f'[{where}] stage_to: {made.stage_to!r} is not an absolute path, such as "$TMPDIR"'
            )
        for name in made.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise self.wrong(f"[{where}] environment: {name!r} can't be the name of a variable")
        if 60 * minutes <= made.warning:
            raise self.wrong(
                f"[{where}] time: {made.time} is no longer than the warning, {made.warning} s before its end"
            )

    def check_times(self, tables: dict[str, StageTable]) -> None:
        """Refuse a time limit too short for a job to save a checkpoint: it would start again for ever."""
        pretrain = tables["pretrain"]
        interval = pretrain.points[0].settings.checkpoint_minutes
        if pretrain.cluster.minutes <= interval:
            raise self.wrong(
                f"[pretrain.cluster] time: {pretrain.cluster.time} is no longer than the "
                f"{interval:g} minutes between checkpoints (checkpoint_minutes): it could end before it saves"
            )

    def instance(self, where: str, kind: type, table: dict[str, Any]) -> Any:
        """A dataclass of this module from a table."""
        self.known(where, table, fields_of(kind))
        hints = typing.get_type_hints(kind)
        values = {}
        for key, value in table.items():
            if key == "time" and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            value = self.typed(where, key, value, hints[key])
            if is_path(hints[key]):
                value = self.path(value)
            values[key] = tuple(value) if isinstance(value, list) else value
        return kind(**values)

    def known(self, where: str, table: dict[str, Any], allowed: Any, filled: Any = ()) -> None:
        """Refuse the first key that isn't allowed, naming it and the most similar allowed key."""
        for key in table:
            if key in allowed:
                continue
            place = f"[{where}] {key}" if where else key
            if key in filled:
                raise self.wrong(f"{place}: this is set by the pipeline itself; leave it out")
            close = difflib.get_close_matches(key, allowed, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(allowed))}"
            raise self.wrong(f"{place}: no such key; {hint}")

    def typed(self, where: str, key: str, value: Any, wanted: Any) -> Any:
        """Return the value if it has the wanted type."""
        if typed(value, wanted) is not WRONG:
            return value
        place = f"[{where}] {key}" if where else key
        raise self.wrong(f"{place}: must be {words(wanted)}, got {value!r}")


def minutes_of(time: str) -> int:
    """Convert Slurm's forms of a time limit (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) to minutes, rounded up."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if not found:
        raise ValueError(f"{time!r} is not a time such as 90 (minutes), 12:00:00 or 2-00:00:00")
    days, *parts = found.groups()
    numbers = [int(p) for p in parts if p is not None]
    if days is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, numbers[0], numbers[1] if len(numbers) == 2 else 0
    return -(-((int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60)
