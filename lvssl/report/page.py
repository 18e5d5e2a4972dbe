"""The page of a run: one HTML file, made from what lies in the run's folder and from nothing else.

    config.json       settings (required)
    metrics.jsonl     curves; the control's, where evaluation.json names its folder, on the same axes
    evaluation.json   verdict, tables, code figures, commands
    gallery.npz       neighbours, most and least certain images

A section whose file is missing is left out.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shlex
import zipfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvssl.report.figures import Line, line_chart, strip
from lvssl.report.template import PAGE, SCRIPT, STYLE
from lvssl.report.verdict import Comparison, compare, in_words, signed
from pipelines.errors import InputError

SIDE = 96  # thumbnails are cut down to this many pixels
MOST_QUERIES, MOST_NEIGHBOURS, MOST_EXTREMES = 24, 10, 24  # keeps the page below 10 MB

FAMILIES = {
    "none": "no latent (plain SimCLR)",
    "sign": "no latent, its sign bits decorrelated",
    "gaussian": "a Gaussian latent",
    "bernoulli": "a Bernoulli latent",
}


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
    commands = commands_of(run_dir, settings, evaluation)
    sections = [
        head(run_dir, settings, evaluation),
        results(evaluation, commands),
        curves(run_dir, settings, evaluation, commands),
        *gallery(run_dir, commands),
        codes(evaluation, commands),
        settings_section(config, settings),
        commands_section(commands),
    ]
    title = escape(f"{run_dir.resolve().name}: {settings.get('latent', {}).get('family', 'run')}")
    body = "\n".join(section for section in sections if section)
    page = PAGE.substitute(title=title, style=STYLE, script=SCRIPT, body=body)
    return write_text(run_dir / "report.html", page)


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. A last line cut short by a kill is left out; a broken one elsewhere raises."""
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is no JSON") from error
    return [row for row in rows if isinstance(row, dict)]


def commands_of(run_dir: Path, settings: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, str]:
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
    if evaluation.get("command"):
        stages["evaluate"] = str(evaluation["command"])
    return stages


# The first screen -----------------------------------------------------------------------------------------


def head(run_dir: Path, settings: dict[str, Any], evaluation: dict[str, Any]) -> str:
    comparisons = compare(evaluation)
    run, control = evaluation.get("run") or {}, evaluation.get("control") or {}
    against = f"the control's sign bits, {run.get('bits', 0):,} bits each,"
    tiles = tile(comparisons["code"], "The code" if "code_linear" in run else "The sign bits", against)
    tiles += tile(comparisons["features"], "The features", "the control's")
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
        + f"<nav>{navigation(run_dir, evaluation)}</nav></header>"
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


def navigation(run_dir: Path, evaluation: dict[str, Any]) -> str:
    """Links to the sections that are there."""
    pictures = (run_dir / "gallery.npz").exists()
    present = {
        "results": bool(evaluation.get("table")),
        "curves": bool(read_metrics(run_dir / "metrics.jsonl")),
        "neighbours": pictures,
        "certainty": pictures,
        "codes": any(evaluation.get(k) for k in ("compression", "code_statistics", "uncertainty")),
        "settings": True,
        "commands": True,
    }
    return "".join(f'<a href="#{to}">{to.capitalize()}</a>' for to, is_there in present.items() if is_there)


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
    parts.append(f"with {FAMILIES.get(family, family + ' latent')}" if family else "")
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
    """Family `none` is the control, except in the row of the raw pixels, where there is no model at all."""
    if row.get("model") != "none":
        return str(row.get("model", ""))
    return "no model" if row.get("representation") == "pixels" else "control (none)"


# Figures of the code: what they are called on the page, and how they are written.
FIGURES = {
    "raw_pixels": ("smaller than raw pixels", "{:,.1f}\N{MULTIPLICATION SIGN}"),
    "stored_jpeg": ("smaller than the stored JPEG", "{:,.1f}\N{MULTIPLICATION SIGN}"),
    "fp32_feature": ("smaller than the fp32 feature", "{:,.1f}\N{MULTIPLICATION SIGN}"),
    "count": ("codes measured", "{:,}"),
    "nominal_bits": ("bits stored", "{:,}"),
    "entropy_bits": ("sum of the bits' entropies", "{:,.1f} bits"),
    "entropy_per_bit": ("mean entropy of a bit", "{:.3f}"),
    "information_bound_bits": ("information bound of the sampled code", "{:,.1f} bits"),
    "dead_bits": ("dead bits (on for < 1 % or > 99 %)", "{:,}"),
    "mean_absolute_correlation": ("mean |correlation| of two bits", "{:.3f}"),
    "collisions": ("images that share an earlier image's code", "{:,}"),
    "r_auroc": ("R-AUROC: the uncertainty tells wrong neighbours from right (0.5: chance)", "{:.3f}"),
    "recall_at_1": ("R@1: the nearest neighbour is of the same class", "{:.3f}"),
    "aurc": ("AURC: error rate of the probe averaged over coverage (lower is better)", "{:.3f}"),
}


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


