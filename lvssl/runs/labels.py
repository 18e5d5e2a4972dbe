"""Labelled sets: what is to be predicted, and which of the images are used for training.

Subsets are exact: `share` of N images are floor(share * N), spread over the classes as evenly as these allow;
which classes get one more is drawn at random. For 1 % of ImageNet's 1,281,167 images that is 12,811, 12 or 13
per class, as in SimCLR's public list; taking 1 % of each class and rounding gives another number.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lvssl.models.inference import BATCH
from lvssl.runs.identity import same_images
from lvssl.runs.progress import with_progress
from pipelines.datasets.beton import stored_names
from pipelines.datasets.dataset import by_name, numbers_alone
from pipelines.datasets.parts import are_there, files_of
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.errors import InputError
from pipelines.loader import Replacements, evaluation_batches
from pipelines.views import ViewSettings

SAME = "the test images are the training images: the figures say nothing about other images"


@dataclass(frozen=True)
class LabelledDataset:
    """N images and what is to be predicted for each."""

    path: Path
    source: Reader
    answers: Tensor  # int64 [N], classes; or float32 [N, T], targets in their own units
    outputs: int  # T, or the classes of the whole set, even if a part of it has fewer
    targets: tuple[str, ...] = ()  # their names; empty for classes
    on_error: str = "raise"  # one of ON_ERROR: what happens if an image can't be decoded

    def __len__(self) -> int:
        return len(self.answers)

    def only(self, rows: np.ndarray) -> LabelledDataset:
        """Select the images `rows`, in that order."""
        return replace(self, source=Subset(self.source, rows), answers=self.answers[torch.from_numpy(rows)])


class Subset:
    """Some images of a source, as a source: position i is rows[i] of the other. A subset of a subset refers
    to the original source."""

    def __init__(self, source: Reader, rows: np.ndarray) -> None:
        self.rows = np.asarray(rows, np.int64)
        self.labels = source.labels[self.rows]
        self.classes, self.chunk, self.device = source.classes, source.chunk, source.device
        self.source: Reader = source
        if isinstance(source, Subset):
            self.source, self.rows = source.source, source.rows[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def storage_blocks(self) -> np.ndarray:
        return self.source.storage_blocks()[self.rows]

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with _positions_of(indices):
            return self.source.sizes(self.rows[indices])

    def encoded(self, row: int, index: int) -> bytes | np.ndarray:
        return self.source.encoded(row, int(self.rows[index]))

    def crops(
        self, indices: np.ndarray, boxes: np.ndarray, out: np.ndarray, flips: np.ndarray | None = None
    ) -> None:
        with _positions_of(indices):
            self.source.crops(self.rows[indices], boxes, out, flips)


@contextmanager
def _positions_of(indices: np.ndarray) -> Iterator[None]:
    """Report a damaged sample by its position in the subset, which is all that its replacement goes by."""
    try:
        yield
    except DamagedSample as sample:
        raise DamagedSample(sample.row, int(indices[sample.row]), str(sample)) from sample


def readable(
    source: Reader,
    view: ViewSettings,
    workers: int = 0,
    on_error: str = "raise",
    rows: np.ndarray | None = None,
    title: str = "",
    left_out: Callable[[str], None] | None = None,
    batch_size: int = BATCH,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield centre crops uint8 [B, R, R, 3] and positions int64 [B], of all images or of `rows`, in order.

    Unless on_error is "raise", images that can't be decoded are left out, because no replacement may count in
    a figure; `left_out` is called with the reason for each. `title`: of the progress that is shown unless it
    takes moments; empty: none is shown.
    """
    rows, replacements = np.arange(len(source)) if rows is None else rows, Replacements(source, on_error)
    batches, done = evaluation_batches(source, view, batch_size, workers, rows, replacements), 0
    for crops, found in with_progress(batches, title, len(rows), lambda batch: len(batch[1])):
        asked, done = rows[done : done + len(found)], done + len(found)
        sound = found == asked
        if left_out is not None:
            for row in asked[~sound].tolist():
                left_out(replacements.damaged[row])
        if sound.all():
            yield crops, found
        elif sound.any():
            yield crops[torch.from_numpy(sound)], found[sound]


def sound_part(path: Path, source: Reader, rows: np.ndarray) -> Reader:
    """Return the images `rows`, int64 [M], ascending, of the set at `path`, those that can be decoded. Print
    a warning if there are others."""
    say_left_out(path, len(source), rows)
    return source if len(rows) == len(source) else Subset(source, rows)


