"""Predictions made before this had run on any GPU, next to measurements. They are for one H100 80 GB.

They follow from counted bytes and operations over 3.0 TB/s and 800 TFLOP/s, and from the kernels' resources.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Rows = dict[str, dict[str, Any]]  # {name: newest row}, for one card
R50, R18 = "ResNet-50, 224 px, 256 images", "ResNet-18, 32 px, 512 images"
AUGMENTED, LARGE = "ours, 224 px, bf16, blur 0.5", "NT-Xent ours, 2B 32768"
COMPILED = "NT-Xent compiled matrix form, 2B 32768"
NOT_YET = "not measured yet"


def of(rows: Rows, name: str, field: str, scale: float = 1.0) -> float | None:
    """A figure of a row, or None if it doesn't exist."""
    value = rows.get(name, {}).get(field)
    return scale * value if isinstance(value, int | float) and not isinstance(value, bool) else None


def ratio(rows: Rows, above: tuple[str, str], below: tuple[str, str]) -> float | None:
    a, b = of(rows, *above), of(rows, *below)
    return a / b if a is not None and b else None


@dataclass(frozen=True)
class Prediction:
    what: str
    unit: str
    expected: str
    measured: Callable[[Rows], float | None]


def figure(what: str, unit: str, expected: str, name: str, field: str, scale: float = 1.0) -> Prediction:
    return Prediction(what, unit, expected, lambda rows: of(rows, name, field, scale))


def a_view(what: str, expected: str, name: str) -> Prediction:
    return figure(what, "us/view", expected, name, "us_per_view")


def faster(rows: Rows, form: str, other: str) -> float | None:
    """How many times the images per second of another form."""
    return ratio(rows, (form, "images_per_second"), (other, "images_per_second"))


def step_of(how: str, work: str) -> str:
    """The name of the row of a training step on prepared batches."""
    return f"engine, synthetic, {how}, {work}"


def over_eager(what: str, expected: str, how: str, work: str) -> Prediction:
    forms, name = (step_of(how, work), step_of("eager", work)), work.partition(",")[0]
    return Prediction(f"{what}, {name}, over eager", "times", expected, lambda rows: faster(rows, *forms))


DECODERS = (
    ("CPU threads", "12,000-16,000"),
    ("nvJPEG and our kernel", "5,000-12,000"),
    ("DALI", "6,000-12,000"),
)
PREDICTIONS = (
    figure("copy within the device's memory", "TB/s", "3.0", "device copy", "rate", 1e-12),
    figure("copy from page-locked memory", "GB/s", "50", "pinned copy to the device", "rate", 1e-9),
    figure("bf16 product, 8,192 x 8,192", "TFLOP/s", "800", "bf16 product", "rate", 1e-12),
    a_view("augmentation, 224 px, bf16, blur 0.5", "1.4-1.7", AUGMENTED),
    a_view("augmentation, 224 px, bf16, no blur", "0.5", "ours, 224 px, bf16, blur 0.0"),
    a_view("augmentation, 224 px, bf16, all blurred", "2.3", "ours, 224 px, bf16, blur 1.0"),
    a_view("reordering uint8 crops, 224 px", "0.3-0.5", "reordering uint8 crops, 224 px"),
    a_view("NT-Xent, d 128, 2B 8,192, forward and backward", "0.04", "NT-Xent ours, 2B 8192"),
    a_view("Bernoulli head, D 2,048, K 4, forward and backward", "0.03-0.05", "bernoulli head, fused"),
    a_view("decorrelation, D 2,048, fp32, forward and backward", "0.5", "decorrelation, highest"),
    a_view(f"step, {R50}, eager", "330-400", step_of("eager", R50)),
    a_view(f"step, {R50}, compiled", "280-320", step_of("compiled", R50)),
    a_view(f"step, {R18}, eager", "36-50", step_of("eager", R18)),
    a_view(f"step, {R18}, compiled", "28-36", step_of("compiled", R18)),
    figure("launches a step, ResNet-50, eager", "", "2,450", step_of("eager", R50), "launches"),
    figure("launches a step, ResNet-18, eager", "", "1,200", step_of("eager", R18), "launches"),
    *(
        figure(
            f"decoding to two crops, 224 px, {by}",
            "images/s",
            expected,
            f"decode by {by}, 224 px",
            "images_per_second",
        )
        for by, expected in DECODERS
    ),
    a_view("crop kernel, 224 px", "1.5-3", "crop kernel, 224 px"),
    over_eager("torch.compile", "1.15-1.25", "compiled", R50),
    over_eager("--deterministic", "0.80-0.95", "deterministic", R50),
    over_eager("CUDA graph", "1.01", "recorded", R50),
    over_eager("CUDA graph", "1.1-1.3", "recorded", R18),
)


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: str
    measured: Callable[[Rows], float | None]
    reached: Callable[[float], bool]