def figures_table(name: str, title: str, figures: dict[str, Any]) -> str:
    """A table of named figures under a title; "" where there are none."""
    if not figures:
        return ""
    body = []
    for key, value in figures.items():
        what, form = FIGURES.get(key, (key, "{}"))
        body.append(f"<tr>{cell(what)}{value_cell(value, form)}</tr>")
    button = f'<button data-table="{name}">CSV</button>'
    return table(name, f'<tr><th>{escape(title)}</th><th class="n" data-csv="value">{button}</th></tr>', body)


def table(name: str, header: str, body: Sequence[str]) -> str:
    rows = "".join(body)
    return f'<div class="table"><table id="{name}"><thead>{header}</thead><tbody>{rows}</tbody></table></div>'


def cell(value: Any, form: str = "", style: str = "n") -> str:
    """A cell; numbers are rounded by `form`, and go into the CSV as they are."""
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return value_cell(value, "{:" + form + "}", style)


def value_cell(value: Any, form: str, style: str = "n") -> str:
    if not finite(value):
        return f'<td class="{style}" data-csv="">\N{EN DASH}</td>'
    return f'<td class="{style}" data-csv="{value}">{escape(form.format(value))}</td>'


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def below(command: str | None, csv: str = "") -> str:
    """The line under a figure: the command that makes it, and the button that takes its table along."""
    made = f"<span>Made by <code>{escape(command)}</code></span>" if command else "<span></span>"
    button = f"<button data-table={csv}>Download CSV</button>" if csv else ""
    return f'<div class="below">{made}{button}</div>'


def dot(style: str) -> str:
    return f'<svg viewBox="0 0 12 10"><circle class="mark {style}" cx="6" cy="5" r="4"/></svg>'


# Curves ---------------------------------------------------------------------------------------------------


def curves(
    run_dir: Path, settings: dict[str, Any], evaluation: dict[str, Any], commands: dict[str, str]
) -> str:
    rows = read_metrics(run_dir / "metrics.jsonl")
    path = (evaluation.get("control") or {}).get("path")
    control = read_metrics(Path(path) / "metrics.jsonl") if path else []
    panels = [
        (
            "Contrastive loss",
            "NT-Xent, nats",
            [("run", rows, "ntxent", "run"), ("control", control, "ntxent", "control")],
        ),
        ("Rate", "KL to the prior, bits an image", [("run", rows, "rate_bits", "run")]),
        (
            "Online probes",
            "accuracy on the training views, %",
            [
                ("features", rows, "probe_features", "run"),
                ("code", rows, "probe_code", "code"),
                ("control's features", control, "probe_features", "control"),
            ],
        ),
        ("Speed", "images a second", [("run", rows, "images_per_second", "run")]),
    ]
    if not any("ntxent" in row for row in rows):
        panels[0] = (
            "Loss",
            "all terms",
            [("run", rows, "loss", "run"), ("control", control, "loss", "control")],
        )
    figures = []
    for title, unit, wanted in panels:
        lines = [Line(label, style, series(source, key)) for label, source, key, style in wanted]
        lines = [line for line in lines if len(line.points) > 1]
        # A rate that is 0 throughout is that of a family without a latent: nothing to draw.
        if lines and not (title == "Rate" and all(v == 0 for line in lines for _, v in line.points)):
            figures.append(chart(title, unit, lines))
    if not figures:
        return ""
    return (
        f'<section id="curves"><h2>Curves</h2><div class="charts">{"".join(figures)}</div>'
        + below(commands["pretrain"])
        + "</section>"
    )


def chart(title: str, unit: str, lines: Sequence[Line]) -> str:
    """A figure with its legend, which gives the last value of each line."""
    items = "".join(
        f'<li><svg viewBox="0 0 26 10"><path class="line {line.style}" d="M1 '
        f'5H25"/></svg>{escape(line.label)} '
        f"<b>{line.points[-1][1]:,.4g}</b></li>"
        for line in lines
    )
    drawing = line_chart(lines, "step", f"{title}, {unit}", from_zero=title == "Speed")
    return (
        f'<figure><h3>{escape(title)} <span class="soft" style="font-weight:400">{escape(unit)}</span></h3>'
        f'<ul class="legend">{items}</ul>{drawing}</figure>'
    )


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[key])) for r in rows if finite(r.get("step")) and finite(r.get(key))]


# Pictures -------------------------------------------------------------------------------------------------