def say_left_out(path: Path, count: int, rows: np.ndarray) -> None:
    """Print a warning if only `rows`, int64 [M], ascending, of a set's `count` images could be decoded."""
    if len(rows) < count:
        first = int(np.setdiff1d(np.arange(count), rows)[0])
        said = f"{count - len(rows):,} of {count:,} images can't be decoded and are left out"
        print(f"warning: {path}: {said}; the first is sample {first}", file=sys.stderr, flush=True)


def say_notes(*sources: Reader) -> None:
    """Print on stderr what sets leave out, and what else the user should know about them, each note once."""
    for note in dict.fromkeys(note for source in sources for note in getattr(source, "notes", ())):
        print(f"note: {note}", file=sys.stderr, flush=True)


def say_if_same(train: Reader, test: Reader) -> None:
    """Print a note if the test images are the training images, whatever their formats."""
    if same_images(train, test):
        print(f"note: {SAME}", file=sys.stderr, flush=True)


def open_labelled(
    path: Path,
    target: str | None = "",
    kind: str = "auto",
    on_error: str = "raise",
    device: str = "cpu",
    train: LabelledDataset | None = None,
) -> LabelledDataset:
    """Open the images at `path` with their classes, or with the float target(s) named.

    Args:
        target: None for a command that has no --target.
        train: for a test set, the training set by whose class names its labels are numbered.

    Raises:
        InputError: there is no such data or target, images have no labels, a training set has no two classes,
            or the test set has a class that the training set doesn't name.
    """
    source = open_reader(path, kind, device)
    if train is not None and not target:
        source = numbered_as(source, path, train.source.classes, str(train.path))
    known: dict[str, np.ndarray] = getattr(source, "targets", {})
    if not target:
        hint = f"; its float targets: {', '.join(known)}: choose one with --target"
        one_of = hint if known and target is not None else ""
        if source.labels.min() < 0:
            raise InputError(
                f"{path}: its images have no labels, which this command needs for training and test "
                f"images; pass labelled ones with --train and --test{one_of}"
            )
        if train is None and len(np.unique(source.labels)) < 2:
            raise InputError(f"{path}: needs labels of at least two classes{one_of}")
        answers = torch.from_numpy(np.asarray(source.labels, np.int64))
        return LabelledDataset(path, source, answers, int(answers.max()) + 1, (), on_error)
    names = tuple(known) if target == "all" else (target,)
    if not names or any(name not in known for name in names):
        raise InputError(f"{path}: has no float target {target!r}; its targets: {', '.join(known) or 'none'}")
    answers = torch.from_numpy(np.stack([known[name] for name in names], axis=1)).float()
    return LabelledDataset(path, source, answers, len(names), names, on_error)


def numbered_as(source: Reader, path: Path, classes: list[str] | None, where: str) -> Reader:
    """Renumber a set's labels by the names in `classes`, the class names of `where`.

    If one of the two has only numbers, they are taken to mean the same, and a warning says so if the other's
    names aren't numbers. Raises InputError, with the list, for a class that isn't in `classes`.
    """
    own = source.classes
    if source.labels.min() < 0 or own == classes or (numbers_alone(own) and numbers_alone(classes)):
        return source
    known = own is not None and classes is not None
    used = {own[label] for label in np.unique(source.labels)} if known and own is not None else set()
    if not known or (not used <= set(classes or ()) and _without_names(own) != _without_names(classes)):
        one, other = (str(path), where) if numbers_alone(own) else (where, str(path))
        said = f"{one} has no class names: its class numbers are taken as those of {other}"
        print(f"warning: {said}", file=sys.stderr, flush=True)
        return source
    assert own is not None and classes is not None
    renumbered = copy.copy(source)
    renumbered.labels = by_name(source.labels, own, classes, str(path), where)
    renumbered.classes = classes
    return renumbered


def _without_names(classes: list[str] | None) -> bool:
    return classes is None or all(name.isdecimal() for name in classes)


def open_pair(train: Path, test: Path) -> tuple[Reader, Reader]:
    """Open a training set, and a test set whose labels are numbered as the training set's, by class names.

    Raises:
        InputError: there is no such data, training images have one class alone, or the test set has a class
            without training images.
    """
    known = open_labelled(train, None)
    asked = open_labelled(test, None, train=known)
    check_pair(known, asked)
    return known.source, asked.source


def check_pair(train: LabelledDataset, test: LabelledDataset) -> None:
    """Raise InputError if a class of the test set has no image in the training set."""
    unseen = [] if train.targets else np.setdiff1d(test.source.labels, train.source.labels).tolist()
    if unseen:
        names = test.source.classes if unseen[0] >= 0 else None
        name = f" ({names[unseen[0]]})" if names and not numbers_alone(names) else ""
        raise InputError(f"{test.path}: label {unseen[0]}{name} doesn't occur in {train.path}")


