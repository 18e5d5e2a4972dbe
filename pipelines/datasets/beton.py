"""One or several betons as one set of images: their layout, their names, and the bytes in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.dataset import Dataset, labelled, numbers_alone
from pipelines.datasets.imagenet import names_among
from pipelines.datasets.parts import files_of, parts_of
from pipelines.datasets.recognise import in_short
from pipelines.errors import InputError
from pipelines.formats.beton import JPEG, BetonFile, named_targets, open_beton
from pipelines.formats.manifest import content_of, manifest_path, read_columns, require_columns
from pipelines.formats.openfiles import OpenFiles


def open_betons(path: str | Path) -> tuple[list[BetonFile], dict[str, Any]]:
    """The betons that a path names, in order, with targets named as in their manifests; and the manifest of
    the first, which is empty if there is none. Its "classes" cover all parts.

    Raises:
        InputError: a beton is missing, damaged, or from a different conversion than the first; names the
        beton.
    """
    betons, heads = [], list[dict[str, Any]]()
    known = {"classes": list, "targets": list, "settings": dict, "split": str}  # others' are ignored
    for file in parts_of(path):
        beton, head = open_beton(file), content_of(manifest_path(file))
        betons.append(replace(beton, targets=named_targets(beton, names_among(head, "targets") or [])))
        heads.append({key: value for key, value in head.items() if isinstance(value, known.get(key, ()))})
        if what := _other(heads[0], heads[-1]) or _other_content(betons[0], betons[-1]):
            first = betons[0].path.name
            raise InputError(
                f"{file}: isn't of the same set as {first}: {what}; convert it in the same way, or "
                "leave it out"
            )
        if len(heads[-1].get("classes", ())) > len(heads[0].get("classes", ())):
            heads[0]["classes"] = heads[-1]["classes"]
    return betons, heads[0]


def _other(first: dict[str, Any], head: dict[str, Any]) -> str:
    """How a part differs from the conversion of the first; empty if it doesn't."""
    if not first or not head:
        return "" if not first and not head else f"{'it' if first else 'that'} has no manifest"
    ours, theirs = ([str(name) for name in each.get("classes", ())] for each in (first, head))
    if ours != theirs and not (ours and theirs and numbers_alone(ours) and numbers_alone(theirs)):
        strange = sorted({*ours} ^ {*theirs}) or ["in another order"]
        return in_short("its classes differ", strange)
    wanted, found = first.get("settings", {}), head.get("settings", {})
    for key in wanted:
        if key in found and found[key] != wanted[key]:
            return f"its {key} is {found[key]}, not {wanted[key]}"
    return ""


def _other_content(first: BetonFile, beton: BetonFile) -> str:
    if list(first.targets) != list(beton.targets):
        return (
            f"its targets are {', '.join(beton.targets) or 'none'}, not {', '.join(first.targets) or 'none'}"
        )
    if (first.labels[0] < 0) != (beton.labels[0] < 0):
        return f"its images have {'no ' if beton.labels[0] < 0 else ''}labels"
    return ""


def stored_names(path: str | Path) -> list[str] | None:
    """The source of each image of a converted set, from the manifests; None if one lacks it."""
    names: list[str] = []
    for file in files_of(path):
        if not manifest_path(file).is_file():
            return None
        columns = read_columns(manifest_path(file), ("name",))[1]
        require_columns(manifest_path(file), columns, ("name",))
        names += columns["name"].tolist()
    return names


def open_beton_source(path: str | Path) -> Dataset:
    """Betons' images as they are stored: JPEG bytes, or pixels. Names and classes are the manifests'."""
    betons, manifest = open_betons(path)
    bytes_of, ends = reader_of(betons), np.cumsum([beton.count for beton in betons])
    names = stored_names(path) or [f"{b.path.name}:{index}" for b in betons for index in range(b.count)]
    labels = np.concatenate([beton.labels for beton in betons])

    def read(index: int) -> bytes | np.ndarray:
        part = int(np.searchsorted(ends, index, side="right"))
        beton, at = betons[part], index - int(ends[part]) + betons[part].count
        data = bytes_of(part, at)
        if beton.modes[at] == JPEG:
            return data
        return np.frombuffer(data, np.uint8).reshape(int(beton.heights[at]), int(beton.widths[at]), 3)

    opened = labelled(str(path), names, labels, manifest.get("classes"), read, manifest.get("split"))
    return replace(
        opened,
        targets={
            name: np.concatenate([beton.targets[name] for beton in betons]) for name in betons[0].targets
        },
    )


def reader_of(betons: list[BetonFile]) -> Any:
    """Return a function (part, index) -> bytes of an image, which any thread may call."""
    files = OpenFiles()  # an array job may have more parts than a process may open files

    def bytes_of(part: int, index: int) -> bytes:
        beton = betons[part]
        size = int(beton.sizes[index])
        data = files.read(beton.path, size, int(beton.offsets[index]))
        if len(data) != size:
            raise InputError(f"{beton.path}: was cut short while it was read")
        return data

    return bytes_of
