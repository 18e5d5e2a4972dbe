"""`Dataset`, the common form of all image sets, and the checks of its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.datasets.recognise import in_short
from pipelines.errors import InputError
from pipelines.formats.beton import NO_LABEL


@dataclass(frozen=True)
class Dataset:
    """Images, read on demand, with their labels. `read` may be called from several threads at once."""

    names: Sequence[str]  # the source of each image, for messages and the manifest
    labels: np.ndarray  # int64 [N], 0 <= label < len(classes); all NO_LABEL in an unlabelled set
    classes: list[str]  # empty in an unlabelled set
    read: Callable[[int], bytes | np.ndarray]  # an image file's bytes, or uint8 [H, W] or [H, W, 3]
    split: str | None  # None if the source has no splits
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # float64 [N] each, regression targets
    libraries: dict[str, str] = field(default_factory=dict)  # versions of the libraries used besides Pillow
    notes: list[str] = field(default_factory=list)  # messages for the user, such as an empty class folder
    size_of: Callable[[int], int] | None = None  # bytes of an image's file, if known without reading it


def labelled(
    source: str,
    names: Sequence[str],
    labels: np.ndarray,
    classes: list[str] | None,
    read: Callable[[int], bytes | np.ndarray],
    split: str | None,
    libraries: dict[str, str] | None = None,
) -> Dataset:
    """Build a Dataset, checking its labels against its classes. Classes without names are numbered; there are
    none if all labels are NO_LABEL."""
    if len(labels) == 0:
        raise InputError(f"{source}: contains no images")
    if (labels == NO_LABEL).all():
        classes = []
    else:
        check_labels(source, labels, classes, names.__getitem__)
        classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
    size_of = getattr(read, "size_of", None)  # readers of tars have it
    return Dataset(names, labels, classes, read, split, libraries=libraries or {}, size_of=size_of)


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Images per class, int64 [classes]; images without a label aren't counted."""
    return np.bincount(labels[labels != NO_LABEL], minlength=classes)


def of_classes(source: Dataset, names: Sequence[str]) -> np.ndarray:
    """Positions of the images of the named classes (all images if no class is named), int64, ascending.
    Raises InputError for a class that doesn't exist or has no image."""
    if not names:
        return np.arange(len(source.labels))
    numbers = [number for number, name in enumerate(source.classes) if name in names]
    used = np.intersect1d(source.labels, np.arange(len(source.classes)))
    present = [source.classes[number] for number in used]
    if strange := [name for name in names if name not in present]:
        known = in_short("it has", present) if source.classes else "its images have no labels"
        raise InputError(f"--only-classes {strange[0]}: the source has no image of such a class; {known}")
    return np.flatnonzero(np.isin(source.labels, numbers))


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Positions of `count` items, or of `most` of them, including the first and the last, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


BELIEVED = 25_000  # accepted number of classes without names, however few images: above ImageNet-21k's


def check_labels(
    source: str, labels: np.ndarray, classes: Sequence[str] | None, name_of: Callable[[int], str]
) -> None:
    """Raise InputError, naming the image, for a negative label, a label without a class name if classes have
    names, or an implausible number of classes: over BELIEVED, and more than there are images."""
    if labels.min() < 0:
        where = name_of(int(labels.argmin()))
        raise InputError(f"{source}: {where} has label {labels.min()}; labels are numbers from 0")
    highest, first = int(labels.max()), int(labels.argmax())
    if classes:
        if highest >= len(classes):
            raise InputError(
                f"{source}: {name_of(first)} has label {highest}, but {len(classes)} classes are named"
            )
    elif highest >= max(BELIEVED, len(labels)):
        raise InputError(
            f"{source}: {name_of(first)} has label {highest}, which makes {highest + 1:,} classes of "
            f"{len(labels):,} images; without names, more than {BELIEVED:,} classes are only accepted if "
            "there are as many images: number them from 0, or give their names"
        )


def by_name(
    labels: np.ndarray, classes: Sequence[str], wanted: Sequence[str], source: str, where: str
) -> np.ndarray:
    """Renumber labels int64 [N] of `classes` to the numbers of the same names in `wanted`. Raises InputError,
    listing them, if classes that have images aren't in `wanted`."""
    number = {name: i for i, name in enumerate(wanted)}
    strange = [classes[label] for label in np.unique(labels) if classes[label] not in number]
    if strange:
        known = ", ".join(wanted[:10]) + (" ..." if len(wanted) > 10 else "")
        raise InputError(f"{source}: {in_short(f'classes that {where} lacks', strange)}; it has {known}")
    return np.array([number.get(name, -1) for name in classes], np.int64)[labels]


def numbers_alone(classes: list[str] | None) -> bool:
    """Whether classes are only numbers 0, 1, 2 ..., which a conversion writes if it knows no names."""
    return classes is None or all(name == str(number) for number, name in enumerate(classes))
