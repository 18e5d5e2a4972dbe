"""The page of `lvssl curate`: near-duplicates, outliers, contradicted labels, the subset, with pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lvssl.report.gallery import Picture, data_uri
from lvssl.report.template import render
from pipelines.files import write_atomically

MOST = 60  # rows of a table that are shown

ABOUT = {
    "duplicates": "Near-duplicates: re-encoded, mirrored or hardly changed copies, the nearest first.",
    "outliers": "Outliers: the images of the least density among the training images.",
    "labels": "Labels that the nearest training images contradict: the image, then its five nearest.",
    "subset": "A diverse subset: each image is the farthest from all before it.",
}


def write_curation(
    path: Path,
    title: str,
    tables: dict[str, tuple[list[str], list[list[Any]]]],
    shown: dict[str, list[list[tuple[int, int]]]],
    picture: Callable[[int, int], np.ndarray],
) -> Path:
    """Write the page. `shown`: of each row of a table the images (set, row) that it is about, which
    `picture` gives as uint8 [H, W, 3]."""
    sections = []
    for name, (head, lines) in tables.items():
        rows = []
        for line, images in list(zip(lines, shown[name]))[:MOST]:
            words = "; ".join(f"{column} {value}" for column, value in zip(head, line) if value != "")
            rows.append([Picture(data_uri(picture(*image)), words, words) for image in images])
        sections.append({"id": name, "about": ABOUT[name], "count": len(lines), "rows": rows})
    text = render("curate.html", title=title, sections=sections)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return path
