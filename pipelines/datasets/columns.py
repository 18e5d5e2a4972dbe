"""Names of the columns of a table (or the fields of a tar's samples), and the forms of classes in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.datasets.recognise import in_short
from pipelines.errors import InputError
from pipelines.formats.beton import NO_LABEL

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "pixel_values")
PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "file_path", "img_path")
LABELS = ("label", "labels", "target", "class", "cls", "class_id", "fine_label")
RESERVED = ("image", "label")  # the names of a beton's other fields
NONE = "none"  # the --label-column that means: no labels


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None: the usual names."""

    image: str | None = None
    label: str | None = None
    targets: tuple[str, ...] | None = None  # None: every column with a number in each row

    def check(self) -> None:
        """Raise InputError for a target that can't have its name."""
        for name in self.targets or ():
            if not name or name in RESERVED:
                raise InputError(f"--targets {name}: a target can't have this name; rename the column")

    def image_among(self, names: Iterable[str], usual: Sequence[str], where: str) -> str | None:
        """The column of the images or paths. Raises InputError if the named one doesn't exist."""
        return _find(list(names), usual, self.image, "--image-column", where)

    def label_among(self, names: Iterable[str], where: str) -> str | None:
        """The column of the classes, or None if there is none. Raises InputError like `image_among`."""
        names = list(names)
        if self.label == NONE:
            return None
        usual = [name for name in LABELS if name not in (self.targets or ())]
        return _find(names, usual, self.label, "--label-column", where)


USUAL = Columns()


def unused(names: Iterable[str]) -> list[str]:
    """A note that lists columns that aren't read."""
    names = [name for name in names if name]
    return [in_short("ignored columns; numbers can be stored with --targets", names)] if names else []


def _find(names: list[str], usual: Sequence[str], given: str | None, option: str, where: str) -> str | None:
    if given is not None:
        if given not in names:
            raise InputError(f"{where}: no column '{given}' ({option}); its columns: {', '.join(names)}")
        return given
    known = {name.strip().lower(): name for name in reversed(names)}
    return next((known[name] for name in usual if name in known), None)


def as_text(value: Any) -> str:
    """A class as it is written, "" for none; whole floats become integers. Raises ValueError for a list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{str(value)[:30]} is no single class")
    return str(value).strip()


def numbered(
    texts: Sequence[str], where: str, name_of: Callable[[int], str], mixed: bool = True
) -> tuple[np.ndarray, list[str] | None]:
    """Convert written classes to numbers, int64 [N], and sorted names, or None if they are numbers already.

    All are NO_LABEL if all are empty. `mixed`: numbers among names count as names. Raises InputError, naming
    the row: a class is missing where others have one, exceeds 64 bits, is a fraction, or is a name among
    numbers.
    """
    count = len(texts)
    empty = next((row for row, text in enumerate(texts) if not text), None)
    if empty is not None:
        if any(texts):
            raise InputError(
                f"{where}: {name_of(empty)} has no class, others have one; add it, or leave the classes out "
                f"(convert-beton --label-column {NONE})"
            )
        return np.full(count, NO_LABEL, np.int64), None
    try:
        return np.fromiter(map(_whole, texts), np.int64, count), None
    except OverflowError as error:
        row = next(row for row, text in enumerate(texts) if not -(2**63) <= _whole(text) < 2**63)
        raise InputError(f"{where}: {name_of(row)} has label {texts[row]}, over 64 bits") from error
    except ValueError:
        pass
    classes = sorted(set(texts))
    strange = [name for name in classes if finite(name) is None]
    if not strange:
        raise InputError(
            f"{where}: its labels are fractions, such as {classes[0]}; they can be targets (convert-beton "
            "--targets), but not classes"
        )
    if not mixed and len(strange) < len(classes):
        row = next(row for row, text in enumerate(texts) if text == strange[0])
        raise InputError(f"{where}: {name_of(row)} has the class {strange[0][:30]!r}, others have numbers")
    number_of = {name: number for number, name in enumerate(classes)}
    return np.fromiter((number_of[text] for text in texts), np.int64, count), classes


def _whole(text: str) -> int:
    """12 or 12.0 -> 12. Raises ValueError."""
    if "_" in text:  # Python reads 1_12 as 112
        raise ValueError(text)
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise ValueError(text) from None
        return int(number)


def finite(value: Any) -> float | None:
    """Convert a number, or the text of one, to a float; None if it isn't a number, or isn't finite."""
    if isinstance(value, str) and "_" in value:  # Python reads 1_12 as 112
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
