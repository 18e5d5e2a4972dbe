"""Which folders of a tree are classes, splits, or neither; the same rules for folders on disk and in tars.

The layout is CLASS/IMAGE.jpg, SPLIT/CLASS/IMAGE.jpg, or either of them below a single top-level folder. Files
deeper in a class folder belong to that class. Splits are recognised in any case (Train, TESTING, val,
unlabeled) if at least two of them are next to each other, if there is nothing else, or if one has class
folders and its neighbours have no images; a class named `train` therefore remains a class. If more than 5 %
of the images lie next to the folders, the folders aren't classes: all images are read, without labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.datasets.recognise import UNLABELLED, has_image_name, in_short, split_of_folder
from pipelines.errors import InputError

DEEPEST = 8  # levels of folders that are searched above the classes, or counted below
LOOSE = 0.05  # share of the images outside of any folder above which the folders aren't classes


class Tree(Protocol):
    """Folders, named by their paths, which end with a slash; the top is "". It omits system files."""

    def folders(self, at: str) -> list[str]:
        """Names of the folders directly in this one, sorted."""

    def files(self, at: str) -> list[str]:
        """Names of the files directly in this one, sorted."""

    def has_images(self, at: str) -> bool:
        """Whether files with image names are directly in it."""


@dataclass(frozen=True)
class Layout:
    """The location of the classes."""

    base: str  # the folder that holds the class folders
    classes: list[str]  # class names, sorted; none: the images below `base` have no labels
    split: str | None
    has_splits: bool = False  # whether the base is the folder of a split
    train: list[str] | None = None  # the classes of the training images, if these are in another split
    train_base: str = ""
    notes: list[str] = field(default_factory=list)  # what is left out


def layout_of(tree: Tree, where: str, asked: str | None, named: str | None = None) -> Layout:
    """Find classes and split. `asked`: the split that the user wants; `named`: the one that a tar's name
    states.

    Raises InputError if the split doesn't exist, or if two folders are the same split.
    """
    base = _below_lone_folders(tree)
    names = tree.folders(base)
    splits = _splits(tree, base, names, asked)
    if not splits:
        if asked is not None and named is None:
            raise InputError(f"{where}: has no splits; leave --split out")
        if not names:
            return Layout(base, [], asked or named)
        if loose := _mixed(tree, base):
            note = in_short("no labels: too many images lie next to the folders for classes", loose)
            return Layout(base, [], asked or named, notes=[note])
        return Layout(base, names, asked or named, notes=_loose(tree, base))
    wanted = asked or (named if named in splits else None)
    key, split = choose_split(where, splits, wanted)
    chosen = splits[key]
    if len(chosen) > 1:
        raise InputError(f"{where}: {' and '.join(chosen)} are the same split; remove or rename one of them")
    beside = [name for name in names if split_of_folder(name) in (None, UNLABELLED)]
    notes = [in_short("ignored folders next to the splits", beside)] if beside else []
    others = [] if wanted else [name for each in splits if each != key for name in splits[each]]
    others = [name for name in others if name not in beside]
    if others:
        notes.append(in_short(f"reading {chosen[0]}; other splits, for convert-beton --split", others))
    inner = _inner(tree, f"{base}{chosen[0]}/")
    if key == UNLABELLED or not tree.folders(inner):
        return Layout(inner, [], split, True, notes=notes + _loose(tree, base))
    notes += _loose(tree, base, inner)
    train, train_base = None, ""
    if key != "train" and "train" in splits:
        train_base = _inner(tree, f"{base}{splits['train'][0]}/")
        train = tree.folders(train_base) or None
    return Layout(inner, tree.folders(inner), split, True, train, train_base, notes)


def choose_split(where: str, present: Mapping[str, Sequence[str]], split: str | None) -> tuple[str, str]:
    """The key of a split in {split: names}, and the split. If None is given: train, or the only one.

    Validation images serve as test images if there are no others. Raises InputError if the split doesn't
    exist.
    """
    known = [name for name in present if name != UNLABELLED]
    if split is None:
        split = known[0] if len(known) == 1 else "train" if known else UNLABELLED
    for name in (split, "validation") if split == "test" else (split,):
        if name in present:
            return name, split
    there = ", ".join(names[0] for names in present.values())
    raise InputError(f"{where}: has no split '{split}', only {there}")


def _below_lone_folders(tree: Tree) -> str:
    """The folder to search for classes or splits; in a tar of `set/`, that folder."""
    base = here = ""
    for _ in range(DEEPEST):
        folders = tree.folders(here)
        if len(folders) != 1 or split_of_folder(folders[0]) or tree.has_images(here):
            break
        here = f"{here}{folders[0]}/"
        if tree.has_images(here):  # a class folder
            break
        below = tree.folders(here)
        if len(below) > 1 or (below and split_of_folder(below[0])):
            base = here
    return base


def _splits(tree: Tree, base: str, names: list[str], asked: str | None) -> dict[str, list[str]]:
    """{split: folders of that name}; empty if the folders are classes."""
    found: dict[str, list[str]] = {}
    for name in names:
        if split := split_of_folder(name):
            found.setdefault(split, []).append(name)
    labelled = [split for split in found if split != UNLABELLED]
    others = [f"{base}{name}/" for name in names if split_of_folder(name) is None]
    if not labelled:
        return found if asked == UNLABELLED or not others else {}
    if len(labelled) > 1 or not others or asked is not None:
        return found
    own = [f"{base}{name}/" for name in found[labelled[0]]]
    holds_classes = all(len(tree.folders(at)) > 1 and not tree.has_images(at) for at in own)
    return found if holds_classes and not any(map(tree.has_images, others)) else {}


def _inner(tree: Tree, at: str) -> str:
    """The inner folder of train/train/CLASS, a form in which some archives unpack."""
    folders = tree.folders(at)
    return f"{at}{folders[0]}/" if len(folders) == 1 and split_of_folder(folders[0]) else at


def _mixed(tree: Tree, base: str) -> list[str]:
    """The images next to the folders of `base`, if they are more than LOOSE of all; otherwise empty."""
    loose = [name for name in tree.files(base) if has_image_name(name)]
    enough = len(loose) / LOOSE - len(loose)  # files in folders, from which on these are classes
    return loose if _files_in_folders(tree, base, enough) < enough else []


def _files_in_folders(tree: Tree, at: str, enough: float, levels: int = DEEPEST) -> int:
    """Count the files in the folders of this one; counting stops at `enough`, and after so many `levels`, for
    a link may lead in a circle."""
    found = 0
    for name in tree.folders(at):
        if found >= enough or not levels:
            break
        found += len(tree.files(f"{at}{name}/"))
        found += _files_in_folders(tree, f"{at}{name}/", enough - found, levels - 1)
    return found


def _loose(tree: Tree, base: str, *within: str) -> list[str]:
    """Name the files in this folder, and in others below it, that are in no class folder: a note, or none."""
    files = [f"{at.removeprefix(base)}{name}" for at in (base, *within) for name in tree.files(at)]
    return [in_short("ignored files outside of class folders", files)] if files else []
