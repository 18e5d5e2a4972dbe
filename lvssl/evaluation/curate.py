"""`lvssl curate`: what a data set has twice, its outliers, labels that neighbours contradict, a diverse part.

    N  images   F  numbers of a feature

Every image is embedded as the mean of its features and of those of its mirror image, so that a mirrored copy
is where the original is. Candidates for neighbours are the nearest in Hamming distance between the signs of
standardised features; the cosine of these features then decides. Embeddings are written as they come and
mapped from the disk, so memory doesn't grow with F times N.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from lvssl.codes.file import (
    CodeFile,
    CodeFileError,
    open_codes,
    open_means,
    open_uncertainty,
)
from lvssl.codes.search import hamming_distances, hamming_search, staged_search
from lvssl.evaluation.density import density_of
from lvssl.evaluation.encoder import (
    Coded,
    Encoder,
    code_writer,
    created_by,
    crops_of,
    every_image,
    identity,
    names_of,
    write_coded,
)
from lvssl.evaluation.fitted import TrainingImages
from lvssl.evaluation.quantisers import own_bits
from lvssl.models.backbone import feature_dim
from lvssl.models.inference import Batches, encode, locations
from lvssl.runs.labels import numbered_as, say_notes
from lvssl.runs.run import Run, load_run
from lvssl.settings.fields import ReadsImages
from pipelines.decode import Reader, open_reader
from pipelines.errors import InputError
from pipelines.files import written_csv
from pipelines.kernels.pack import pack_bits
from pipelines.loader import evaluation_crops

COARSE, CANDIDATES, NEIGHBOURS = 256, 64, 20  # bits compared with all; rows compared whole; that vote
CHUNK = 8192  # images at a time


@dataclass(frozen=True)
class CurateSettings(ReadsImages):
    """Look after a data set: near-duplicates within and between training and test images, outliers, labels
    that the neighbours contradict, a diverse subset. Writes tables (.csv) and a page with pictures.
    Resumable: rerun the command after an interruption."""

    run: Positional[Path]
    """The run whose encoder is used."""
    train: Path | None = None
    """The images to look after; left out: the run's training images."""
    test: Path | None = None
    """Images that must not be among them; left out: none."""
    out: Path | None = None
    """A folder; left out: RUN/curate."""
    cosine: float = 0.98
    """From this cosine on two images are near-duplicates, in (0, 1]."""
    top_n: int = 1000
    """Rows at most in the tables of outliers and of labels."""
    subset: int = 100
    """Images of the diverse subset."""
    on_error: str | None = None
    """An image that can't be decoded: raise, or skip (leave it out); left out: as in the pretraining."""
    overwrite: bool = False
    """Embed the images again, where embeddings of images of the same names stand already."""
    workers: int = 0
    """Threads that decode; 0: the cores less two, 2 to 12."""


@dataclass(frozen=True)
class Embedded:
    """A set of images on the disk, and what it is called in the tables."""

    title: str
    source: Reader
    positions: list[int]  # in the source, of each row: without those that couldn't be decoded
    codes: CodeFile
    features: np.ndarray  # float16 [N, F], mapped: means of image and mirror image
    uncertainty: np.ndarray  # float32 [N], in nats

    def __len__(self) -> int:
        return self.codes.count

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return np.asarray(self.source.labels)[self.positions]

    def class_of(self, row: int) -> str:
        label, classes = int(self.source.labels[self.positions[row]]), self.source.classes
        return "" if label < 0 else classes[label] if classes else str(label)


@dataclass(frozen=True)
class Curation:
    """What was found: tables by name, heads and rows; beside each row the images that it is about."""

    run: Run
    sets: list[Embedded]
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    shown: dict[str, list[list[tuple[int, int]]]] = field(default_factory=dict)  # (set, row)

    def picture(self, which: int, row: int) -> np.ndarray:
        """uint8 [R, R, 3], as the network sees it."""
        chosen = self.sets[which]
        index = np.array([chosen.positions[row]])
        return np.asarray(evaluation_crops(chosen.source, self.run.settings.view, index))[0]


