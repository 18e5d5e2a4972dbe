"""Tables of the page: cells show rounded values and hold exact ones, for the CSV that a table goes out as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

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
