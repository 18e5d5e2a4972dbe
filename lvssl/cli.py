"""The command line: see `lvssl --help`."""

import argparse
import importlib
import io
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HELP = """lvssl: latent-variable contrastive learning of image encoders

    convert-beton IMAGES train.beton                   a folder of class folders, a parquet, torchvision:NAME
    lvssl pretrain --preset cifar10-small --data train.beton --out runs/lv
    lvssl pretrain --preset cifar10-small --data train.beton --out runs/control --family none
    lvssl evaluate runs/lv --test test.beton --control runs/control
    lvssl linear runs/lv --test test.beton             also knn, finetune --label-fraction 0.1
    lvssl report runs/lv                               one HTML page
    lvssl encode runs/lv --images DIR                  a packed code for each image
    lvssl search runs/lv --query IMAGE                 the nearest images by their codes
    lvssl launch pipeline.toml                         all of it as jobs of a Slurm cluster

commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may be no text: it is escaped
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP + "\n".join(f"    {name:10} {about}" for name, (about, _) in COMMANDS.items()))
        print("\n`lvssl COMMAND --help` lists a command's settings.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from lvssl import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        return fail(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}")
    return guarded(COMMANDS[arguments[0]][1], arguments[1:])


def guarded(command: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """A user's mistake is one line without a traceback; everything unexpected keeps its traceback."""
    from lvssl.codes.file import CodeFileError
    from pipelines.decode.reader import DamagedSample
    from pipelines.errors import InputError, hide_decoders_warnings

    hide_decoders_warnings()
    try:
        return command(arguments) or 0
    except DamagedSample as error:
        return fail(f"{error}; --on-error skip goes on without such images")
    except (InputError, CodeFileError) as error:
        return fail(str(error))
    except OSError as error:  # disk full, no permission: the system's words name the file
        return fail(str(error), 1)
    except (FloatingPointError, MemoryError) as error:  # a run that diverged, or is too large
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def parse(
    kind: Any, arguments: list[str], command: str, default: Any = None, about: str | None = None
) -> Any:
    """Command-line arguments as a dataclass of settings."""
    import tyro

    from pipelines.datasets.parts import unquoted

    options = {} if default is None else {"default": default}
    try:
        return tyro.cli(
            kind,
            args=arguments,
            prog=f"lvssl {command}",
            description=about or (kind.__doc__ or ""),
            config=(tyro.conf.OmitArgPrefixes,),
            **options,
        )
    except SystemExit as ended:
        if ended.code and (hint := unquoted(arguments)):
            print(f"error: {hint}", file=sys.stderr)
        raise


def pretrain(arguments: list[str]) -> int:
    from lvssl.runs.run import read_config
    from lvssl.settings.pretrain import PRESETS, PretrainSettings, preset
    from pipelines.datasets.parts import are_there, is_by_name
    from pipelines.errors import InputError

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--data", type=Path)
    first.add_argument("--source", default="auto")
    first.add_argument("--device", default="auto")
    known, others = first.parse_known_args(arguments)
    settings, what = PretrainSettings(), ""
    if known.resume and known.out and (known.out / "config.json").exists():
        settings = replace(read_config(known.out)[0], out=known.out)
    elif known.preset is None and known.data and not {"-h", "--help"} & {*others}:
        from lvssl.suggest import suggest

        if is_by_name(known.data) or are_there(known.data):
            settings, what = suggest(known.data, known.source, known.device)
    if known.preset is not None:
        settings = preset(known.preset)

    @dataclass(frozen=True)
    class Pretrain:
        settings: PretrainSettings = field(default_factory=lambda: settings)
        resume: bool = False
        """Go on with the run in --out from its newest checkpoint; its settings need not be repeated."""

    about = f"{PretrainSettings.__doc__} Presets: {', '.join(PRESETS)}. A setting beside --preset wins."
    about += " Without --preset one is chosen, with resolution, batch and epochs, for images and device."
    chosen = parse(Pretrain, arguments, "pretrain", about=about)
    out, data = chosen.settings.out, chosen.settings.data
    if chosen.resume and not (out / "config.json").exists() and not are_there(data):
        raise InputError(
            f"{out}: there is no run to resume (no {out / 'config.json'}), and no {data} to begin one with: "
            "check --out, or --data"
        )

    from lvssl.plan import require_memory
    from lvssl.training.distributed import world_of
    from lvssl.training.pretrain import pretrain as run
    from lvssl.training.stopping import Interrupted

    chosen.settings.validate()
    if what and world_of().first:
        from lvssl.suggest import in_words

        print(in_words(chosen.settings, what), file=sys.stderr, flush=True)
    try:
        run(chosen.settings, chosen.resume, lambda: require_memory(chosen.settings, world_of().size))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 143
    if not world_of().first:
        return 0
    name = shlex.quote(str(out))
    labels = read_config(out)[1] > 1
    following = (
        f"evaluate {name} --test TEST.beton" if labels else f"encode {name} --images {shlex.quote(str(data))}"
    )
    print(f"{out}: done; next: lvssl {following}")
    return 0