def sibling_test_set(train: Path) -> Path:
    """Find the test set beside a training set: train.beton -> test.beton, or val. For a training set in many
    files, it may also be test.beton. InputError if there is none."""
    train = train if train.name else train.absolute()  # "." has no name
    whole = [] if files_of(train) == [train] else [train.suffix]
    for name in ("test", "val", "validation"):
        for beside in (train.name.replace("train", name), *(name + end for end in whole)):
            path = train.with_name(beside)
            if path != train and are_there(path):
                return path
    raise InputError(f"no test images next to {train}: pass them with --test")


def labelled_rows(train: LabelledDataset, share: float, names: Path | None, seed: int) -> np.ndarray:
    """Positions of the images to train on, ascending: from a list of names, or drawn with `seed`."""
    if names is not None:
        return rows_of_names(train, names)
    if share == 1:
        return np.arange(len(train))
    classes = np.zeros(len(train), np.int64) if train.targets else train.answers.numpy()
    count = int(share * len(train) + 1e-9)  # 0.1 * 30 is 3, despite rounding errors
    if count < len(np.unique(classes)):
        raise InputError(
            f"--label-fraction {share}: {count} of {len(train)} images are fewer than one for each of "
            f"{len(np.unique(classes))} classes; raise it"
        )
    return balanced(classes, count, seed)


def balanced(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` positions of classes [N], ascending, as evenly spread over the classes as these allow.

    A class that has too few images gives all, and the others share what it lacks. Which classes give one
    more, and which images, is drawn with `seed`.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(classes))
    turn = np.empty(len(classes), np.int64)  # place of each image in its class, in the order drawn
    by_class = drawn[np.argsort(classes[drawn], kind="stable")]
    found, first, sizes = np.unique(classes[by_class], return_index=True, return_counts=True)
    turn[by_class] = np.arange(len(classes)) - np.repeat(first, sizes)
    lot = generator.permutation(len(found))[np.searchsorted(found, classes)]  # the first class in a turn
    return np.sort(np.lexsort((lot, turn))[:count])


def split(train: LabelledDataset, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into training and validation images: `share` of them for validation, by `balanced`.

    No class loses its last image to validation, which may therefore get fewer, or none.
    """
    classes = np.zeros(len(train), np.int64) if train.targets else train.answers.numpy()
    chosen = balanced(classes, round(share * len(train)), seed + 1)
    taken, there = (np.bincount(c, minlength=classes.max() + 1) for c in (classes[chosen], classes))
    for label in np.flatnonzero((taken == there) & (there > 0)):
        chosen = np.delete(chosen, np.argmax(classes[chosen] == label))
    return np.setdiff1d(np.arange(len(train)), chosen), chosen


def rows_of_names(train: LabelledDataset, path: Path) -> np.ndarray:
    """Positions of the images in a list, one name per line: the full name, or the part after the last "/".

    Raises:
        InputError: the list can't be read, the set has no names, or a name is unknown, repeated or ambiguous.
    """
    try:
        wanted = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as a list of file names ({error})") from error
    names = names_of(train.source, train.path)
    if names is None:
        raise InputError(f"{train.path}: no manifest next to it names its images")
    known = rows_by_name(names)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        example = f", the first {unknown[0]!r}" if unknown else ""
        raise InputError(
            f"{path}: {len(unknown)} of its {len(wanted)} names are not in {train.path}{example}"
        )
    rows = np.array([known[name] for name in wanted], np.int64)
    if (rows < 0).any():
        raise InputError(f"{path}: {wanted[int(rows.argmin())]!r} names several images of {train.path}")
    if len(np.unique(rows)) < len(rows):
        raise InputError(f"{path}: names an image twice ({len(rows)} names, {len(np.unique(rows))} images)")
    return np.sort(rows)


def rows_by_name(names: list[str]) -> dict[str, int]:
    """Map full names, and their parts after the last "/", to positions; -1 if images share the last part."""
    known: dict[str, int] = {}
    for row, name in enumerate(names):
        last = name.rpartition("/")[2]
        known[last] = -1 if last in known else row
    return known | {name: row for row, name in enumerate(names)}


def names_of(source: Reader, path: Path) -> list[str] | None:
    """Return a name for each image of the set, from the set itself or its manifest; None without them."""
    names = getattr(source, "names", None) or stored_names(path)
    return list(names) if names is not None and len(names) == len(source) else None