def curate(settings: CurateSettings) -> Curation:
    """Find it, and write the tables into `out`.

    Raises InputError: no such run or images, impossible settings, or a damaged image (named).
    """
    if not 0 < settings.cosine <= 1:
        raise InputError(f"--cosine must be in (0, 1], got {settings.cosine}")
    for name in ("top_n", "subset", "workers"):
        if getattr(settings, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(settings, name)}")
    run = load_run(settings.run)
    out = settings.out or settings.run / "curate"
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to make {out.name} in")
    paths = {"train": settings.train or run.settings.data, "test": settings.test}
    sources = {title: (path, opened(path)) for title, path in paths.items() if path is not None}
    if "test" in sources:
        (first, train), (path, test) = sources["train"], sources["test"]
        if test.labels.min() >= 0 and train.labels.min() >= 0:
            sources["test"] = path, numbered_as(test, path, train.classes, str(first))
    out.mkdir(exist_ok=True)
    on_error = run.reading(settings)
    density = density_of(TrainingImages(run, workers=settings.workers, on_error=on_error))
    encoder = Encoder(run, own_bits(run), density=density)
    sets = [embedded(encoder, settings, out, title, *of_set) for title, of_set in sources.items()]
    found = Curation(run, sets)
    z = standardisation(sets[0])
    bits = [signs(each, z) for each in sets]
    pairs: dict[tuple[int, int, int, int], float] = {}
    for s, t in [(0, 0), (1, 0), (1, 1)] if len(sets) > 1 else [(0, 0)]:
        near = neighbours(sets[s], bits[s], sets[t], bits[t], z, NEIGHBOURS, same=s == t)
        if (s, t) == (0, 0):
            rows, cosines = near
        for a, b, cosine in close(*near, settings.cosine):
            pair = (s, min(a, b), t, max(a, b)) if s == t else (s, a, t, b)
            pairs[pair] = cosine
    duplicates(found, pairs)
    outliers(found, settings.top_n)
    if len(np.unique(sets[0].labels)) > 1 and sets[0].labels.min() >= 0:
        contradicted(found, rows, cosines, settings.top_n)
    chosen = diverse(bits[0], min(settings.subset, len(sets[0])))
    table(found, "subset", ["name", "class"], [[(0, row)] for row in chosen],
          [[sets[0].codes.names[row], sets[0].class_of(row)] for row in chosen])  # fmt: skip
    for name, (head, lines) in found.tables.items():
        with written_csv(out / f"{name}.csv") as rows_of:
            rows_of.writerows([head, *lines])
    return found


def opened(path: Path) -> Reader:
    """With classes, where there are any: class folders before a folder of images."""
    try:
        source = open_reader(path)
    except InputError:
        found = every_image(path)
        if found is None:
            raise
        source = found
    say_notes(source)
    return source


# ---------------------------------------------------------------------------------------- embedding


def embedded(
    encoder: Encoder, settings: CurateSettings, out: Path, title: str, path: Path, source: Reader
) -> Embedded:
    """The set's embedding as it stands in `out`, made where it isn't there yet."""
    run, names, file = encoder.run, names_of(source, path), out / f"{title}.lvcodes"
    on_error = run.on_error(settings.on_error)
    if settings.overwrite or not stands(file, run, names, on_error):
        width = feature_dim(run.settings.model.backbone)
        with code_writer(encoder, file, width, identity(encoder, path, names, on_error)) as writer:
            rows = np.arange(writer.position, len(names))
            batches = crops_of(run, source, on_error, settings.workers, rows)
            write_coded(writer, with_mirror_images(encoder, batches), names, title)
    codes = open_codes(file)
    if codes.count < 2:
        raise InputError(f"{path}: at least two images are needed")
    place = {name: position for position, name in enumerate(names)}
    positions = list(range(len(names))) if codes.count == len(names) else [place[n] for n in codes.names]
    return Embedded(title, source, positions, codes, open_means(codes), open_uncertainty(codes))


