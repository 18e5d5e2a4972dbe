"""Line charts as inline SVG, drawn by matplotlib.

Colours and font come from the page's style sheet, so that they follow the light and dark themes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from pipelines.amounts import number_text

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 34
MOST_POINTS = 240  # longer lines are averaged in buckets: more than one point per pixel can't be seen
# The style sheet's colours by their names there, in the light theme.
COLOURS = {"run": "#0f6b6f", "code": "#b5530c", "control": "#79818c", "rule": "#d9dde2", "soft": "#5a626d"}
DASHES = {"run": "-", "code": (0, (3.5, 2)), "control": (0, (1, 2))}  # in multiples of the line's width


@dataclass(frozen=True)
class Line:
    label: str
    style: str  # a class of the style sheet: run, code or control
    points: list[tuple[float, float]]


class Key(NamedTuple):
    """A line's entry in the legend."""

    style: str
    label: str
    value: str  # the last value; "" if it isn't shown


class Figure(NamedTuple):
    """The input of the template `chart`."""

    title: str
    unit: str
    legend: list[Key]
    drawing: Markup


def chart(title: str, unit: str, lines: Sequence[Line], x_label: str = "step", last: bool = True) -> Figure:
    """Draw a figure with its legend, which gives the last value of each line if `last`."""
    legend = [
        Key(line.style, line.label, number_text(line.points[-1][1], 4) if last else "") for line in lines
    ]
    drawing = line_chart(lines, x_label, f"{title}, {unit}", from_zero=title == "Speed")
    return Figure(title, unit, legend, drawing)


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    title: str,
    from_zero: bool = False,
    x_marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Draw an SVG figure of the lines over a common x, skipping points that are not finite. `x_marks` are
    positions and texts of the ticks along x, for ticks that aren't round numbers."""
    points = [p for line in lines for p in line.points]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_ticks = ticks(0.0 if from_zero else min(p[1] for p in points), max(p[1] for p in points), 5)
    x_ticks = x_marks or [(t, number_text(t)) for t in ticks(x_low, x_high, 5) if x_low <= t <= x_high]

    canvas = Canvas(figsize=(WIDTH / 72, HEIGHT / 72))
    width, height = (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT
    axes = canvas.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, width, height))
    axes.set_xlim(x_low, x_high if x_high > x_low else x_low + 1)
    axes.set_ylim(y_ticks[0], y_ticks[-1])
    axes.set_xticks([place for place, _ in x_ticks], [text for _, text in x_ticks])
    axes.set_yticks(y_ticks, [number_text(tick) for tick in y_ticks])
    axes.tick_params(length=0, pad=7, labelsize=12, labelcolor=COLOURS["soft"])
    axes.tick_params(axis="x", pad=8)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=1, clip_on=False)
    for part in (canvas.patch, axes.patch, *axes.spines.values()):
        part.set_visible(False)
    canvas.text(1 - RIGHT / WIDTH, 3 / HEIGHT, x_label, ha="right", fontsize=12, color=COLOURS["soft"])
    for place, line in enumerate(lines):
        axes.plot(
            *zip(*thinned(line.points)), gid=f"line-{place}", color=COLOURS[line.style], linewidth=2,
            linestyle=DASHES[line.style], solid_capstyle="round", dash_capstyle="round", clip_on=False,
            marker="o", markevery=[-1], markersize=7, markeredgewidth=0,
        )  # fmt: skip
    return inline(canvas, title, lines)


def inline(canvas: Canvas, title: str, lines: Sequence[Line]) -> Markup:
    """Return matplotlib's SVG as a part of a page: metadata and styles are removed, each line gets its class
    and label, and colours and font become those of the style sheet."""
    written = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # unique ids
        canvas.savefig(written, format="svg", metadata=none)
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for part in list(parent):
            if part.tag.endswith("}metadata") or part.tag.endswith("}style"):
                parent.remove(part)
    for part in root.iter():
        kind = part.tag = part.tag.rpartition("}")[2]
        part.attrib = {name.rpartition("}")[2]: value for name, value in part.attrib.items()}
        found = part.attrib.pop("id", "") if kind == "g" else ""
        if found.startswith("line-"):
            line = lines[int(found.removeprefix("line-"))]
            part.set("class", f"line {line.style}")
            label = ElementTree.Element("title")
            label.text = line.label
            part.insert(0, label)
        if "style" in part.attrib:
            part.set("style", re.sub(r"font[\w-]*:[^;]*;? *", "", part.attrib["style"]))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    drawn = ElementTree.tostring(root, encoding="unicode")
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return Markup(drawn)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average the points in equal buckets to at most MOST_POINTS; the last point is kept as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    buckets = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(sum(a for a, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in buckets] + [points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from at or below `low` to at or above `high`."""
    if low == high:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    return [float(tick) for tick in MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