def at_least(least: float) -> Callable[[float], bool]:
    return lambda found: found >= least


def at_most(most: float) -> Callable[[float], bool]:
    return lambda found: found <= most


def wrong(rows: Rows) -> float | None:
    """The number of wrong rows in the stage `exact`; None if there was no time for all of it."""
    found = [row for row in rows.values() if row["stage"] == "exact"]
    if any(str(row.get("failed")).startswith(("cut off", "not begun")) for row in found):
        return None
    judged = [row for row in found if row.get("ok") is not None]
    return float(sum(row["ok"] is False for row in judged)) if judged else None


GOALS = (
    Goal("kernels that fail against fp64 or differ between repeats", "0", wrong, at_most(0)),
    Goal(
        f"{R50}: engine over the bare loop",
        "at least 0.97",
        lambda rows: faster(rows, step_of("eager", R50), f"bare loop, {R50}"),
        at_least(0.97),
    ),
    Goal(
        f"{R50}: share of the time spent waiting for data",
        "below 0.01",
        lambda rows: of(rows, f"engine, loader, eager, {R50}", "waiting"),
        at_most(0.01),
    ),
    Goal(
        f"{R18}: views a second, through the loader",
        "at least 30,000",
        lambda rows: of(rows, f"engine, loader, recorded, {R18}", "images_per_second", 2),
        at_least(30_000),
    ),
    Goal(
        f"{R18}: over the pipeline commonly used today",
        "at least 5",
        lambda rows: faster(rows, f"engine, loader, recorded, {R18}", f"what people have today, {R18}"),
        at_least(5),
    ),
    Goal(
        "augmentation, 224 px: kornia's time over ours",
        "at least 10",
        lambda rows: ratio(rows, ("kornia, 224 px, blur 0.5", "us_per_view"), (AUGMENTED, "us_per_view")),
        at_least(10),
    ),
    Goal(
        "augmentation, 224 px: torchvision v2's time, image by image, over ours",
        "at least 10",
        lambda rows: ratio(
            rows, ("torchvision v2, 224 px, blur 0.5", "us_per_view"), (AUGMENTED, "us_per_view")
        ),
        at_least(10),
    ),
    Goal(
        "augmentation, 224 px: share of a ResNet-50 step",
        "below 0.01",
        lambda rows: ratio(rows, (AUGMENTED, "us_per_view"), (step_of("eager", R50), "us_per_view")),
        at_most(0.01),
    ),
    Goal(
        "NT-Xent, 2B 32,768: time over the compiled matrix form's",
        "at most 0.333",
        lambda rows: ratio(rows, (LARGE, "seconds"), (COMPILED, "seconds")),
        at_most(1 / 3),
    ),
    Goal(
        "NT-Xent, 2B 32,768: memory over the compiled matrix form's",
        "at most 0.05",
        lambda rows: ratio(rows, (LARGE, "peak_mib"), (COMPILED, "peak_mib")),
        at_most(0.05),
    ),
)


def newest(rows: Iterable[dict[str, Any]]) -> Rows:
    return {row["name"]: row for row in rows}


def tables(cards: dict[str, Rows]) -> tuple[list[list[str]], list[list[str]]]:
    """Predictions and goals with a column for each card: rows of cells, the headers first."""
    names = list(cards) or ["one H100"]
    known = list(cards.values()) or [{}]
    predicted = [["what", "unit", "predicted", *names]]
    for p in PREDICTIONS:
        predicted.append([p.what, p.unit, p.expected, *(shown(p.measured(rows)) for rows in known)])
    goals = [["goal", "wanted", *names]]
    for goal in GOALS:
        cells = []
        for rows in known:
            found = goal.measured(rows)
            verdict = "" if found is None else (" (reached)" if goal.reached(found) else " (missed)")
            cells.append(shown(found) + verdict)
        goals.append([goal.what, goal.wanted, *cells])
    return predicted, goals


def shown(value: float | None) -> str:
    if value is None:
        return NOT_YET
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plain(cells: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths)).rstrip() for row in cells)


def markdown(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])
