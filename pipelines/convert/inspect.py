"""Inspect a converted set: counts, classes, sizes, and a contact sheet of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipelines.amounts import size_text
from pipelines.datasets.beton import open_beton_source
from pipelines.datasets.dataset import Dataset, class_counts, evenly_spaced
from pipelines.datasets.opening import open_dataset
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.files import begins_with
from pipelines.formats.beton import open_beton

COLUMNS, ROWS, SIDE, CAPTION = 8, 6, 128, 14  # of the sheet; sides in pixels
BAR = 40  # characters
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


def inspect(path: str | Path, sheet: str | Path) -> str:
    """Describe the content of a beton or of tars, and write a contact sheet (PNG). Raises InputError."""
    path, sheet = Path(path), Path(sheet)
    if sheet.resolve() == path.resolve():
        raise InputError(f"--sheet {sheet}: this is the file to inspect; name another to write")
    if not begins_with(sheet, (PNG,)):
        raise InputError(f"--sheet {sheet}: exists and isn't a PNG; name another file to write")
    lines = []
    if path.is_file() and path.suffix.lower() != ".tar":
        beton = open_beton(path)
        source = open_beton_source(path)
        raw = int((beton.modes != 0).sum())
        lines.append(
            f"{path}: {beton.count:,} images ({beton.count - raw:,} JPEG, {raw:,} raw), "
            f"{size_text(path.stat().st_size)}"
        )
        lines += [
            "",
            "longest side, pixels",
            *histogram(np.maximum(beton.heights, beton.widths)),
            "",
            "bytes per image",
            *histogram(beton.sizes),
        ]
    else:
        source = open_dataset(str(path))
        lines.append(f"{path}: {len(source.labels):,} images")
        images = (source.read(i) for i in evenly_spaced(len(source.labels), 1000).tolist())
        sizes = np.array([each.nbytes if isinstance(each, np.ndarray) else len(each) for each in images])
        lines += ["", f"bytes per image ({len(sizes)} of them)", *histogram(sizes)]
    counts = class_counts(source.labels, len(source.classes))
    lines += ["", *class_lines(source, counts)]
    contact_sheet(source, sheet)
    lines += ["", f"contact sheet: {sheet}"]
    return "\n".join(lines)


def class_lines(source: Dataset, counts: np.ndarray) -> list[str]:
    lines = ["without labels"]
    if len(counts):
        spread = f"{counts.min():,} to {counts.max():,} images, {np.median(counts):,.0f} at the median"
        lines = [f"{len(counts):,} classes of {spread}"]
    shown = (
        range(len(counts)) if len(counts) <= 20 else [*range(10), -1, *range(len(counts) - 10, len(counts))]
    )
    for number in shown:
        lines.append(
            "  ..." if number < 0 else f"{number:6} {source.classes[number]:20.20} {counts[number]:,}"
        )
    for name, column in source.targets.items():
        lines.append(f"target {name}: {column.min():g} to {column.max():g}, mean {column.mean():g}")
    return lines


def histogram(values: np.ndarray) -> list[str]:
    """One line per bin: range, count and bar. Bins are spaced logarithmically where the range is wide."""
    low, high = int(values.min()), int(values.max())
    if low == high:
        return [f"{low:>17,} {len(values):10,}"]
    wide = high > 8 * max(low, 1)
    edges = np.geomspace(max(low, 1), high + 1, 11) if wide else np.linspace(low, high + 1, 11)
    edges = np.unique(np.round(edges).astype(np.int64))
    edges[0] = low
    counts = np.histogram(values, np.append(edges[:-1], high + 1))[0]
    return [
        f"{a:>8,}-{b - 1:<8,} {count:10,} {'#' * round(BAR * count / counts.max())}"
        for a, b, count in zip(edges, edges[1:], counts)
    ]


def contact_sheet(source: Dataset, path: Path) -> None:
    """Draw 48 images, evenly spaced, each with its index and class."""
    page = Image.new("RGB", (COLUMNS * SIDE, ROWS * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(page)
    for place, index in enumerate(evenly_spaced(len(source.labels), COLUMNS * ROWS).tolist()):
        image = source.read(index)
        pixels = decode_rgb(image, source.names[index]) if isinstance(image, bytes) else image
        thumb = Image.fromarray(pixels)
        thumb.thumbnail((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS)
        x, y = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + CAPTION)
        page.paste(thumb, (x + (SIDE - thumb.width) // 2, y + (SIDE - thumb.height) // 2))
        name = source.classes[source.labels[index]] if source.classes else ""
        caption = f"{index} {name}".encode("ascii", "replace").decode()
        draw.text((x + 4, y + SIDE - 1), caption[:20], "black")
    try:
        page.save(path, "PNG")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