def stage(kind: str, name: str) -> Callable[[list[str]], int]:
    """The command of a stage after pretraining; `kind` names its settings, "module:function" what it does."""

    def run(arguments: list[str]) -> int:
        from lvssl.evaluation.foreign import measure_embeddings
        from lvssl.evaluation.stage import show
        from lvssl.runs.embeddings import is_embeddings
        from lvssl.settings import stages
        from lvssl.training.stopping import Interrupted

        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset")
        start = stages.start_from(getattr(stages, kind), first.parse_known_args(arguments)[0].preset)
        module, _, function = name.partition(":")
        settings = parse(type(start), arguments, function, start)
        if not isinstance(settings, stages.FinetuneSettings) and is_embeddings(settings.run):
            show(measure_embeddings(function, settings))
            return 0
        try:
            done = getattr(importlib.import_module(module), function)(settings)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            return 143
        show(done)
        return 0

    return run


def evaluate(arguments: list[str]) -> None:
    from lvssl.evaluation.evaluate import EvaluateSettings, print_table
    from lvssl.evaluation.evaluate import evaluate as run

    settings = parse(EvaluateSettings, arguments, "evaluate")
    print_table(run(settings)["table"])
    say_written(settings, "evaluation.json")


def say_written(settings: Any, name: str) -> None:
    """Where a result lies that a run was measured for, and the command that shows it."""
    from lvssl.runs.result import result_folder
    from lvssl.settings.fields import options

    elsewhere = options({"out": settings.out} if settings.out else {})
    print(
        f"written: {result_folder(settings) / name}; next:",
        shlex.join(["lvssl", "report", str(settings.run), *elsewhere]),
    )


def analyse(arguments: list[str]) -> None:
    from lvssl.evaluation.analyse import AnalyseSettings, print_analysis
    from lvssl.evaluation.analyse import analyse as run

    settings = parse(AnalyseSettings, arguments, "analyse")
    print_analysis(run(settings))
    say_written(settings, "analysis.json")


def study(arguments: list[str]) -> None:
    from lvssl.evaluation.study import StudySettings
    from lvssl.evaluation.study import study as run
    from lvssl.report.study import write_study

    settings = parse(StudySettings, arguments, "study")
    result = run(settings)
    if result is not None:
        written = write_study(settings.out, result)
        print((settings.out / "study.md").read_text())
        print(f"written: {settings.out / 'study.json'}, {', '.join(path.name for path in written)}")


def compression(arguments: list[str]) -> None:
    from lvssl.evaluation.compression import CompressionSettings, print_compression
    from lvssl.evaluation.compression import compression as run

    settings = parse(CompressionSettings, arguments, "compression")
    print_compression(run(settings))
    say_written(settings, "compression.json")


def encode(arguments: list[str]) -> None:
    from lvssl.codes.file import open_codes
    from lvssl.evaluation.codes import EncodeSettings
    from lvssl.evaluation.codes import encode as run
    from lvssl.evaluation.encoder import in_words
    from lvssl.settings.fields import options

    settings = parse(EncodeSettings, arguments, "encode")
    path = run(settings)
    codes = open_codes(path)
    print(f"{path}: {codes.count:,} codes of {in_words(codes)}, {path.stat().st_size:,} bytes", end="")
    elsewhere = options({"codes": settings.out} if settings.out else {})
    print("; next:", shlex.join(["lvssl", "search", str(settings.run), *elsewhere, "--query"]), "IMAGE")


