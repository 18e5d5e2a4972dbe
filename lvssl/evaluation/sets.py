"""Choose the images that a run is measured on: sets, samples of them, as pixels or as embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lvssl.codes.statistics import compression_ratios
from lvssl.evaluation.corruptions import OUT_OF_DISTRIBUTION
from lvssl.evaluation.embedding import LARGE_SET, Embedding, embedded
from lvssl.runs.labels import Subset, open_pair, say_if_same, say_notes, sibling_test_set
from lvssl.runs.rows import FOREIGN
from lvssl.runs.run import Run, require_classes_of, require_same_classes, training_set
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.loader import Replacements, evaluation_crops
from pipelines.views import ViewSettings

Settings = TypeVar("Settings", bound=Any)
PICTURE = 96  # maximum side of the pictures shown to people, in pixels
SAMPLE = 20_000  # training images of a large set on which many kinds of codes are compared


def labelled_pair(run: Run, control: Run | None, train: Path | None, test: Path) -> tuple[Reader, Reader]:
    """Open training images (by default those of the pretraining) and test images, with equal numbers for
    equal classes. Raises InputError as `open_pair` does, and if run and control were trained on different
    classes."""
    found = open_pair(train or run.settings.data, test)
    if control is not None and run.classes and control.classes:  # none if the training had no labels
        require_same_classes(run, control)
    if train is None:
        require_classes_of(run, found[0], run.settings.data)
    say_notes(*found)
    say_if_same(*found)
    return found


def with_defaults(settings: Settings, run: Run) -> Settings:
    """Fill in the settings of a command that measures a run next to a control: the test set and the control
    from their usual places, and what to do with damaged images."""
    test, control, train = settings.test, settings.control, training_set(run, settings.train)
    if test is None:
        test = sibling_test_set(train)
    neighbour = run.folder.resolve().parent / "control"
    if control is None and neighbour != run.folder.resolve() and (neighbour / "config.json").is_file():
        beside = run.folder.parent / "control"  # not for a link, nor for "."
        control = beside if beside.resolve() == neighbour.resolve() else neighbour
    return replace(settings, test=test, control=control, on_error=run.reading(settings))


def a_sample(train: Reader, test: Reader, max_images: int = 0) -> tuple[Reader, Reader]:
    """Return `max_images` training images and a fifth as many test images, evenly spaced. 0 means all, or
    SAMPLE from LARGE_SET training images on."""
    wanted = max_images or (SAMPLE if len(train) >= LARGE_SET else max(len(train), 5 * len(test)))
    few = [
        source if len(source) <= most else Subset(source, evenly_spaced(len(source), most))
        for source, most in ((train, wanted), (test, max(1, wanted // 5)))
    ]
    return few[0], few[1]


def embed_both(
    run: Run, train: Reader, test: Reader, workers: int, on_error: str = "raise"
) -> tuple[Embedding, Embedding]:
    """Embed both sets, reading the outputs from the store of features if it has them."""
    return embedded(run, train, workers, on_error), embedded(run, test, workers, on_error)


def smaller_by(run: Run, source: Reader, on_error: str) -> Callable[[int], dict[str, float]]:
    """Return a function from a number of bits to how many times smaller it is than the images' pixels and
    JPEGs, and than the run's features."""
    return partial(
        compression_ratios,
        resolution=run.settings.view.resolution,
        channels=channels(source, on_error),
        feature_dim=run.network.feature_dim,
        jpeg_bytes=jpeg_bytes(source),
    )


def jpeg_bytes(source: Reader) -> float | None:
    """Return the mean size of the stored JPEGs; None if any image is stored as pixels."""
    if isinstance(source, Subset):  # a few damaged images hardly change the mean
        source = source.source
    file = getattr(source, "file", None)
    return float(file.sizes.mean()) if file is not None and not file.modes.any() else None


def channels(source: Reader, on_error: str) -> int:
    """Return 1 if the first images are grey, else 3. Grey images stored as RGB count as grey."""
    first = np.arange(min(256, len(source)))
    crops = evaluation_crops(source, ViewSettings(resolution=8), first, Replacements(source, on_error))
    return 1 if (crops == crops[..., :1]).all() else 3


