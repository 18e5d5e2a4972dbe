"""Commands that measure a run, and the page that shows the results."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvssl.commands.arguments import parse, preset_in


def stage(kind: str, name: str) -> Callable[[list[str]], None]:
    """Return the command of a stage; `kind` names its settings class, and `name` is "module:function"."""

    def run(arguments: list[str]) -> None:
        from lvssl.settings import stages

        chosen = getattr(stages, kind)
        has_presets = hasattr(chosen, "preset")
        start = stages.start_from(chosen, preset_in(arguments) if has_presets else None)
        module, _, function = name.partition(":")
        settings = parse(type(start), arguments, function, start)

        from lvssl.evaluation.foreign import measure_embeddings
        from lvssl.evaluation.stage import show
        from lvssl.runs.embeddings import is_embeddings

        if not isinstance(settings, stages.FinetuneSettings) and is_embeddings(settings.run):
            show(function, *measure_embeddings(function, settings))
            return
        done = getattr(importlib.import_module(module), function)(settings)
        if done.done is not None and done.world.first:
            show(function, done.path, done.done)

    return run


linear = stage("LinearSettings", "lvssl.evaluation.linear:linear")
knn = stage("KnnSettings", "lvssl.evaluation.nearest:knn")
finetune = stage("FinetuneSettings", "lvssl.evaluation.finetune:finetune")


def evaluate(arguments: list[str]) -> None:
    from lvssl.settings.measure import EvaluateSettings

    settings = parse(EvaluateSettings, arguments, "evaluate")

    from lvssl.evaluation.evaluate import evaluate as run
    from lvssl.evaluation.evaluate import print_table

    print_table(run(settings)["rows"])
    say_written(settings, "evaluation.json")


def say_written(settings: Any, name: str) -> None:
    """Print where a result was written, and the command that shows it."""
    from lvssl.runs.result import result_folder
    from lvssl.settings.fields import options, shell_line

    elsewhere = options({"out": settings.out} if settings.out else {})
    print(
        f"written: {result_folder(settings) / name}; next:",
        shell_line("lvssl", "report", settings.run, *elsewhere),
    )


def analyse(arguments: list[str]) -> None:
    from lvssl.settings.measure import AnalyseSettings

    settings = parse(AnalyseSettings, arguments, "analyse")

    from lvssl.evaluation.analyse import analyse as run
    from lvssl.evaluation.analyse import print_analysis

    print_analysis(run(settings))
    say_written(settings, "analysis.json")


def compression(arguments: list[str]) -> None:
    from lvssl.settings.measure import CompressionSettings

    settings = parse(CompressionSettings, arguments, "compression")

    from lvssl.evaluation.compression import compression as run
    from lvssl.evaluation.compression import print_compression

    print_compression(run(settings))
    say_written(settings, "compression.json")


def study(arguments: list[str]) -> None:
    from lvssl.settings.measure import StudySettings

    settings = parse(StudySettings, arguments, "study")

    from lvssl.evaluation.study import study as run
    from lvssl.report.study import write_study

    result = run(settings)
    if result is not None:
        written = write_study(settings.out, result)
        print((settings.out / "study.md").read_text())
        print(f"written: {settings.out / 'study.json'}, {', '.join(path.name for path in written)}")


def report(arguments: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Report:
        """Write the results in a run's folder as report.html, a self-contained page."""

        run: tyro.conf.Positional[Path]
        """Folder of the run."""
        out: Path | None = None
        """Folder for the page. Results there, written by commands with the same --out, are shown too. If
        omitted, the run's folder."""

    chosen = parse(Report, arguments, "report")

    from lvssl.report.page import write_report

    print(write_report(chosen.run, chosen.out))


def runs(arguments: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Runs:
        """List the runs in a folder (state, step, figures, disk space), best first, or compare two runs."""

        folder: tyro.conf.Positional[Path] = Path("runs")
        """Folder to search, including its subfolders."""
        best: str = ""
        """Sort by this figure, of `evaluate` (linear, knn, code_linear, code_knn ...) or of the log (loss,
        rankme, probe_features, online_knn ...)."""
        compare: tuple[Path, Path] | None = None
        """Folders of two runs: show the settings that differ, and figures at equal fractions of both."""

    chosen = parse(Runs, arguments, "runs")

    from lvssl.runs.listing import ONLINE, RANK, compared, ranked, runs_in
    from pipelines.amounts import number_text, size_text

    if chosen.compare:
        settings, figures = compared(*chosen.compare)
        show_table([("", *map(str, chosen.compare)), *settings, *figures])
        return
    found = runs_in(chosen.folder)
    metrics = [chosen.best] if chosen.best else ["loss", RANK, ONLINE, "linear", "knn"]
    if chosen.best:
        found = ranked(found, chosen.best)
    rows = [("run", "state", "step", *metrics, "disk")]
    for one in found:
        step = f"{one.step:,}/{one.steps:,}" if one.steps else f"{one.step:,}"
        values = [number_text(one.figures[name], 4) if name in one.figures else "" for name in metrics]
        rows.append((str(one.folder), one.state, step, *values, size_text(one.size)))
    show_table(rows)


def show_table(rows: list[tuple[str, ...]]) -> None:
    """Print the rows in columns as wide as necessary."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
