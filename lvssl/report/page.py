"""The page of a run: a single HTML file, made only from the files in the run's folder.

    config.json       settings (required)
    metrics.jsonl     curves, next to those of the control if evaluation.json names its folder
    evaluation.json   verdict, tables, code figures, commands
    gallery.npz       neighbours, most and least certain images
    analysis.json     uncertainty, regression, analysis of single bits
    bits.npz          images where a bit is on, and off
    compression.json  accuracy against bits stored

A section whose file is missing is left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lvssl.latents import described
from lvssl.report.analysis import regression, uncertainty
from lvssl.report.compression import compression
from lvssl.report.curves import curves
from lvssl.report.gallery import bit_explorer, gallery
from lvssl.report.template import finite, render
from lvssl.report.verdict import (
    Comparison,
    UncertaintyComparison,
    added,
    advice,
    best_code,
    compare,
    compare_codes,
    compare_uncertainty,
    in_words,
    measured_of,
    signed,
    uncertainty_in_words,
    whole_code,
)
from lvssl.runs.result import read_result
from lvssl.runs.rows import are_rows, by_point, stored_as
from lvssl.runs.run import read_config
from lvssl.settings.fields import flat, options, shell_line
from lvssl.settings.presets import command
from lvssl.settings.pretrain import PretrainSettings
from pipelines.datasets.recognise import set_name
from pipelines.files import write_atomically

# For each command: the file of its result, and the types of the entries that the page reads.
RESULTS: dict[str, tuple[str, dict[str, type]]] = {
    "evaluate": (
        "evaluation.json",
        {"rows": list, **dict.fromkeys(("run", "control", "data", "protocol"), dict)},
    ),
    "compression": ("compression.json", {"rows": list, "left_out": list}),
    "analyse": (
        "analysis.json",
        {"rows": list, **dict.fromkeys(("run", "control", "reliability", "bits"), dict)},
    ),
}
TIMES = "{:,.1f}\N{MULTIPLICATION SIGN}"
# Figures of the code in three tables: names on the page, and formats.
FIGURES = {
    "compression": {
        "raw_pixels": ("smaller than raw pixels", TIMES),
        "stored_jpeg": ("smaller than the stored JPEG", TIMES),
        "fp32_feature": ("smaller than the fp32 feature", TIMES),
    },
    "uncertainty": {
        "r_auroc": ("R-AUROC: the uncertainty detects wrong neighbours (0.5: chance)", "{:.3f}"),
        "recall_at_1": ("R@1: the nearest neighbour has the same class", "{:.3f}"),
        "aurc": ("AURC: error rate of the probe averaged over coverage (lower is better)", "{:.3f}"),
    },
    "code_statistics": {
        "count": ("codes measured", "{:,}"),
        "nominal_bits": ("bits stored", "{:,}"),
        "entropy_bits": ("sum of the bits' entropies", "{:,.1f} bits"),
        "entropy_per_bit": ("mean entropy of a bit", "{:.3f}"),
        "information_bound_bits": ("information bound of the sampled code", "{:,.1f} bits"),
        "dead_bits": ("dead bits (on for < 1 % or > 99 %)", "{:,}"),
        "mean_absolute_correlation": ("mean |correlation| of two bits", "{:.3f}"),
        "collisions": ("images that share an earlier image's code", "{:,}"),
    },
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write report.html to `out` (by default run_dir) and return its path; an older page is replaced
    atomically. Results in `out` take precedence over the run's own.

    Raises:
        InputError: no such folder, no run, or one of its files can't be read (named).
    """
    run_dir = Path(run_dir)
    folder = out or run_dir
    settings, classes = read_config(run_dir)
    measured = {
        stage: read_result(path, **kinds) if (path := of_results(folder, run_dir, name)).exists() else {}
        for stage, (name, kinds) in RESULTS.items()
    }
    for stage in RESULTS:
        if not are_rows(measured[stage].get("rows")):
            measured[stage] = {}  # from an older version, to be measured again
    evaluation, analysis = measured["evaluate"], measured["analyse"]
    commands = commands_of(run_dir, out, settings, measured)
    evaluated = commands.get("evaluate")
    data = data_name(settings.data, evaluation)
    absent = missing(run_dir, out, measured, None if classes > 1 else settings.data)
    sections = {
        "results": results(evaluation, evaluated),
        "curves": curves(run_dir, evaluation, commands["pretrain"]),
        **gallery(of_results(folder, run_dir, "gallery.npz"), evaluated),
        "codes": codes(evaluation, evaluated),
        "bits-stored": compression(measured["compression"]),
        "uncertainty": uncertainty(analysis),
        "bits": bit_explorer(of_results(folder, run_dir, "bits.npz"), analysis),
        "regression": regression(analysis),
        "settings": settings_section(read_result(run_dir / "config.json"), settings),
        "commands": commands_section(commands, absent, classes > 1),
    }
    page = render(
        "page.html",
        title=" · ".join(filter(None, (run_dir.resolve().name, settings.latent.family, data))),
        headline=headline(run_dir, data, evaluation),
        trained=trained(settings, evaluation),
        **verdicts(measured, classes > 1),
        sections={name: section for name, section in sections.items() if section},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.html", page.encode("utf-8", "backslashreplace"))
    return folder / "report.html"


# The folder's files ---------------------------------------------------------------------------------------


def of_results(folder: Path, run_dir: Path, name: str) -> Path:
    """Return the path of a result: in `folder`, where --out wrote it, or else in the run's folder."""
    return path if (path := folder / name).exists() else run_dir / name


def commands_of(
    run_dir: Path, out: Path | None, settings: PretrainSettings, measured: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Return the commands for the stages of this run."""
    stages = {
        "pretrain": command("pretrain", replace(settings, out=run_dir)),
        "report": shell_line("lvssl", "report", run_dir, *options({"out": out} if out else {})),
    }
    return stages | {name: str(found["command"]) for name, found in measured.items() if found.get("command")}


# The first screen -----------------------------------------------------------------------------------------


def verdicts(measured: dict[str, dict[str, Any]], labels: bool = True) -> dict[str, Any]:
    """Return `advice` (what to do, and what the latent adds), `tiles` (comparisons with controls, in words
    and in points) and `notes` (what the comparisons leave open)."""
    evaluation, comparisons = measured["evaluate"], compared(measured)
    code, of_control = (measured_of(evaluation, side, "code") for side in ("run", "control"))
    code = code or whole_code(measured["compression"])
    bits, own = int(code.get("bits") or 0), code.get("method") == "code"
    against = f"the control's codes of {bits:,} bits"
    tiles = [
        tile(comparisons["code"], "The code" if own else "The sign bits", against),
        tile(comparisons["features"], "The features", "the control's"),
        uncertainty_tile(compare_uncertainty(measured["analyse"])),
    ]
    notes = []
    noise = [c.noise for rows in comparisons.values() for c in rows]
    if noise:
        count = (evaluation.get("data") or {}).get("test") or measured["compression"]["queries"]
        notes.append(
            f"One seed, {count:,} test images: differences up to {max(noise):.1f} "
            "points are within the sampling error and called level. "
            "Variation between seeds is not included."
        )
    if of_control and not comparisons["code"]:
        notes.append("The codes of run and control differ in length and are not compared.")
    elif of_control and not measured["compression"] and "left_out" not in evaluation:  # from an older version
        notes.append("Only the control's sign bits were measured: --overwrite measures its other codes, too.")
    notes += [f"Not measured: {reason}." for reason in evaluation.get("left_out") or []]
    if not evaluation and not labels:
        notes.append("Without labels, accuracies can't be measured; the commands at the end need none.")
    elif not evaluation:
        notes.append("Not evaluated yet: lvssl evaluate measures this run and writes the table.")
    elif not evaluation.get("control"):
        notes.append("No control was evaluated: lvssl evaluate --control RUN adds one to compare with.")
    tiles = [each for each in tiles if each]
    return {"advice": " ".join(conclusion(measured)), "tiles": tiles, "notes": notes}


def compared(measured: dict[str, dict[str, Any]]) -> dict[str, list[Comparison]]:
    """Compare the run's features and code with the control's. Codes are compared by compression.json if it
    exists, as it has more of them than `evaluate` measures."""
    found = compare(measured["evaluate"])
    return found | {"code": compare_codes(measured["compression"]) or found["code"]}


def conclusion(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Return sentences on what is best for a user, then on what the latent adds over the best control."""
    evaluation, found, chosen, latent = measured["evaluate"], compared(measured), "", ""
    code = measured_of(evaluation, "run", "code")
    if code.get("method") == "code":
        control = (evaluation.get("control") or {}).get("path") or "CONTROL"
        chosen, latent = best_code(found["code"], int(code["bits"]), str(control)), added(found)
    return [sentence for sentence in (advice(chosen, measured["analyse"]), latent) if sentence]


class Difference(NamedTuple):
    """One measure in a tile."""

    name: str
    sides: str
    difference: str


class Tile(NamedTuple):
    """One verdict on the first screen."""

    words: str
    ahead: bool  # ahead in at least one measure, behind in none
    figures: list[Difference]


def tile(rows: list[Comparison], what: str, against: str) -> Tile | None:
    """Return the verdict on the code or the features; None without a comparison."""
    if not rows:
        return None
    outcomes = {c.outcome for c in rows}
    figures = [
        Difference(c.measure, f"{c.run:.1f} against {c.control:.1f} %", signed(c.difference)) for c in rows
    ]
    return Tile(in_words(rows, what, against), "better" in outcomes and "worse" not in outcomes, figures)


def uncertainty_tile(found: UncertaintyComparison | None) -> Tile | None:
    """Return the verdict on the posterior's uncertainty; None unless it was analysed next to a control."""
    if found is None:
        return None
    pairs = (("R-AUROC", found.run, found.control), ("R@1", found.recall, found.control_recall))
    figures = [
        Difference(name, f"{run:.3f} against {control:.3f}", signed(run - control, 3))
        for name, run, control in pairs
    ]
    return Tile(uncertainty_in_words(found), found.outcome == "better", figures)


def headline(run_dir: Path, data: str, evaluation: dict[str, Any]) -> str:
    code = measured_of(evaluation, "run", "code")
    made = f"{code['bits']:,}-bit codes" if code.get("method") == "code" else "Features"
    return f"{made} of {data}" if data else f"{made}: {run_dir.resolve().name}"


def data_name(path: Path, evaluation: dict[str, Any]) -> str:
    """Return the data set's name, by the test images that were measured or else by the path of the training
    images."""
    return set_name(str((evaluation.get("data") or {}).get("name") or "")) or set_name(str(path))


def trained(settings: PretrainSettings, evaluation: dict[str, Any]) -> str:
    """Describe in one sentence what was trained, on what, for how long."""
    data, epochs = evaluation.get("data") or {}, settings.epochs
    images = f" on {data['train']:,} images" if data.get("train") else ""
    side = f" at {data['resolution']} px" if data.get("resolution") else ""
    return (
        f"A {settings.model.backbone} encoder with {described(settings.latent.family)} was trained without "
        f"labels{images}{side} for {epochs} epoch{'s' * (epochs != 1)} in batches of {settings.batch_size}."
    )


# Tables ---------------------------------------------------------------------------------------------------


def results(evaluation: dict[str, Any], command: str | None) -> str:
    """Return the table of accuracies of every representation; "" if none was evaluated."""
    rows = [point for point in by_point(evaluation.get("rows") or []) if "linear" in point]
    if not rows:
        return ""
    found = {name: [row[name] for row in rows if finite(row.get(name))] for name in ("linear", "knn")}
    values = found["linear"] + found["knn"]
    low, high = (math.floor(min(values) / 5) * 5, math.ceil(max(values) / 5) * 5) if values else (0, 100)
    run, control, protocol = evaluation["run"], evaluation.get("control"), evaluation.get("protocol") or {}
    names = {run["name"]: run["family"]}  # the control's name also says that it is the control
    names |= {control["name"]: f"control ({control['family']})"} if control else {}
    return render(
        "results.html",
        rows=[
            row
            | {
                "model": names.get(row["run"], row["run"]),
                "representation": stored_as(row),
                "ours": row["run"] == run["name"],
            }
            for row in rows
        ],
        best={name: max(values, default=None) for name, values in found.items()},
        low=low,
        high=high,
        probe=protocol.get("linear", "logistic regression"),
        k=(protocol.get("knn") or {}).get("k", 20),
        command=command,
    )


def codes(evaluation: dict[str, Any], command: str | None) -> str:
    """Return three tables of what is known about the code and the uncertainty; "" if nothing is."""
    name = (evaluation.get("run") or {}).get("name")
    known: dict[str, Any] = {}
    for representation in ("code", "uncertainty"):
        for point in by_point(evaluation.get("rows") or [], run=name, representation=representation):
            known |= point
    tables = {
        part: [(*how, known[figure]) for figure, how in figures.items() if figure in known]
        for part, figures in FIGURES.items()
    }
    return render("codes.html", tables=tables, command=command) if any(tables.values()) else ""


# Settings and commands ------------------------------------------------------------------------------------


def settings_section(config: dict[str, Any], read: PretrainSettings) -> str:
    settings = config["settings"]
    values = flat(settings) | flat({k: v for k, v in config.items() if k not in ("settings", *settings)})
    for name, value in read.latent.in_force.items():
        values[f"latent.{name}"] = f"{value if isinstance(value, str) else format(value, 'g')} (default)"
    rows = [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in values.items()]
    half = (len(rows) + 1) // 2
    return render("settings.html", halves=(rows[:half], rows[half:]))


def missing(
    run_dir: Path, out: Path | None, measured: dict[str, dict[str, Any]], unlabelled: Path | None
) -> list[tuple[str, str]]:
    """List what the page doesn't show yet as (what, the command that measures it). If the training images are
    `unlabelled`, list what else the run is good for."""
    if unlabelled is not None:
        uses = {
            "a code and an uncertainty for each image": ["encode", *options({"images": unlabelled})],
            "the images nearest to a query": ["search", "--query", "IMAGE", "--page", "search.html"],
            "near-duplicates, outliers, a diverse subset": ["curate"],
        }
        return [(what, shell_line("lvssl", name, run_dir, *rest)) for what, (name, *rest) in uses.items()]
    parts = {
        "evaluate": "results, neighbours, the most and least certain images",
        "compression": "accuracy against bits stored, next to controls of equal length",
        "analyse": "uncertainty, calibration, single bits, regression from the code",
    }
    absent = [stage for stage in parts if not measured[stage]]
    elsewhere = options({"out": out} if out else {})
    return [(parts[stage], shell_line("lvssl", stage, run_dir, *elsewhere)) for stage in absent]


def commands_section(commands: dict[str, str], absent: list[tuple[str, str]], labels: bool) -> str:
    order = ("pretrain", "evaluate", "compression", "analyse", "report")
    lines = [commands[s] for s in order if s in commands]
    return render("commands.html", lines=lines, missing=absent, labels=labels)
