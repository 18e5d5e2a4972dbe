"""The report's pictures: neighbours, the most and least certain images, and what single bits respond to."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lvssl.report.template import render
from lvssl.report.verdict import signed
from pipelines.errors import InputError

SIDE, SMALL_SIDE = 96, 48  # maximum sides of the pictures, in pixels; the second in the bit explorer


class Picture(NamedTuple):
    """The input of the template `picture`."""

    source: str  # a data URI
    alt: str
    text: str
    wrong: bool = False


def gallery(path: Path, command: str | None) -> dict[str, str]:
    """Return the sections on neighbours and certainty; {} without a gallery."""
    if not path.exists():
        return {}
    g = read_gallery(path)
    sources: dict[int, str] = {}

    def picture(row: int, wrong: bool = False) -> Picture:
        source = sources.setdefault(row, data_uri(g["images"][row]))
        name = str(g["class_names"][g["labels"][row]])
        if wrong:
            return Picture(source, f"{name} (another class)", f"\N{NOT EQUAL TO} {name}", wrong)
        return Picture(source, name, name)

    return {"neighbours": neighbours(g, picture, command), "certainty": certainty(g, picture, command)}


def neighbours(g: dict[str, np.ndarray], picture: Callable[..., Picture], command: str | None) -> str:
    labels, query = g["labels"], g["query"]
    ways = {"code": g["neighbours_code"], "features": g["neighbours_feature"]}
    queries = [
        {
            "picture": picture(int(row)),
            "found": {
                name: [picture(int(n), wrong=bool(labels[n] != labels[row])) for n in found[q]]
                for name, found in ways.items()
            },
        }
        for q, row in enumerate(query)
    ]
    shares = [
        f"{100 * (labels[found] == labels[query][:, None]).mean():.0f} % by {name}"
        for name, found in ways.items()
    ]
    return render("neighbours.html", queries=queries, shares=shares, command=command)


def certainty(g: dict[str, np.ndarray], picture: Callable[..., Picture], command: str | None) -> str:
    sides = []
    for title, name in (("Most certain", "most_certain"), ("Least certain", "least_certain")):
        rows = g[name]
        scores = g["uncertainty"][rows]
        span = f"uncertainty {scores.min():.4g} to {scores.max():.4g}" if len(scores) else ""
        sides.append({"title": title, "span": span, "pictures": [picture(int(row)) for row in rows]})
    return render("certainty.html", sides=sides, command=command)


def read_gallery(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a gallery. Raises InputError if they are inconsistent."""
    rows = ("query", "neighbours_code", "neighbours_feature", "most_certain", "least_certain")
    g = arrays(path, "evaluate", ("images", "labels", "class_names", "uncertainty", *rows))
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
    """Return the bit explorer: one chooses a bit and sees images where it is on, and off."""
    bits = analysis.get("bits")
    if not bits or not path.exists():
        return ""
    g = arrays(path, "analyse", ("images", "labels", "class_names", "bits", "on", "off"))
    rows = {row["bit"]: row for row in bits["table"]}
    names = [str(g["class_names"][label]) for label in g["labels"]]
    shown = [Picture(data_uri(image, SMALL_SIDE), name, name) for image, name in zip(g["images"], names)]
    chosen = [
        {
            "row": rows[d],
            "words": in_words(rows[d], bits["flips"]),
            "sides": {"surely on": [shown[i] for i in on], "surely off": [shown[i] for i in off]},
        }
        for d, on, off in zip(g["bits"].tolist(), g["on"], g["off"])
    ]
    return render("bits.html", bits=chosen, few=bits["few"], command=analysis.get("command"))


def in_words(row: dict[str, Any], flips: dict[str, dict[str, float]]) -> str:
    """Describe one bit in two sentences."""
    d = str(row["bit"])
    text = (
        f"Bit {d} is set for {100 * row['on']:.0f} % of the images and carries {row['information_bits']:.2f} "
        f"bits about the class; it detects {row['class']} with an AUROC of {row['auroc']:.2f}."
    )
    if d in flips.get("replaced", {}):
        text += (
            f" Flipping it in a query replaces {100 * flips['replaced'][d]:.0f} % of the ten nearest, "
            f"{100 * flips['follows'][d]:.0f} % of which then have the flipped value; "
            f"the share of the query's class changes by {signed(100 * flips['same_class'][d])} points."
        )
    return text


def arrays(path: Path, command: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays from a command's .npz. Raises InputError if it can't be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: can't be read ({error}); run `lvssl {command}` again") from error


def data_uri(image: np.ndarray, side: int = SIDE) -> str:
    """Encode uint8 [H, W, 3] as a data URI of at most `side` pixels: PNG (exact) if small, otherwise JPEG."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= 40
    picture.thumbnail((side, side))
    picture.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