def gallery(run_dir: Path, commands: dict[str, str]) -> list[str]:
    """The sections of neighbours and of certainty; [] without a gallery."""
    path = run_dir / "gallery.npz"
    if not path.exists():
        return []
    g = read_gallery(path)
    labels, names = g["labels"], [str(name) for name in g["class_names"]]
    made: dict[int, str] = {}

    def picture(row: int, caption: str = "", wrong: bool = False) -> str:
        source = made.setdefault(row, data_uri(g["images"][row]))
        name = names[labels[row]]
        text = caption or (f"\N{NOT EQUAL TO} {name}" if wrong else name)
        alt = f"{name} (another class)" if wrong else name
        return (
            f'<figure class="pic{" wrong" if wrong else ""}"><img src="{source}" alt="{escape(alt)}" '
            f'loading="lazy">'
            f'<figcaption title="{escape(alt)}">{escape(text)}</figcaption></figure>'
        )

    return [neighbours(g, picture, commands), certainty(g, picture, commands)]


def neighbours(g: dict[str, np.ndarray], picture: Callable[..., str], commands: dict[str, str]) -> str:
    labels, query = g["labels"], g["query"][:MOST_QUERIES]
    ways = {"code": g["neighbours_code"], "features": g["neighbours_feature"]}
    ways = {name: rows[: len(query), :MOST_NEIGHBOURS] for name, rows in ways.items()}
    cards = []
    for q, row in enumerate(query):
        lines = "".join(
            f'<div class="row"><span>by {name}</span><div class="pics">'
            + "".join(picture(int(n), wrong=bool(labels[n] != labels[row])) for n in found[q])
            + "</div></div>"
            for name, found in ways.items()
        )
        cards.append(f'<div class="query">{picture(int(row))}<div class="by">{lines}</div></div>')
    shares = " and ".join(
        f"{100 * (labels[found] == labels[query][:, None]).mean():.0f} % by {name}"
        for name, found in ways.items()
    )
    return (
        '<section id="neighbours"><h2>Nearest neighbours</h2><p class="soft">Test images, and the '
        "training images nearest to them: by Hamming distance of their codes, and by cosine of "
        f"their features. A dashed frame and \N{NOT EQUAL TO} mark another class. Of the neighbours shown, "
        f"{shares} are of the query's class.</p>"
        f'<div class="queries">{"".join(cards)}</div>{below(commands.get("evaluate"))}</section>'
    )


def certainty(g: dict[str, np.ndarray], picture: Callable[..., str], commands: dict[str, str]) -> str:
    names, labels = g["class_names"], g["labels"]
    sides = []
    for title, rows in (("Most certain", g["most_certain"]), ("Least certain", g["least_certain"])):
        pictures = "".join(picture(int(r), str(names[labels[r]])) for r in rows[:MOST_EXTREMES])
        scores = g["uncertainty"][rows[:MOST_EXTREMES]]
        span = f"uncertainty {scores.min():.4g} to {scores.max():.4g}" if len(scores) else ""
        sides.append(
            f'<div><h3>{title} <span class="soft" style="font-weight:400">{span}</span></h3>'
            f'<div class="pics">{pictures}</div></div>'
        )
    return (
        '<section id="certainty"><h2>Most and least certain</h2><p class="soft">The test images at both '
        "ends of the model's own uncertainty. No label went into it.</p>"
        f'<div class="certainty">{"".join(sides)}</div>{below(commands.get("evaluate"))}</section>'
    )


def read_gallery(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a gallery, checked, so that a row that points nowhere is an InputError."""
    rows = ("query", "neighbours_code", "neighbours_feature", "most_certain", "least_certain")
    needed = ("images", "labels", "class_names", "uncertainty", *rows)
    try:
        with np.load(path, allow_pickle=False) as file:
            g = {name: file[name] for name in needed}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: can't be read ({error}); run `lvssl evaluate` again") from error
    images, count = g["images"], len(g["images"])
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise InputError(
            f"{path}: images must be uint8 [M, H, W, 3], not {images.dtype} {list(images.shape)}"
        )
    if len(g["labels"]) != count or len(g["uncertainty"]) != count:
        raise InputError(f"{path}: labels and uncertainty must have one entry for each of the {count} images")
    for name in rows:
        if g[name].size and not (g[name].min() >= 0 and g[name].max() < count):
            raise InputError(f"{path}: {name} points outside the {count} images")
    if count and not (g["labels"].min() >= 0 and g["labels"].max() < len(g["class_names"])):
        raise InputError(f"{path}: labels point outside the {len(g['class_names'])} class_names")
    return g


def data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI of at most SIDE pixels: PNG where small (exact), JPEG above."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= 40
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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


def commands_section(commands: dict[str, str]) -> str:
    lines = [commands[stage] for stage in ("pretrain", "evaluate", "report") if stage in commands]
    return (
        '<section id="commands"><h2>Commands</h2><p class="soft">What makes this page, stage by '
        "stage. Settings not "
        f"named are those above.</p><pre>{escape(chr(10).join(lines))}</pre></section>"
    )


def write_text(path: Path, text: str) -> Path:
    """Beside the target, then renamed onto it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
