"""Line charts as inline SVG: colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 34
MOST_POINTS = 240  # a line of more is averaged in buckets: more than one point a pixel isn't seen


@dataclass(frozen=True)
class Line:
    label: str
    style: str  # class of the style sheet: run, code, control
    points: list[tuple[float, float]]


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    title: str,
    from_zero: bool = False,
    x_marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG figure of the lines over a common x; finite points only. `x_marks`: places and texts of the
    ticks along x, where they aren't round numbers."""
    points = [p for line in lines for p in line.points]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_ticks = ticks(0.0 if from_zero else min(p[1] for p in points), max(p[1] for p in points), 5)
    x_ticks = x_marks or [(t, number(t)) for t in ticks(x_low, x_high, 5) if x_low <= t <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - x_low) / ((x_high - x_low) or 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_low) / ((y_high - y_low) or 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick, text in x_ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" '
            f'text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    for line in lines:
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in thinned(line.points))
        parts.append(
            f'<path class="line {line.style}" d="M{path}"><title>{escape(line.label)}</title></path>'
        )
        a, b = line.points[-1]
        parts.append(f'<circle class="end {line.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>')
    return "".join(parts) + "</svg>"


def strip(values: Sequence[tuple[str, float | None]], low: float, high: float) -> str:
    """A row's values as marks on a line from `low` to `high`; the style sheet names the marks."""
    parts = ['<svg class="strip" viewBox="0 0 200 18" role="presentation"><path class="grid" d="M4 9H196"/>']
    for style, value in values:
        if value is not None:
            place = 4 + 192 * (value - low) / ((high - low) or 1)
            parts.append(f'<circle class="mark {style}" cx="{place:.1f}" cy="9" r="5"/>')
    return "".join(parts) + "</svg>"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of equal buckets, the last point kept as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    buckets = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(sum(a for a, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in buckets] + [points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if low == high:
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: 1,200; 0.25; 3."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
