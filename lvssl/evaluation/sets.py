"""The images that a run is measured on: which sets, which of their images, as pixels or as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lvssl.codes.statistics import compression_ratios
from lvssl.evaluation.corruptions import OUT_OF_DISTRIBUTION
from lvssl.evaluation.embedding import LARGE_SET, Embedding, embedded
from lvssl.runs.labels import Subset, open_pair, say_notes, sibling_test_set
from lvssl.runs.run import Run, require_classes_of, require_same_classes, training_set
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.loader import Replacements, evaluation_crops
from pipelines.views import ViewSettings

Settings = TypeVar("Settings", bound=Any)
PICTURE = 96  # pixels a side of a picture for people, at most
SAMPLE = 20_000  # training images of a large set on which codes of many kinds are compared


def labelled_pair(run: Run, control: Run | None, train: Path | None, test: Path) -> tuple[Reader, Reader]:
    """Training images (those of the pretraining, unless named) and test images, with the same numbers for the
    same classes. Raises InputError as `open_pair` does, and if run and control were trained on others."""
    found = open_pair(train or run.settings.data, test)
    if control is not None and run.classes and control.classes:  # none: trained without labels
        require_same_classes(run, control)
    if train is None:
        require_classes_of(run, found[0], run.settings.data)
    for each in found:
        say_notes(each)
    return found


def with_defaults(settings: Settings, run: Run) -> Settings:
    """Settings of a command that measures a run beside a control, with the test set and the control that lie
    where one would look for them, and with what a damaged image does."""
    test, control, train = settings.test, settings.control, training_set(run, settings.train)
    if test is None:
        test = sibling_test_set(train)
    neighbour = run.folder.resolve().parent / "control"
    if control is None and neighbour != run.folder.resolve() and (neighbour / "config.json").is_file():
        control = run.folder.parent / "control"
    return replace(settings, test=test, control=control, on_error=run.reading(settings))


def a_sample(train: Reader, test: Reader, max_images: int = 0) -> tuple[Reader, Reader]:
    """`max_images` of the training images and a fifth as many test images, evenly spread; 0: all, but of
    LARGE_SET and more SAMPLE."""
    wanted = max_images or (SAMPLE if len(train) >= LARGE_SET else max(len(train), 5 * len(test)))
    few = [
        source if len(source) <= most else Subset(source, evenly_spaced(len(source), most))
        for source, most in ((train, wanted), (test, max(1, wanted // 5)))
    ]
    return few[0], few[1]


def embed_both(
    run: Run, train: Reader, test: Reader, workers: int, on_error: str = "raise"
) -> tuple[Embedding, Embedding]:
    """The networks' outputs for both sets, from the store of features where they lie there."""
    return embedded(run, train, workers, on_error), embedded(run, test, workers, on_error)


def smaller_by(run: Run, source: Reader, on_error: str) -> Callable[[int], dict[str, float]]:
    """How many times smaller so many bits are than these images' pixels, JPEGs and the run's features."""
    return partial(
        compression_ratios,
        resolution=run.settings.view.resolution,
        channels=channels(source, on_error),
        feature_dim=run.network.feature_dim,
        jpeg_bytes=jpeg_bytes(source),
    )


def jpeg_bytes(source: Reader) -> float | None:
    """Mean size of the stored JPEGs; None where any image is stored as pixels."""
    if isinstance(source, Subset):  # a few damaged ones change no mean that is worth a word
        source = source.source
    file = getattr(source, "file", None)
    return float(file.sizes.mean()) if file is not None and not file.modes.any() else None


def channels(source: Reader, on_error: str) -> int:
    """1 if the first images are grey, else 3: a grey image that is stored as RGB isn't larger for it."""
    first = np.arange(min(256, len(source)))
    crops = evaluation_crops(source, ViewSettings(resolution=8), first, Replacements(source, on_error))
    return 1 if (crops == crops[..., :1]).all() else 3


def picture_view(view: ViewSettings, *shown: tuple[Reader, np.ndarray]) -> ViewSettings:
    """How images are shown to people: the network's crop, in as many pixels as the largest of them has, up to
    PICTURE, where the network's resolution is lower. `shown`: sets and positions in them."""

    def side(source: Reader, row: int) -> int:
        try:
            return int(min(source.sizes(np.array([row])))[0])
        except DamagedSample:
            return 0

    most = max((side(source, row) for source, rows in shown for row in rows.tolist()), default=0)
    return replace(view, resolution=max(view.resolution, min(most, PICTURE)))


def class_names(source: Reader) -> list[str]:
    """Of a set's labels; numbers where they have no names."""
    return source.classes or [str(number) for number in range(int(source.labels.max()) + 1)]


@dataclass(frozen=True)
class Sampling:
    """Which images are measured where a part of them is enough, and what is drawn at random."""

    max_images: int = 2000  # test images, and twice as many training images; 0: all
    samples: int = 8  # of the latent, averaged in a prediction
    seed: int = 0
    ood: tuple[Path, ...] = ()  # betons of other data
    on_error: str | None = None  # raise, or skip an image that can't be decoded; None: as in the pretraining


@dataclass(frozen=True)
class Sets:
    """The pixels that everything is measured on, uint8 [N, R, R, 3]."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    out_of_distribution: dict[str, np.ndarray]
    sources: tuple[Reader, Reader]
    skipped: dict[str, int]  # set -> images that were chosen and couldn't be decoded

    @classmethod
    def of(cls, sampling: Sampling, run: Run, train: Reader, test: Reader) -> Sets:
        view, side = run.settings.view, run.settings.view.resolution
        on_error, skipped = run.on_error(sampling.on_error), {}

        def read_some(name: str, source: Reader, wanted: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = evenly_spaced(len(source), wanted or len(source))
            crops, rows = sound_crops(source, view, chosen, on_error)
            skipped[name] = len(chosen) - len(rows)
            return crops, source.labels[rows]

        (train_crops, train_labels), (test_crops, test_labels) = (
            read_some("train", train, 2 * sampling.max_images),
            read_some("test", test, sampling.max_images),
        )
        count = len(test_crops)
        out_of_distribution = {
            name: make(count, side, sampling.seed) for name, make in OUT_OF_DISTRIBUTION.items()
        }
        for path in sampling.ood:
            out_of_distribution[path.stem], _ = read_some(path.stem, open_reader(path), count)
        return cls(
            train_crops, train_labels, test_crops, test_labels, out_of_distribution, (train, test), skipped
        )


def sound_crops(
    source: Reader, view: ViewSettings, chosen: np.ndarray, on_error: str
) -> tuple[np.ndarray, np.ndarray]:
    """Centre crops uint8 [M, R, R, 3] of those of the positions int64 [N] that can be decoded, and these.

    Raises InputError, which names the first that can't be, with on_error="raise".
    """
    rows = chosen.copy()
    crops = evaluation_crops(source, view, rows, Replacements(source, on_error))
    sound = rows == chosen  # in a damaged one's place there is another
    return crops[sound], chosen[sound]