def with_mirror_images(encoder: Encoder, batches: Batches) -> Iterator[Coded]:
    """As `Encoder.coded`, but for the means: those of the features of image and mirror image."""
    run = encoder.run
    for crops, rows in batches:
        part, mirrored = (
            next(iter(encode(run.network, [(both, rows)], run.settings.view)))
            for both in (crops, crops.flip(2))
        )
        means = ((part.features.float() + mirrored.features.float()) / 2).cpu().numpy()
        where = locations(run.network, part).float().cpu().numpy()
        scores = encoder.density(where) if encoder.density else None
        yield Coded(rows, part.codes(), means, np.empty((len(rows), 0), np.float32), scores)


def stands(file: Path, run: Run, names: Sequence[str], on_error: str) -> bool:
    """Whether these images, by their names, are embedded there already, by this checkpoint."""
    try:
        codes = open_codes(file)
        open_means(codes), open_uncertainty(codes)
    except CodeFileError:
        return False
    if codes.checkpoint != run.digest or codes.created_by != created_by(run):
        return False
    there = list(codes.names)
    return there == list(names) or (on_error == "skip" and set(there) <= set(names))


def standardisation(one: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the features, float32 [F] each; the latter is 1 where it is 0."""
    total, squares = np.zeros(one.features.shape[1]), np.zeros(one.features.shape[1])
    for start in range(0, len(one), CHUNK):
        part = one.features[start : start + CHUNK].astype(np.float64)
        total += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    mean = total / len(one)
    scale = np.sqrt(np.maximum(squares / len(one) - np.square(mean), 0))
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = 1
    return mean.astype(np.float32), scale.astype(np.float32)


def unit(features: np.ndarray, z: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Standardised, of length 1: float32 [n, F]."""
    x = (features.astype(np.float32) - z[0]) / z[1]
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def signs(one: Embedded, z: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Packed, uint8 [N, ceil(F / 8)]."""
    starts = range(0, len(one), CHUNK)
    return np.concatenate([pack_bits(one.features[s : s + CHUNK].astype(np.float32) > z[0]) for s in starts])


# ---------------------------------------------------------------------------------------- what is found


def neighbours(
    queries: Embedded,
    query_bits: np.ndarray,
    database: Embedded,
    bits: np.ndarray,
    z: tuple[np.ndarray, np.ndarray],
    k: int,
    same: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [Q, k], cosines float32 [Q, k]) of the nearest of each image, nearest first; `same`: the
    sets are one, and an image isn't its own neighbour."""
    count = len(database) - same
    k, asked = min(k, count), min(CANDIDATES + same, len(database))
    rows, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    with tqdm(total=len(queries), desc="neighbours", unit="img", disable=None, file=sys.stderr) as bar:
        for start in range(0, len(queries), CHUNK):
            part = slice(start, start + CHUNK)
            if 8 * bits.shape[1] > COARSE:
                found, _ = staged_search(query_bits[part], bits, asked, coarse_bits=COARSE)
            else:
                found, _ = hamming_search(query_bits[part], bits, asked)
            of_part = unit(queries.features[part], z)
            for i, candidates in enumerate(found):
                likeness = unit(database.features[candidates], z) @ of_part[i]
                if same:
                    likeness[candidates == start + i] = -np.inf
                order = np.argsort(-likeness, kind="stable")[:k]
                rows[start + i], cosines[start + i] = candidates[order], likeness[order]
            bar.update(len(found))
    return rows, cosines


def close(rows: np.ndarray, cosines: np.ndarray, least: float) -> Iterable[tuple[int, int, float]]:
    """(row, its neighbour, cosine) of every pair of at least that cosine; within a set once or twice."""
    for a, place in zip(*(each.tolist() for each in np.nonzero(cosines >= least))):
        yield a, int(rows[a, place]), float(cosines[a, place])


def table(
    found: Curation, name: str, head: list[str], shown: list[list[tuple[int, int]]], lines: list[list[Any]]
) -> None:
    found.tables[name], found.shown[name] = (head, lines), shown


def duplicates(found: Curation, pairs: dict[tuple[int, int, int, int], float]) -> None:
    """`pairs`: (set, row, other set, other row) -> cosine."""
    first_to_last = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    lines = []
    for (s, a, t, b), cosine in first_to_last:
        first, second = found.sets[s], found.sets[t]
        each = [
            [one.title, one.codes.names[row], one.class_of(row)] for one, row in ((first, a), (second, b))
        ]
        lines.append([*each[0], *each[1], round(cosine, 5)])
    head = ["set", "name", "class", "other_set", "other_name", "other_class", "cosine"]
    table(found, "duplicates", head, [[(s, a), (t, b)] for (s, a, t, b), _ in first_to_last], lines)


def outliers(found: Curation, count: int) -> None:
    every = [
        (float(score), s, row)
        for s, one in enumerate(found.sets)
        for row, score in zip(largest(one.uncertainty, count), np.sort(one.uncertainty)[::-1])
    ]
    first = sorted(every, key=lambda one: -one[0])[:count]
    lines = []
    for score, s, row in first:
        one = found.sets[s]
        lines.append([one.title, one.codes.names[row], one.class_of(row), round(score, 4)])
    head = ["set", "name", "class", "uncertainty"]
    table(found, "outliers", head, [[(s, row)] for _, s, row in first], lines)


def contradicted(found: Curation, rows: np.ndarray, cosines: np.ndarray, count: int) -> None:
    """Labels by how much more of the neighbours' votes, weighted by cosine, another class has."""
    one = found.sets[0]
    labels = one.labels
    votes = np.zeros((len(one), int(labels.max()) + 1), np.float32)
    weights = np.maximum(cosines, 0)
    for place in range(rows.shape[1]):
        votes[np.arange(len(one)), labels[rows[:, place]]] += weights[:, place]
    votes /= np.maximum(votes.sum(axis=1, keepdims=True), 1e-12)
    own = votes[np.arange(len(one)), labels].copy()
    votes[np.arange(len(one)), labels] = -1
    other = votes.argmax(axis=1)
    lead = votes.max(axis=1) - own
    first = [row for row in largest(lead, count) if lead[row] > 0]
    names = one.source.classes
    lines = [
        [one.codes.names[row], one.class_of(row), names[other[row]] if names else str(other[row]),
         round(float(own[row]), 4), round(float(lead[row] + own[row]), 4)]
        for row in first
    ]  # fmt: skip
    head = ["name", "class", "neighbours_class", "votes_for_class", "votes_for_neighbours_class"]
    table(found, "labels", head, [[(0, row), *((0, int(n)) for n in rows[row, :5])] for row in first], lines)


def diverse(bits: np.ndarray, count: int) -> list[int]:
    """`count` rows of codes uint8 [N, B]: after row 0 always the one that is farthest, in Hamming distance,
    from all that are chosen (Gonzalez 1985: at most twice the best covering radius); ties: the lower row."""
    chosen: list[int] = []
    least = np.full(len(bits), 8 * bits.shape[1] + 1, np.int32)
    while len(chosen) < count:
        chosen.append(int(least.argmax()))
        least = np.minimum(least, hamming_distances(bits[chosen[-1]][None], bits)[0])
    return chosen


def largest(scores: np.ndarray, count: int) -> list[int]:
    """Rows of the largest, in falling order, ties by the lower row."""
    return np.argsort(-scores, kind="stable")[:count].tolist()
