"""Checks of ImageNet, and the order of classes in any set, before hours of work are spent on them."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.dataset import Dataset
from pipelines.errors import InputError
from pipelines.formats.manifest import content_of

CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES = 1_000, 1_281_167, 50_000
_WNID = re.compile(r"n\d{8}")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def remarks(source: Dataset) -> list[str]:
    """How a source that looks like ImageNet differs from it; empty if it matches, or isn't ImageNet."""
    if not source.classes or not all(_WNID.fullmatch(name) for name in source.classes):
        return []
    found = []
    if len(source.classes) != CLASSES:
        found.append(f"looks like ImageNet, but has {len(source.classes):,} classes instead of {CLASSES:,}")
    if len(source.labels) not in (TRAIN_IMAGES, VALIDATION_IMAGES):
        wanted = {"train": f"{TRAIN_IMAGES:,}", "validation": f"{VALIDATION_IMAGES:,}"}.get(
            source.split or "", f"{TRAIN_IMAGES:,} (train) or {VALIDATION_IMAGES:,} (validation)"
        )
        found.append(f"looks like ImageNet, but has {len(source.labels):,} images instead of {wanted}")
    return found


def in_order_of(source: Dataset, path: Path) -> Dataset:
    """Put the classes in the order given by a manifest, or by a text file with one name per line."""
    names = names_among(content_of(path), "classes") if path.suffix.lower() == ".json" else _lines(path)
    if names is None:
        raise InputError(f"{path}: no manifest with classes")
    if not source.classes:
        raise InputError(f"--classes {path}: the images have no labels to number so; leave it out")
    return renumbered(source, names, path)


def renumbered(source: Dataset, classes: Sequence[str], where: str | Path) -> Dataset:
    """Renumber labels by the names of their classes. Raises InputError if one isn't among `classes`, or if
    two have the same name and the order differs."""
    if list(source.classes) == list(classes):  # also if two are called alike, as ImageNet's two cranes
        return source
    number = {name: i for i, name in enumerate(classes)}
    if twice := [name for i, name in enumerate(classes) if number[name] != i]:
        raise InputError(f"{where}: names two classes {twice[0]}: give each a name of its own")
    strange = [name for name in source.classes if name not in number]
    if strange:
        raise InputError(
            f"class {strange[0]} ({len(strange)} such) is not among the {len(classes)} of {where}: "
            "the labels of the two would mean different things"
        )
    notes = list(source.notes)
    if missing := sorted(set(classes) - set(source.classes)):
        notes.append(
            f"{len(missing)} of {len(classes)} classes of {where} have no image here: {missing[0]} ..."
        )
    notes.append(f"classes are numbered as in {where}")
    to = np.array([number[name] for name in source.classes], np.int64)
    return replace(source, labels=to[source.labels], classes=list(classes), notes=notes)


def names_among(content: dict[str, Any], entry: str) -> list[str] | None:
    """An entry that is a list of names; None if there is none."""
    try:
        return [str(name) for name in content[entry]]
    except (KeyError, TypeError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


# ------------------------------------------------------------ the validation tar


def is_validation_name(name: str) -> bool:
    """Whether a path is that of a validation image outside any class folder."""
    found = re.search(r"(?:(n\d{8})/|/|^)ILSVRC2012_val_\d+\.JPEG$", name)
    return found is not None and found.group(1) is None


def validation_number(name: str) -> int:
    """ILSVRC2012_val_00000001.JPEG -> 1; 0 for other names."""
    found = re.search(r"ILSVRC2012_val_(\d+)\.JPEG$", name)
    return int(found.group(1)) if found else 0


def ground_truth(tar: Path, devkit: Path | None) -> tuple[list[str], np.ndarray]:
    """(wnids in the order of class folders, label of each validation image), from the devkit.

    The devkit's file numbers classes by its own ILSVRC2012_ID, 1 to 1,000, which isn't the order of the
    wnids; meta.mat relates the two. Without `devkit` it is searched for next to the tar.
    """
    devkit = devkit or next(iter(sorted(tar.parent.glob("ILSVRC2012_devkit*"))), None)
    if devkit is None:
        raise InputError(
            f"{tar}: needs the devkit for its labels; put ILSVRC2012_devkit_t12.tar.gz beside it, "
            "or name it: --devkit"
        )
    files = _devkit_files(devkit)
    try:
        wnid_of = _wnids(files["meta.mat"])
        numbers = [int(line) for line in files[_TRUTH].split()]
        wnids = sorted(wnid_of.values())
        label_of = {number: wnids.index(wnid) for number, wnid in wnid_of.items()}
        return wnids, np.array([label_of[number] for number in numbers], np.int64)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{devkit}: not ImageNet's devkit, or damaged (no {error})") from error


def _devkit_files(devkit: Path) -> dict[str, bytes]:
    wanted = (_TRUTH, "meta.mat")
    try:
        if devkit.is_dir():
            return {path.name: path.read_bytes() for path in devkit.rglob("*") if path.name in wanted}
        with tarfile.open(devkit) as archive:
            members = [member for member in archive if Path(member.name).name in wanted and member.isfile()]
            return {Path(m.name).name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{devkit}: cannot be read as ImageNet's devkit ({error})") from error


def _wnids(meta: bytes) -> dict[int, str]:
    """{ILSVRC2012_ID: wnid} of the leaf classes; meta.mat also holds 676 synsets above them."""
    from scipy.io import loadmat

    synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    leaves = [row for row in synsets if int(row["num_children"]) == 0]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
