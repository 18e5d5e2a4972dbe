"""The page of a run: one HTML file, made from what lies in the run's folder and from nothing else.

    config.json       settings (required)
    metrics.jsonl     curves; the control's, where evaluation.json names its folder, on the same axes
    evaluation.json   verdict, tables, code figures, commands
    gallery.npz       neighbours, most and least certain images
    analysis.json     uncertainty, regression, meaning of bits
    bits.npz          the images where a bit is on, and off
    compression.json  accuracy against bits stored

A section whose file is missing is left out.
"""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from pathlib import Path
from typing import Any

from lvssl.latents import described, has_code
from lvssl.report.analysis import disentanglement, regression, uncertainty
from lvssl.report.compression import compression
from lvssl.report.curves import curves
from lvssl.report.figures import strip
from lvssl.report.gallery import bit_explorer, gallery
from lvssl.report.tables import below, cell, dot, figures_table, finite, table
from lvssl.report.template import PAGE, SCRIPT, STYLE
from lvssl.report.verdict import (
    Comparison,
    UncertaintyComparison,
    compare,
    compare_codes,
    compare_uncertainty,
    in_words,
    signed,
    uncertainty_in_words,
)
from lvssl.training.progress import read_metrics
from pipelines.errors import InputError
from pipelines.files import write_atomically


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html and returns its path; an older page is replaced, at once and whole.

    Raises:
        InputError: no such folder, no run, or one of its files can't be read (named).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} is no run folder (it has no config.json)")
    config = read_json(run_dir / "config.json")
    evaluation = read_json(run_dir / "evaluation.json") or {}
    settings = config.get("settings", config)
    analysis = read_json(run_dir / "analysis.json")
    rates = read_json(run_dir / "compression.json")
    measured = {"evaluate": evaluation, "compression": rates, "analyse": analysis}
    commands = commands_of(run_dir, settings, measured)
    sections = [
        head(run_dir, settings, measured),
        results(evaluation, commands),
        curves(run_dir, settings, evaluation, commands),
        *gallery(run_dir, commands),
        codes(evaluation, commands),
        compression(rates),
        uncertainty(analysis),
        bit_explorer(run_dir / "bits.npz", analysis),
        regression(analysis),
        disentanglement(analysis),
        settings_section(config, settings),
        commands_section(commands, missing(run_dir, measured)),
    ]
    title = escape(f"{run_dir.resolve().name}: {settings.get('latent', {}).get('family', 'run')}")
    body = "\n".join(section for section in sections if section)
    page = PAGE.substitute(title=title, style=STYLE, script=SCRIPT, body=body)
    write_atomically(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


# What the folder holds ------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file. InputError names the file and the place."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: an object is expected, not {type(content).__name__}")
    return content


def commands_of(
    run_dir: Path, settings: dict[str, Any], measured: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """What to type for the stages of this run, as far as the settings that one would type."""
    pretrain = ["lvssl", "pretrain", "--out", str(run_dir)]
    latent = settings.get("latent", {}).get("family")
    for name, value in (
        ("preset", settings.get("preset")),
        ("data", settings.get("data")),
        ("family", latent),
    ):
        pretrain += [f"--{name}", str(value)] if value else []
    for name in ("epochs", "seed"):
        pretrain += [f"--{name}", str(settings[name])] if name in settings else []
    stages = {"pretrain": shlex.join(pretrain), "report": shlex.join(["lvssl", "report", str(run_dir)])}
    for name, content in measured.items():
        if content.get("command"):
            stages[name] = str(content["command"])
    return stages


# The first screen -----------------------------------------------------------------------------------------


def head(run_dir: Path, settings: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    evaluation, analysis = measured["evaluate"], measured["analyse"]
    comparisons = compare(evaluation)
    run, control = evaluation.get("run") or {}, evaluation.get("control") or {}
    against = f"the control's sign bits, {run.get('bits', 0):,} bits each,"
    strongest, names = compare_codes(measured["compression"])
    if strongest:
        comparisons["code"] = strongest
        against = f"the strongest control of as many bits ({names})"
    tiles = tile(comparisons["code"], "The code" if "code_linear" in run else "The sign bits", against)
    tiles += tile(comparisons["features"], "The features", "the control's")
    tiles += uncertainty_tile(compare_uncertainty(analysis))
    notes = []
    noise = [c.noise for rows in comparisons.values() for c in rows if c.noise is not None]
    if noise:
        notes.append(
            f"One seed, {evaluation['data']['test']:,} test images: a difference up to {max(noise):.1f} "
            "points is within their sampling error and called level. "
            "What another seed would change comes on top."
        )
    if control and run.get("bits") != control.get("bits"):
        notes.append("The code and the control's sign bits differ in length and are not compared.")
    if not evaluation:
        notes.append("Not evaluated yet: lvssl evaluate measures this run and writes the table.")
    elif not control:
        notes.append("No control was evaluated: lvssl evaluate --control RUN puts one beside these figures.")
    return (
        f"<header><h1>{escape(headline(run_dir, settings, evaluation))}</h1>"
        f"<p>{escape(trained(settings, evaluation))}</p>"
        + (f'<div class="verdicts">{tiles}</div>' if tiles else "")
        + (f'<p class="soft small">{escape(" ".join(notes))}</p>' if notes else "")
        + f"<nav>{navigation(run_dir, measured)}</nav></header>"
    )


def tile(rows: list[Comparison], what: str, against: str) -> str:
    """The verdict on the code or the features, in words and in points; "" without a comparison."""
    if not rows:
        return ""
    outcomes = {c.outcome for c in rows}
    ahead = " ahead" if "ahead" in outcomes and "behind" not in outcomes else ""
    deltas = "".join(
        f"<div><dt><b>{escape(c.measure)}</b><br>{c.run:.1f} against {c.control:.1f} %</dt>"
        f"<dd>{signed(c.difference)}</dd></div>"
        for c in rows
    )
    words = escape(in_words(rows, what, against))
    return f'<div class="verdict{ahead}"><p>{words}</p><dl class="deltas">{deltas}</dl></div>'


def uncertainty_tile(found: UncertaintyComparison | None) -> str:
    """The verdict on the posterior's uncertainty; "" where it was not analysed beside a control."""
    if found is None:
        return ""
    ahead = " ahead" if found.outcome == "ahead" else ""
    pairs = (("R-AUROC", found.run, found.control), ("R@1", found.recall, found.control_recall))
    deltas = "".join(
        f"<div><dt><b>{name}</b><br>{run:.3f} against {control:.3f}</dt>"
        f"<dd>{signed(run - control, 3)}</dd></div>"
        for name, run, control in pairs
    )
    words = escape(uncertainty_in_words(found))
    return f'<div class="verdict{ahead}"><p>{words}</p><dl class="deltas">{deltas}</dl></div>'


def navigation(run_dir: Path, measured: dict[str, dict[str, Any]]) -> str:
    """Links to the sections that are there."""
    evaluation, analysis = measured["evaluate"], measured["analyse"]
    pictures = (run_dir / "gallery.npz").exists()
    present = {
        "results": bool(evaluation.get("table")),
        "curves": bool(read_metrics(run_dir / "metrics.jsonl")),
        "neighbours": pictures,
        "certainty": pictures,
        "codes": any(evaluation.get(k) for k in ("compression", "code_statistics", "uncertainty")),
        "bits-stored": bool(measured["compression"].get("rows")),
        "uncertainty": bool(analysis.get("models")),
        "bits": bool(analysis.get("bits")) and (run_dir / "bits.npz").exists(),
        "regression": bool(analysis.get("models")),
        "settings": True,
        "commands": True,
    }
    return "".join(
        f'<a href="#{to}">{to.capitalize().replace("-", " ")}</a>'
        for to, is_there in present.items()
        if is_there
    )


def headline(run_dir: Path, settings: dict[str, Any], evaluation: dict[str, Any]) -> str:
    data = data_name(settings, evaluation)
    run = evaluation.get("run") or {}
    made = f"{run['bits']:,}-bit codes" if run.get("bits") and "code_linear" in run else "Features"
    return f"{made} of {data}" if data else f"{made}: {run_dir.resolve().name}"


def data_name(settings: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The data set's name; else the file's, less what says that it is the training set."""
    named = evaluation.get("data", {}).get("name")
    if named:
        return str(named)
    path = Path(str(settings.get("data") or ""))
    stem = path.stem.removesuffix("-train").removesuffix("_train")
    return path.parent.name if stem == "train" else stem


def trained(settings: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """One sentence: what was trained, on what, for how long."""
    data, latent = evaluation.get("data", {}), settings.get("latent", {})
    backbone = settings.get("model", {}).get("backbone")
    family = str(latent.get("family", ""))
    parts = [f"A {backbone} encoder" if backbone else "An encoder"]
    parts.append(f"with {described(family)}" if family else "")
    parts.append("was trained without labels")
    parts.append(f"on {data['train']:,} images" if data.get("train") else "")
    parts.append(f"at {data['resolution']} px" if data.get("resolution") else "")
    parts.append(f"for {settings['epochs']} epochs" if "epochs" in settings else "")
    parts.append(f"in batches of {settings['batch_size']}" if "batch_size" in settings else "")
    return " ".join(part for part in parts if part) + "."


# Tables ---------------------------------------------------------------------------------------------------


def results(evaluation: dict[str, Any], commands: dict[str, str]) -> str:
    rows = evaluation.get("table") or []
    if not rows:
        return ""
    values = [v for row in rows for v in (row.get("linear"), row.get("knn")) if finite(v)]
    low, high = (math.floor(min(values) / 5) * 5, math.ceil(max(values) / 5) * 5) if values else (0, 100)
    best = {
        name: max((row[name] for row in rows if finite(row.get(name))), default=None)
        for name in ("linear", "knn")
    }
    ours = evaluation.get("run", {}).get("family")
    body = []
    for row in rows:
        marks = [(name, row.get(name) if finite(row.get(name)) else None) for name in ("knn", "linear")]
        accuracies = "".join(
            cell(row.get(name), ".1f", "n best" if finite(row.get(name)) and row[name] == best[name] else "n")
            for name in ("linear", "knn")
        )
        body.append(
            f"<tr{' class=ours' if row.get('model') == ours else ''}>{cell(model_name(row))}"
            f"{cell(row.get('representation'))}{cell(row.get('bits'), ',')}{accuracies}"
            f'<td class="wide">{strip(marks, low, high)}</td></tr>'
        )
    wide = (
        f'<th class="wide"><ul class="legend inline"><li>{low} to {high} %</li><li>{dot("linear")}linear</li>'
        f"<li>{dot('knn')}kNN</li></ul></th>"
    )
    header = (
        "<tr><th>Model</th><th>Representation</th><th class=n>Bits</th>"
        f"<th class=n>Linear %</th><th class=n>kNN %</th>{wide}</tr>"
    )
    return (
        '<section id="results"><h2>Results</h2><p class="soft">Test accuracy. Linear: L2 logistic '
        "regression, its strength chosen on held-out training images. kNN: 20 neighbours, by cosine on "
        "features, by Hamming distance on codes, ties shared.</p>"
        + table("results-table", header, body)
        + below(commands.get("evaluate"), "results-table")
        + "</section>"
    )


def model_name(row: dict[str, Any]) -> str:
    """Plain SimCLR is the control, except in the row of the raw pixels, where there is no model at all."""
    model = str(row.get("model", ""))
    if has_code(model):
        return model
    return "no model" if row.get("representation") == "pixels" else f"control ({model})"


def codes(evaluation: dict[str, Any], commands: dict[str, str]) -> str:
    parts = (
        ("compression", "Compression"),
        ("uncertainty", "Uncertainty"),
        ("code_statistics", "What the bits hold"),
    )
    tables = [figures_table(name, title, evaluation.get(name) or {}) for name, title in parts]
    if not any(tables):
        return ""
    compression, uncertainty, statistics = tables
    return (
        '<section id="codes"><h2>Codes and uncertainty</h2><div class="columns">'
        f"<div>{compression}{uncertainty}</div><div>{statistics}</div></div>"
        f"{below(commands.get('evaluate'))}</section>"
    )


# Settings and commands ------------------------------------------------------------------------------------


def settings_section(config: dict[str, Any], settings: dict[str, Any]) -> str:
    rows = [*flat(settings), *flat({k: v for k, v in config.items() if k not in ("settings", *settings)})]
    body = [f"<tr>{cell(name)}{cell(text)}</tr>" for name, text in rows]
    half = (len(body) + 1) // 2
    tables = "".join(
        f'<table class="settings" id="settings-{i}"><tbody>{"".join(part)}</tbody></table>'
        for i, part in enumerate((body[:half], body[half:]))
    )
    return f'<section id="settings"><h2>Settings</h2><div class="columns">{tables}</div></section>'


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def missing(run_dir: Path, measured: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What the page doesn't show yet, as (what, the command that measures it)."""
    parts = {
        "evaluate": "results, neighbours, the most and least certain images",
        "compression": "accuracy against bits stored, beside controls of equal length",
        "analyse": "uncertainty, calibration, what single bits see, what can be read from a code",
    }
    absent = [stage for stage in parts if not measured[stage]]
    return [(parts[stage], shlex.join(["lvssl", stage, str(run_dir)])) for stage in absent]


def commands_section(commands: dict[str, str], absent: list[tuple[str, str]]) -> str:
    lines = [
        commands[stage]
        for stage in ("pretrain", "evaluate", "compression", "analyse", "report")
        if stage in commands
    ]
    more = "".join(f"<li>{escape(what)}: <code>{escape(line)}</code></li>" for what, line in absent)
    told = "Not measured yet; each command adds its part to the next report:"
    return (
        '<section id="commands"><h2>Commands</h2><p class="soft">What makes this page, stage by '
        f"stage. Settings not named are those above.</p><pre>{escape(chr(10).join(lines))}</pre>"
        + f'<p class="soft">{told}</p><ul>{more}</ul>' * bool(more)
        + "</section>"
    )