def search(arguments: list[str]) -> None:
    from lvssl.evaluation.codes import SearchSettings, pictured, print_found, write_csv
    from lvssl.evaluation.codes import search as run

    settings = parse(SearchSettings, arguments, "search")
    if settings.csv:
        print(f"{settings.csv}: neighbours of {write_csv(settings.csv, run(settings)):,} queries")
        return
    found = run(settings)
    if settings.page:
        from lvssl.report.pictures import MOST, write_neighbours

        first = list(itertools.islice(found, MOST))
        title = f"Neighbours of {settings.query.name}"
        print(write_neighbours(settings.page, title, pictured(settings, first)))
        return
    print_found(found)


def curate(arguments: list[str]) -> None:
    from lvssl.evaluation.curate import CurateSettings
    from lvssl.evaluation.curate import curate as run
    from lvssl.report.pictures import write_curation

    settings = parse(CurateSettings, arguments, "curate")
    found = run(settings)
    for name, (_, lines) in found.tables.items():
        print(f"{found.out / name}.csv: {len(lines):,} rows")
    if found.run is None:
        return
    title = f"{(settings.train or found.run.settings.data).name} by {settings.run.resolve().name}"
    print(write_curation(found.out / "curate.html", title, found.tables, found.shown, found.picture))


def report(arguments: list[str]) -> None:
    import tyro

    from lvssl.report.page import write_report

    @dataclass(frozen=True)
    class Report:
        """Write report.html, one page without outside resources, from what the run's folder holds."""

        run: tyro.conf.Positional[Path]
        """The run's folder."""
        out: Path | None = None
        """The folder that the page goes into; results in it, of commands with the same --out, are shown. Left
        out: the run's folder."""

    chosen = parse(Report, arguments, "report")
    print(write_report(chosen.run, chosen.out))


def presets(arguments: list[str]) -> None:
    import json

    from lvssl.settings.presets import difference_of, listing, settings_of

    if len(arguments) == 2:
        print(difference_of(*arguments))
    elif arguments:
        for name in arguments:
            print(json.dumps(settings_of(name), indent=2))
    else:
        print(listing())
        print("\n`lvssl presets NAME` prints every setting of one, `lvssl presets A B` what tells two apart.")


def export(arguments: list[str]) -> None:
    from lvssl.export import ExportSettings
    from lvssl.export import export as run

    print(f"written: {run(parse(ExportSettings, arguments, 'export'))}")


def doctor(arguments: list[str]) -> int:
    import tyro

    from lvssl import doctor

    @dataclass(frozen=True)
    class Doctor:
        """Say what is installed, what is missing, and the command that installs it; or, of a run, whether its
        latent is alive: status 1 on posterior collapse, saturation, or a scale that is constant."""

        run: tyro.conf.Positional[Path | None] = None
        """A run's folder; left out: the installation."""

    run = parse(Doctor, arguments, "doctor").run
    if run is None:
        return doctor.main()
    from lvssl.training.health import examine

    return examine(run)


def demo(arguments: list[str]) -> None:
    from lvssl.demo import DemoSettings
    from lvssl.demo import demo as run

    run(parse(DemoSettings, arguments, "demo"))


def plan(arguments: list[str]) -> None:
    from lvssl.plan import PlanSettings, of_preset
    from lvssl.plan import plan as table

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    name = first.parse_known_args(arguments)[0].preset
    print(table(parse(PlanSettings, arguments, "plan", of_preset(name) if name else None)))


def chain_starts() -> dict[str, Callable[[str | None], Any]]:
    """Stages of a chain that have settings: a preset's name, or None -> the settings to start from."""
    from lvssl.settings import stages
    from lvssl.settings.pretrain import PretrainSettings, preset

    def evaluation(_: str | None) -> Any:
        from lvssl.evaluation.evaluate import EvaluateSettings  # imports torch

        return EvaluateSettings(Path())

    def analysis(_: str | None) -> Any:
        from lvssl.evaluation.analyse import AnalyseSettings

        return AnalyseSettings(Path())

    return {
        "pretrain": lambda name: preset(name) if name else PretrainSettings(),
        "evaluate": evaluation,
        "analyse": analysis,
        "linear": lambda name: stages.start_from(stages.LinearSettings, name),
        "knn": lambda name: stages.start_from(stages.KnnSettings, name),
        "finetune": lambda name: stages.start_from(stages.FinetuneSettings, name),
    }


