"""Data sets that are opened by name: torchvision's, and the digits that scikit-learn includes."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.dataset import Dataset, labelled
from pipelines.datasets.recognise import UNLABELLED
from pipelines.errors import InputError, first_line

DIGITS_TEST = 500  # of 1,797


def open_torchvision(name: str, split: str | None, root: Path) -> Dataset:
    """Open a torchvision class that selects its split by `train=` or `split=`; downloads it if necessary."""
    import torchvision

    cls: Any = getattr(torchvision.datasets, name, None)
    parameters = set(inspect.signature(cls).parameters if inspect.isclass(cls) else ())
    if "download" not in parameters or not parameters & {"train", "split"}:
        raise InputError(
            f"torchvision:{name}: not a data set with train and test, such as FashionMNIST, CIFAR10, SVHN"
        )
    if split == "validation" or (split == UNLABELLED and "train" in parameters):
        raise InputError(f"torchvision:{name}: splits are train and test")
    which = {"train": split != "test"} if "train" in parameters else {"split": split or "train"}
    try:
        try:
            images = cls(root, download=False, **which)
        except RuntimeError:  # how torchvision says that it hasn't been downloaded yet
            images = cls(root, download=True, **which)
    except Exception as error:  # any error of the network, the archive or the class itself
        raise InputError(
            f"torchvision:{name}: could not be loaded from or downloaded to {root} ({first_line(error)})"
        ) from error
    labels = getattr(images, "targets", getattr(images, "labels", None))
    try:
        labels = [images[row][1] for row in range(len(images))] if labels is None else labels
        numbers = np.asarray(labels).astype(np.int64)
        if numbers.ndim != 1:
            raise ValueError(f"arrays of {numbers.shape[1:]}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"torchvision:{name}: its targets aren't one number per image, as classes are "
            f"({first_line(error)}): choose another set, or save it in class folders"
        ) from error
    classes = getattr(images, "classes", None)
    names = [f"{name}:{split or 'train'}:{row}" for row in range(len(images))]
    return labelled(
        f"torchvision:{name}",
        names,
        numbers,
        [str(each) for each in classes] if classes else None,
        lambda index: np.asarray(images[index][0].convert("RGB")),
        split or "train",
        {"torchvision": torchvision.__version__},
    )


def open_sklearn(name: str, split: str | None) -> Dataset:
    """scikit-learn's digits, 0..16 scaled to 0..255; the split is fixed, on every machine."""
    if name != "digits":
        raise InputError(f"sklearn:{name}: unknown; the one that scikit-learn ships is sklearn:digits")
    if split not in (None, "train", "test"):
        raise InputError("sklearn:digits: splits are train and test")
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState's stream is frozen, whereas NumPy may change a Generator's draws between releases.
    order = np.random.RandomState(0).permutation(len(digits.target))
    rows = order[-DIGITS_TEST:] if split == "test" else order[:-DIGITS_TEST]
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    names = [f"digits:{row}" for row in rows]
    libraries = {"scikit-learn": version("scikit-learn")}
    labels = digits.target[rows].astype(np.int64)
    return labelled("sklearn:digits", names, labels, None, images.__getitem__, split or "train", libraries)
