"""Pages of pictures: the findings of `lvssl curate`, and the neighbours of `lvssl search --page`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from lvssl.report.gallery import Picture, data_uri
from lvssl.report.template import render
from pipelines.files import write_atomically

MOST = 60  # maximum number of table rows, or queries, that are shown

ABOUT = {
    "duplicates": "Near-duplicates: re-encoded, mirrored or slightly changed copies, nearest first.",
    "outliers": "Outliers: the images with the lowest density under the training images.",
    "labels": "Labels that the nearest training images contradict: each image, then its five nearest "
    "neighbours.",
    "subset": "A diverse subset: each image is the farthest from all that precede it.",
}


def write_curation(
    path: Path,
    title: str,
    tables: Mapping[str, tuple[list[str], list[list[Any]], list[list[tuple[int, int]]]]],
    picture: Callable[[int, int], np.ndarray],
) -> Path:
    """Write the page. `tables` gives the head of each table, its lines and, for each line, the images (set,
    row) that it is about; `picture` returns an image as uint8 [H, W, 3]."""
    sections = []
    for name, (head, lines, shown) in tables.items():
        names = [column for column, title in enumerate(head) if title.endswith("name")]
        rows = []
        for line, images in list(zip(lines, shown))[:MOST]:
            words = "; ".join(f"{column} {value}" for column, value in zip(head, line) if value != "")
            captions = [PurePath(str(line[column])).name for column in names] + len(images) * [""]
            rows.append(
                [Picture(data_uri(picture(*image)), words, text) for image, text in zip(images, captions)]
            )
        some = f", of which the first {len(rows)} are shown here" if len(rows) < len(lines) else ""
        about = f"{ABOUT[name]} {len(lines):,} in {name}.csv{some}. Click a row for names and figures."
        sections.append({"id": name, "about": about, "rows": rows})
    return write_page(path, title, sections)


def write_neighbours(
    path: Path,
    title: str,
    found: Iterable[tuple[str, np.ndarray, list[tuple[str, float, np.ndarray]]]],
    more: bool = False,
) -> Path:
    """Write the page. `found` gives for each query its name and picture, uint8 [H, W, 3], and the name,
    distance and picture of each neighbour. `more`: there are other queries, which aren't shown."""
    rows = [
        [
            Picture(data_uri(image), f"Query {name}", "query"),
            *(
                Picture(data_uri(near), f"{other} at distance {distance:.4g}", f"{distance:.4g}")
                for other, distance, near in neighbours
            ),
        ]
        for name, image, neighbours in found
    ]
    about = "Each query with its neighbours, nearest first. Click a row for names and distances."
    about += f" Only the first {len(rows)} queries are shown; --csv writes all." if more else ""
    return write_page(path, title, [{"id": "neighbours", "about": about, "rows": rows}])


def write_page(path: Path, title: str, sections: list[dict[str, Any]]) -> Path:
    text = render("pictures.html", title=title, sections=sections)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return path
