"""Pictures on the page: neighbours, the most and least certain images, and what single bits see."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvssl.report.tables import below, cell, table
from pipelines.errors import InputError

SIDE, SMALL_SIDE = 96, 48  # thumbnails are cut down to this many pixels; in the bit explorer
MOST_QUERIES, MOST_NEIGHBOURS, MOST_EXTREMES = 60, 10, 24  # keeps the page below 10 MB
MOST_BITS = 48


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
    cards, buttons = [], []
    for q, row in enumerate(query):
        lines = "".join(
            f'<div class="row"><span>by {name}</span><div class="pics">'
            + "".join(picture(int(n), wrong=bool(labels[n] != labels[row])) for n in found[q])
            + "</div></div>"
            for name, found in ways.items()
        )
        cards.append(f'<div class="query card">{picture(int(row))}<div class="by">{lines}</div></div>')
        buttons.append(f'<button class="pick" aria-pressed="false">{picture(int(row))}</button>')
    shares = " and ".join(
        f"{100 * (labels[found] == labels[query][:, None]).mean():.0f} % by {name}"
        for name, found in ways.items()
    )
    return (
        '<section id="neighbours"><h2>Nearest neighbours</h2><p class="soft">Test images, and the '
        "training images nearest to them: by Hamming distance of their codes, and by cosine of "
        f"their features. A dashed frame and \N{NOT EQUAL TO} mark another class. Of the neighbours shown, "
        f"{shares} are of the query's class. Choose an image.</p>"
        f'<div class="explorer"><div class="picks">{"".join(buttons)}</div>{"".join(cards)}</div>'
        f"{below(commands.get('evaluate'))}</section>"
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


def bit_explorer(path: Path, analysis: dict[str, Any]) -> str:
    """The most telling bits of the code: choose one, see the images where it is on, and off."""
    bits = analysis.get("bits")
    if not bits or not path.exists():
        return ""
    g = read_bits(path)
    rows = {row["bit"]: row for row in bits["table"]}
    sources = [data_uri(image, SMALL_SIDE) for image in g["images"]]
    alts = [escape(str(g["class_names"][label])) for label in g["labels"]]

    def pics(chosen: np.ndarray) -> str:
        return "".join(
            f'<figure class="pic"><img src="{sources[i]}" alt="{alts[i]}" loading="lazy">'
            f"<figcaption>{alts[i]}</figcaption></figure>"
            for i in chosen
        )

    buttons, cards = [], []
    for d, on, off in list(zip(g["bits"].tolist(), g["on"], g["off"]))[:MOST_BITS]:
        row = rows[d]
        sides = "".join(
            f'<div class="row"><span>{label}</span><div class="pics">{pics(chosen)}</div></div>'
            for label, chosen in (("surely on", on), ("surely off", off))
        )
        buttons.append(
            f'<button class="pick bit" aria-pressed="false">bit {d}<br>'
            f'<span class="soft">{escape(row["class"])} {row["auroc"]:.2f}</span></button>'
        )
        cards.append(f'<div class="card bit-card"><p>{escape(in_words(row, bits["flips"]))}</p>{sides}</div>')
    few = "".join(
        f"<tr>{cell(name)}{cell(probe['bits_needed'] if probe['bits_needed'] > 0 else None, ',')}"
        f"{cell(probe['auroc'], '.3f')}{cell(probe['auroc_all'], '.3f')}</tr>"
        for name, probe in bits["few"].items()
    )
    header = (
        "<tr><th>Class</th><th class=n>Bits needed</th><th class=n>Their AUROC</th>"
        "<th class=n>All bits</th></tr>"
    )
    return (
        '<section id="bits"><h2>What single bits see</h2><p class="soft">The bits that say most of the '
        "class, though no label trained them, with the class that each tells best (AUROC; below 0.5 it "
        "speaks against it). Choose a bit.</p>"
        f'<div class="explorer"><div class="picks">{"".join(buttons)}</div>{"".join(cards)}</div>'
        '<p class="soft">How few bits tell a class from the rest nearly as well as all do (within 0.02 of '
        "AUROC), chosen by orthogonal matching pursuit:</p>"
        + table("few-bits", header, [few])
        + below(analysis.get("command"), "few-bits")
        + "</section>"
    )


def in_words(row: dict[str, Any], flips: dict[str, dict[str, float]]) -> str:
    """What is known of one bit, in two sentences."""
    d = str(row["bit"])
    text = (
        f"Bit {d} is on for {100 * row['on']:.0f} % of the images and says {row['information_bits']:.2f} "
        f"bits of the class; it tells {row['class']} with an AUROC of {row['auroc']:.2f}."
    )
    if d in flips.get("replaced", {}):
        change = 100 * flips["same_class"][d]
        text += (
            f" Flipped in a query, it replaces {100 * flips['replaced'][d]:.0f} % of the ten nearest, "
            f"{100 * flips['follows'][d]:.0f} % of which then carry the flipped value; "
            f"the share of the query's class changes by {change:+.1f} points."
        )
    return text


def read_bits(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a bits.npz; InputError if it can't be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("images", "labels", "class_names", "bits", "on", "off")}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: can't be read ({error}); run `lvssl analyse` again") from error


def data_uri(image: np.ndarray, side: int = SIDE) -> str:
    """uint8 [H, W, 3] as a data URI of at most `side` pixels: PNG where small (exact), JPEG above."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= 40
    picture.thumbnail((side, side))
    picture.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