def picture_view(view: ViewSettings, sides: Iterable[int]) -> ViewSettings:
    """Return the view in which people are shown images: the network's crop, at the largest of their shorter
    `sides` (pixels), up to PICTURE, if the network's resolution is lower."""
    return replace(view, resolution=max(view.resolution, min(max(sides, default=0), PICTURE)))


def sides_of(source: Reader, rows: np.ndarray) -> list[int]:
    """Return the shorter side of each image in pixels; 0 for one that is damaged."""

    def side(row: int) -> int:
        try:
            return int(min(source.sizes(np.array([row])))[0])
        except DamagedSample:
            return 0

    return [side(row) for row in rows.tolist()]


def picture(given: Replacements, view: ViewSettings, row: int) -> np.ndarray:
    """Return one image for people, uint8 [S, S, 3]; see `picture_view`. `view` is the network's."""
    index = np.array([row])
    shown = picture_view(view, sides_of(given.source, index))
    return evaluation_crops(given.source, shown, index, given)[0]


def class_names(source: Reader) -> list[str]:
    """Return the names of a set's classes; their numbers if they have no names."""
    return source.classes or [str(number) for number in range(int(source.labels.max()) + 1)]


@dataclass(frozen=True)
class Sampling:
    """Which images are measured where some of them suffice, and what is drawn at random."""

    max_images: int = 2000  # test images, and twice as many training images; 0 means all
    samples: int = 8  # number of latent samples averaged in a prediction
    seed: int = 0
    ood: tuple[Path, ...] = ()  # betons of out-of-distribution data
    on_error: str | None = None  # raise, or skip an image that can't be decoded; None as in the pretraining


@dataclass(frozen=True)
class Sets:
    """The pixels of all sets that are measured, uint8 [N, R, R, 3]."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    out_of_distribution: dict[str, np.ndarray]
    sources: tuple[Reader, Reader]
    skipped: dict[str, int]  # train, test, "ood NAME" -> number of chosen images that couldn't be decoded
    test_rows: np.ndarray  # int64 [N], positions in their source

    @classmethod
    def of(cls, sampling: Sampling, run: Run, train: Reader, test: Reader) -> Sets:
        view, side = run.settings.view, run.settings.view.resolution
        on_error, skipped = run.on_error(sampling.on_error), {}

        def read_some(name: str, source: Reader, wanted: int) -> tuple[np.ndarray, np.ndarray]:
            """Return the crops, and their positions in the source."""
            chosen = evenly_spaced(len(source), wanted or len(source))
            crops, rows = sound_crops(source, view, chosen, on_error)
            skipped[name] = len(chosen) - len(rows)
            return crops, rows

        (train_crops, train_rows), (test_crops, test_rows) = (
            read_some("train", train, 2 * sampling.max_images),
            read_some("test", test, sampling.max_images),
        )
        count = len(test_crops)
        out_of_distribution = {
            name: make(count, side, sampling.seed) for name, make in OUT_OF_DISTRIBUTION.items()
        }
        for name, path in foreign_names(sampling.ood).items():
            out_of_distribution[name], _ = read_some(FOREIGN + name, open_reader(path), count)
        return cls(
            train_crops, train.labels[train_rows], test_crops, test.labels[test_rows], out_of_distribution,
            (train, test), skipped, test_rows,
        )  # fmt: skip


def foreign_names(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Return the paths by the names of the sets: their stems or, where several sets would have one name, such
    as those of svhn/test.beton and cifar100/test.beton, the paths."""
    stems = Counter([*OUT_OF_DISTRIBUTION, *(path.stem for path in dict.fromkeys(paths))])
    return {path.stem if stems[path.stem] == 1 else str(path): path for path in paths}


def sound_crops(
    source: Reader, view: ViewSettings, chosen: np.ndarray, on_error: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return centre crops uint8 [M, R, R, 3] of the positions int64 [N] that can be decoded, and these.

    Raises InputError with on_error="raise", naming the first that can't be decoded.
    """
    rows = chosen.copy()
    crops = evaluation_crops(source, view, rows, Replacements(source, on_error))
    sound = rows == chosen  # a damaged image is replaced by another
    return crops[sound], chosen[sound]