def launch(arguments: list[str]) -> int:
    import tyro

    from slurm.launch import launch as run

    @dataclass(frozen=True)
    class Launch:
        """Submit a chain of stages, from images to report; what is done or under way is not done again."""

        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""
        preset: str | None = None
        """Pretrain with this preset instead of the file's."""
        dry_run: bool = False
        """Print the scripts, the graph, the GPU-hours and the disk it needs, and submit nothing."""
        cluster: str = "slurm"
        """slurm; local: processes of this machine; debug: in this very process."""

    def parameters(settings: Any) -> int:
        import torch

        from lvssl.models.network import LVNet

        with torch.device("meta"):
            network = LVNet(settings.model, settings.latent, settings.view.resolution)
        return sum(parameter.numel() for parameter in network.parameters())

    def gpu_hours(settings: Any, images: int) -> tuple[float, str]:
        from lvssl.plan import MEASURED, hours, of_pretraining

        one = replace(of_pretraining(settings), images=images)
        rate = "rate measured on one" if one.backbone in MEASURED else "guessed rate"
        basis = f"{one.epochs:,} epochs, on H100s at the {rate} (docs/gpu.md)"
        return hours(one), f"{basis}, where the loader keeps up"

    chosen = parse(Launch, arguments, "launch")
    how = chosen.preset, chosen.cluster, chosen.dry_run
    return run(chosen.file, chain_starts(), *how, parameters, gpu_hours)


def chain_file(arguments: list[str], command: str, about: str) -> Path:
    import tyro

    @dataclass(frozen=True)
    class Chain:
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""

    return parse(Chain, arguments, command, about=about).file


def status(arguments: list[str]) -> None:
    from slurm.status import status as table

    about = "How a chain stands: stages, jobs, steps, speed, restarts, logs, and what went wrong."
    print(table(chain_file(arguments, "status", about), chain_starts()))


def cancel(arguments: list[str]) -> None:
    from slurm.status import cancel as end

    about = "End every job of a chain; what is saved stays, and `lvssl launch` goes on from there."
    print(end(chain_file(arguments, "cancel", about), chain_starts()))


def retry(arguments: list[str]) -> int:
    import tyro

    from slurm.status import retry as run

    @dataclass(frozen=True)
    class Retry:
        """Submit a stage that failed again, and what hangs on it, with the code as it is now."""

        stage: tyro.conf.Positional[str]
        """As `lvssl status` names it."""
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""
        cluster: str = "slurm"
        """slurm, local or debug."""

    chosen = parse(Retry, arguments, "retry")
    return run(chosen.stage, chosen.file, chain_starts(), chosen.cluster)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "pretrain": ("train an encoder without labels", pretrain),
    "linear": (
        "linear classifier (or regression) on the frozen encoder",
        stage("LinearSettings", "lvssl.evaluation.linear:linear"),
    ),
    "knn": (
        "nearest neighbours on features and codes",
        stage("KnnSettings", "lvssl.evaluation.nearest:knn"),
    ),
    "finetune": (
        "train the encoder with all or some labels",
        stage("FinetuneSettings", "lvssl.evaluation.finetune:finetune"),
    ),
    "evaluate": ("linear probe and kNN on features and codes, with a control run and baselines", evaluate),
    "analyse": ("uncertainty, what single bits say, regression: a run beside its control", analyse),
    "study": ("several configurations over several seeds, compared in pairs", study),
    "compression": ("accuracy against bits stored, beside equal-bit controls", compression),
    "encode": ("packed codes and an uncertainty of every image of a set", encode),
    "search": ("find the nearest images of queries by their codes", search),
    "curate": ("near-duplicates, outliers, doubtful labels and a diverse subset of a set", curate),
    "report": ("one HTML page of a run", report),
    "export": ("the encoder for torchvision, timm, torch.hub and ONNX", export),
    "presets": ("list the presets, print one, or compare two", presets),
    "plan": ("memory of a batch on each GPU, and the largest that fits", plan),
    "launch": ("submit a chain of stages to Slurm, or run it here", launch),
    "status": ("pipeline and job status", status),
    "cancel": ("end the jobs of a chain", cancel),
    "retry": ("submit a failed stage of a chain again", retry),
    "doctor": ("what is installed and what is missing; doctor RUN: is its latent alive", doctor),
    "demo": ("all of it on Fashion-MNIST in some minutes", demo),
}

if __name__ == "__main__":
    sys.exit(main())
