"""`lvssl curate`: find duplicates, outliers and contradicted labels, and choose a diverse subset.

    N  images   F  dimensions of a feature   P  pixels of a thumbnail

The embedding of an image is the mean of its features and those of its mirror image, so that a mirrored copy
lies where the original does. Neighbours are the nearest by cosine of standardised features. An image that
merely looks alike may be as near as a copy, so a pair counts as duplicates only if its thumbnails also agree
in what is not common to the whole set (`Agreement`). Embeddings and thumbnails are written batch by batch and
memory-mapped.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional

from lvssl.codes.file import THUMBNAILS, CodeFileError, open_codes, open_means, open_table, open_uncertainty
from lvssl.codes.search import hamming_distances
from lvssl.evaluation.density import density_of, fit_density
from lvssl.evaluation.embedding import shrink
from lvssl.evaluation.encoder import (
    Coded,
    Encoder,
    code_writer,
    created_by,
    crops_of,
    every_image,
    identity,
    names_or_numbers,
    write_coded,
)
from lvssl.evaluation.fitted import SAMPLE, TrainingEmbeddings, TrainingImages
from lvssl.evaluation.neighbours import nearest_in_cells
from lvssl.evaluation.quantisers import own_bits
from lvssl.evaluation.sets import picture
from lvssl.models.inference import Batches, encode
from lvssl.runs.embeddings import is_embeddings, open_embeddings, require_same_width, training_file
from lvssl.runs.identity import describe_set
from lvssl.runs.labels import numbered_as, say_notes
from lvssl.runs.run import Run, load_run
from lvssl.settings.apply import CurateSettings
from lvssl.settings.pretrain import at_least, require
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import Reader, open_reader
from pipelines.errors import InputError
from pipelines.files import written_csv
from pipelines.kernels.pack import pack_bits
from pipelines.loader import Replacements

NEIGHBOURS = 20  # per image: the candidates for duplicates, and the voters on its label
CHUNK = 8192  # images at a time
SIDE = 16  # of a thumbnail, in pixels
CONFIRMED, ALONE = 0.9, 0.98  # minimum cosine of duplicates: confirmed by pixels, and by features alone
CROPPED = 0.6  # minimum cosine of an image and a crop of it
PARTS = (0.84, 0.88, 0.92, 0.96)  # sides of the crops, as shares of the image's side
NOISE = 25.0  # variance of a thumbnail's pixel, in squared grey levels, that counts as noise


@dataclass(frozen=True)
class Embedded:
    """A set of images or embeddings, and its name in the tables."""

    title: str
    names: Sequence[str]
    labels: np.ndarray  # int64 [N]; -1 if unlabelled
    classes: Sequence[str]  # names of the classes, if they have any
    features: np.ndarray  # floats [N, F], mapped: means over image and mirror image
    uncertainty: np.ndarray  # float32 [N], in nats
    thumbnails: np.ndarray | None = None  # uint8 [N, P], mapped
    source: Reader | None = None
    positions: Sequence[int] = ()  # of each row in the source; damaged images have no row

    def __len__(self) -> int:
        return len(self.features)

    def class_of(self, row: int) -> str:
        label = int(self.labels[row])
        return "" if label < 0 else self.classes[label] if self.classes else str(label)

    def about(self, row: int) -> list[str]:
        return [self.title, self.names[row], self.class_of(row)]


class Table(NamedTuple):
    """A table of findings, and the images that each of its lines is about."""

    head: list[str]
    lines: list[list[Any]]
    shown: list[list[tuple[int, int]]]  # (set, row) of each image


@dataclass(frozen=True)
class Curation:
    """The findings, by name."""

    out: Path
    run: Run | None  # None for embeddings
    sets: list[Embedded]
    on_error: str  # what to do with damaged images
    tables: dict[str, Table]

    def picture(self, which: int, row: int) -> np.ndarray:
        """Return the part of an image that the network sees, uint8 [S, S, 3]; see `picture_view`."""
        chosen = self.sets[which]
        assert self.run is not None and chosen.source is not None
        images = Replacements(chosen.source, self.on_error)
        return picture(images, self.run.settings.view, int(chosen.positions[row]))


def curate(settings: CurateSettings) -> Curation:
    """Inspect the data set and write the tables to `out`.

    Raises InputError: no such run, images or embeddings, impossible settings, or a damaged image (named).
    """
    require(settings.cosine is None or 0 < settings.cosine <= 1, "cosine", settings.cosine, "in (0, 1]")
    require(0 <= settings.pixels <= 1, "pixels", settings.pixels, "in [0, 1]")
    require(0 <= settings.crops <= 1, "crops", settings.crops, "in [0, 1]")
    if settings.crops and not settings.pixels:
        raise InputError("--crops compares pixels, which --pixels 0 leaves out: leave out one of them")
    at_least(settings, top_n=0, subset=0, workers=0)
    given = settings.run
    foreign = is_embeddings(given)
    out = settings.out or (given.with_name(f"{given.stem}-curate") if given.is_file() else given / "curate")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to make {out.name} in")
    run = None if foreign else load_run(given)
    on_error = run.on_error(settings.on_error) if run else "raise"
    sets = of_embeddings(settings) if run is None else of_images(run, settings, out)
    z = standardisation(sets[0])
    agreement = None
    if settings.pixels and sets[0].thumbnails is not None:
        agreement = Agreement.of(sets[0].thumbnails)
    elif settings.pixels:
        print("note: no pixels to confirm duplicates: only features are compared", file=sys.stderr)
    if settings.crops and agreement is None:
        print("note: --crops compares pixels, so it is ignored here", file=sys.stderr)
    cosine = settings.cosine or (CONFIRMED if agreement else ALONE)
    pairs: dict[tuple[int, int, int, int], tuple[float, float | None]] = {}
    for s, t in [(0, 0), (1, 0), (1, 1)] if len(sets) > 1 else [(0, 0)]:
        rows, cosines = nearest_in_cells(sets[s].features, sets[t].features, z, NEIGHBOURS, same=s == t)
        if (s, t) == (0, 0):
            voters = rows, cosines
        looked = settings.crops if agreement is not None else 0.0
        a, place = np.nonzero(cosines >= (min(cosine, CROPPED) if looked else cosine))
        b, agreed, taken = rows[a, place], None, np.ones(len(a), bool)
        if agreement is not None:
            pixels_of = thumbnails(sets[s]), a, thumbnails(sets[t]), b
            agreed = agreement(*pixels_of)
            taken = (agreed >= settings.pixels) & (cosines[a, place] >= cosine)
            if looked:
                of_crops = agreement.of_crops(*pixels_of)
                taken |= of_crops >= looked
                agreed = np.maximum(agreed, of_crops)
        for i in np.flatnonzero(taken).tolist():
            one, other = (int(a[i]), int(b[i])) if s != t else sorted((int(a[i]), int(b[i])))
            likeness = None if agreed is None else float(agreed[i])
            pairs[s, one, t, other] = float(cosines[a[i], place[i]]), likeness
    tables = {"duplicates": duplicates(sets, pairs), "outliers": outliers(sets, settings.top_n)}
    if len(np.unique(sets[0].labels)) > 1 and sets[0].labels.min() >= 0:
        tables["labels"] = contradicted(sets[0], *voters, settings.top_n)
    chosen = diverse(signs(sets[0], z), min(settings.subset, len(sets[0])))
    about = [sets[0].about(row)[1:] for row in chosen]
    tables["subset"] = Table(["name", "class"], about, [[(0, row)] for row in chosen])
    out.mkdir(exist_ok=True)
    for name, table in tables.items():
        with written_csv(out / f"{name}.csv") as rows_of:
            rows_of.writerows([table.head, *table.lines])
    return Curation(out, run, sets, on_error, tables)


def of_images(run: Run, settings: CurateSettings, out: Path) -> list[Embedded]:
    """Return the embedded training and test images, after embedding in `out` those that aren't there yet."""
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
    return [embedded(encoder, settings, out, title, *of_set) for title, of_set in sources.items()]


def of_embeddings(settings: CurateSettings) -> list[Embedded]:
    """Return another model's embeddings, named by row number, with their labels if there are any."""
    found = {"train": open_embeddings(settings.train or training_file(settings.run), labelled=False)}
    if settings.test:
        found["test"] = open_embeddings(settings.test, labelled=False)
        require_same_width(*found.values())
    for one in found.values():
        if len(one.features) < 2:
            raise InputError(f"{one.path}: at least two embeddings are needed")
    density = fit_density(TrainingEmbeddings(found["train"]).sample("features"))
    sets = []
    for title, one in found.items():
        starts = range(0, len(one.features), CHUNK)
        scores = np.concatenate([density(one.features[s : s + CHUNK]) for s in starts])
        names = [str(row) for row in range(len(one.features))]
        sets.append(Embedded(title, names, one.labels, (), one.features, scores))
    return sets


def opened(path: Path) -> Reader:
    """Open the images, with classes if possible: class folders are tried before a plain folder of images."""
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
    """Return the set's embedding from `out`, after writing it there if it doesn't exist yet."""
    run, names, file = encoder.run, names_or_numbers(source, path), out / f"{title}.lvcodes"
    on_error = run.on_error(settings.on_error)
    digest = describe_set(source, labelled=False)["digest"]  # corrected labels leave embeddings as they are
    of = f"{digest} {encoder.density and encoder.density.digest}"
    if settings.overwrite or not stands(file, run, source, names, of, on_error, settings.workers):
        width, side = run.network.feature_dim, min(SIDE, run.settings.view.resolution)
        origin = identity(encoder, path, names, on_error)
        with code_writer(encoder, file, width, origin, {THUMBNAILS: side**2}, of) as writer:
            rows = np.arange(writer.position, len(names))
            batches = crops_of(run, source, on_error, settings.workers, rows)
            write_coded(writer, with_mirror_images(encoder, batches), names, title)
    codes = open_codes(file)
    if codes.count < 2:
        raise InputError(f"{path}: at least two images are needed")
    place = {name: position for position, name in enumerate(names)}
    positions = list(range(len(names))) if codes.count == len(names) else [place[n] for n in codes.names]
    return Embedded(
        title,
        codes.names,
        np.asarray(source.labels)[positions],
        source.classes or (),
        open_means(codes),
        open_uncertainty(codes),
        open_table(codes, THUMBNAILS),
        source,
        positions,
    )


def with_mirror_images(encoder: Encoder, batches: Batches) -> Iterator[Coded]:
    """Encode as `Encoder.coded` does, but with the means over the features of image and mirror image, and
    with grey thumbnails, of SIDE x SIDE or as large as smaller images."""
    run = encoder.run
    for crops, rows in batches:
        part, mirrored = (
            next(iter(encode(run.network, [(both, rows)], run.settings.view)))
            for both in (crops, crops.flip(2))
        )
        means = ((part.features.float() + mirrored.features.float()) / 2).cpu().numpy()
        scores = encoder.density(part.stages.cpu().numpy()) if encoder.density else None
        grey = crops.float().mean(dim=3)[:, None].cpu()
        small = shrink(grey, SIDE).flatten(1).round().to(torch.uint8).numpy()
        yield Coded(rows, part.codes(), means, np.empty((len(rows), 0), np.float32), scores, small)


def stands(
    file: Path, run: Run, source: Reader, names: Sequence[str], of: str, on_error: str, workers: int
) -> bool:
    """Return whether the file holds embeddings of these images, by `of` and their names, made by this
    checkpoint; it may lack those that can't be decoded, unless on_error is "raise"."""
    try:
        codes = open_codes(file)
        open_means(codes), open_uncertainty(codes), open_table(codes, THUMBNAILS)
    except CodeFileError:
        return False
    if (codes.checkpoint, codes.created_by, codes.of) != (run.digest, created_by(run), of):
        return False
    there = list(codes.names)
    if there == list(names):
        return True
    known = set(there)
    missing = np.flatnonzero([name not in known for name in names])
    if on_error == "raise" or not len(missing) or not known <= set(names):
        return False
    sound = crops_of(run, source, on_error, workers, missing)  # of images that are new, or repaired
    return next(iter(sound), None) is None


def standardisation(one: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of the features, float32 [F] each; a deviation of 0 is replaced by 1."""
    total, squares = np.zeros(one.features.shape[1]), np.zeros(one.features.shape[1])
    for start in range(0, len(one), CHUNK):
        part = one.features[start : start + CHUNK].astype(np.float64)
        total += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    mean = total / len(one)
    scale = np.sqrt(np.maximum(squares / len(one) - np.square(mean), 0))
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = 1
    return mean.astype(np.float32), scale.astype(np.float32)


def signs(one: Embedded, z: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the packed signs of the standardised features, uint8 [N, ceil(F / 8)]."""
    starts = range(0, len(one), CHUNK)
    return np.concatenate([pack_bits(one.features[s : s + CHUNK].astype(np.float32) > z[0]) for s in starts])


# ---------------------------------------------------------------------------------------- findings


@dataclass(frozen=True)
class Agreement:
    """Agreement of two images in their pixels, mirrored or not: the cosine of their thumbnails, each less its
    mean, after whitening by the set's covariance, so that what all images of the set share counts little."""

    mean: np.ndarray  # float32 [P]
    whitening: np.ndarray  # float32 [P, P]

    @classmethod
    def of(cls, some: np.ndarray) -> Agreement:
        """Fit on at most SAMPLE of the thumbnails, uint8 [N, P], and on their mirror images."""
        x = levelled(some[evenly_spaced(len(some), SAMPLE)])
        x = np.concatenate([x, mirrored(x)])
        values, vectors = np.linalg.eigh(np.cov(x, rowvar=False, dtype=np.float64))
        turn = vectors / np.sqrt(np.maximum(values, 0) + NOISE)
        return cls(x.mean(axis=0), turn.astype(np.float32))

    def __call__(self, some: np.ndarray, a: np.ndarray, others: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare thumbnails `a` of `some` with `b` of `others` (rows int64 [n]): float32 [n] in [-1, 1]."""
        found = np.empty(len(a), np.float32)
        for start in range(0, len(a), CHUNK):
            part = slice(start, start + CHUNK)
            x, y = levelled(some[a[part]]), levelled(others[b[part]])
            first = self.white(x)
            found[part] = np.maximum(*[(first * self.white(way)).sum(axis=1) for way in (y, mirrored(y))])
        return found

    def of_crops(self, some: np.ndarray, a: np.ndarray, others: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare one image with the best crop of the other, in both directions; otherwise as `__call__`."""
        return np.maximum(self._of_crops(some, a, others, b), self._of_crops(others, b, some, a))

    def _of_crops(self, some: np.ndarray, a: np.ndarray, others: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare the best crop of thumbnails `a` with thumbnails `b`; an image's crops are made once."""
        found = np.full(len(a), -1, np.float32)
        order = np.argsort(a, kind="stable")
        rows, starts = np.unique(a[order], return_index=True)
        ends = np.append(starts[1:], len(a))
        for first in range(0, len(rows), 64):
            chosen = slice(first, first + 64)
            pairs = order[starts[chosen][0] : ends[chosen][-1]]
            place = np.searchsorted(rows[chosen], a[pairs])
            y = levelled(others[b[pairs]])
            ways = self.white(y), self.white(mirrored(y))
            for crop in cropped(some[rows[chosen]].astype(np.float32)):
                white = self.white(levelled(crop))[place]
                best = np.maximum(*[(white * way).sum(axis=1) for way in ways])
                found[pairs] = np.maximum(found[pairs], best)
        return found

    def white(self, x: np.ndarray) -> np.ndarray:
        x = (x - self.mean) @ self.whitening
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def levelled(some: np.ndarray) -> np.ndarray:
    """Subtract from each thumbnail its mean: float32 [n, P]."""
    x = some.astype(np.float32)
    return x - x.mean(axis=1, keepdims=True)


def mirrored(x: np.ndarray) -> np.ndarray:
    """Mirror thumbnails [n, P] from left to right."""
    side = round(x.shape[1] ** 0.5)
    return x.reshape(-1, side, side)[:, :, ::-1].reshape(x.shape)


def cropped(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield crops of thumbnails [n, P], resized to the full size: each of PARTS at nine positions."""
    side = round(x.shape[1] ** 0.5)
    images = torch.from_numpy(x).reshape(-1, 1, side, side)
    for part in PARTS:
        for down, right in itertools.product((part - 1, 0.0, 1 - part), repeat=2):
            move = torch.tensor([[part, 0.0, right], [0.0, part, down]]).expand(len(x), -1, -1)
            grid = functional.affine_grid(move, list(images.shape), align_corners=False)
            parts = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
            yield parts.flatten(1).numpy()


def thumbnails(one: Embedded) -> np.ndarray:
    assert one.thumbnails is not None
    return one.thumbnails


def duplicates(
    sets: list[Embedded], pairs: dict[tuple[int, int, int, int], tuple[float, float | None]]
) -> Table:
    """Make the table of duplicates. `pairs` maps (set, row, other set, other row) to (cosine of the features,
    agreement of the pixels)."""
    first_to_last = sorted(pairs.items(), key=lambda pair: (-(pair[1][1] or pair[1][0]), pair[0]))
    lines = [
        [*sets[s].about(a), *sets[t].about(b), round(cosine, 5),
         "" if agreed is None else round(agreed, 4)]
        for (s, a, t, b), (cosine, agreed) in first_to_last
    ]  # fmt: skip
    head = ["set", "name", "class", "other_set", "other_name", "other_class", "cosine", "pixels"]
    return Table(head, lines, [[(s, a), (t, b)] for (s, a, t, b), _ in first_to_last])


def outliers(sets: list[Embedded], count: int) -> Table:
    every = [
        (float(one.uncertainty[row]), s, row)
        for s, one in enumerate(sets)
        for row in largest(one.uncertainty, count)
    ]
    first = sorted(every, key=lambda one: -one[0])[:count]
    lines = [[*sets[s].about(row), round(score, 4)] for score, s, row in first]
    return Table(["set", "name", "class", "uncertainty"], lines, [[(s, row)] for _, s, row in first])


def contradicted(one: Embedded, rows: np.ndarray, cosines: np.ndarray, count: int) -> Table:
    """Make the table of labels, ranked by how many more of the neighbours' votes, weighted by cosine, another
    class gets."""
    labels = one.labels
    own, best = np.empty(len(one), np.float32), np.empty(len(one), np.float32)
    other = np.empty(len(one), np.int64)
    for start in range(0, len(one), CHUNK):  # all votes at once would take memory for N x classes
        part = slice(start, start + CHUNK)
        turn = np.arange(len(labels[part]))
        votes = np.zeros((len(turn), int(labels.max()) + 1), np.float32)
        weights = np.maximum(cosines[part], 0)
        for place in range(rows.shape[1]):
            votes[turn, labels[rows[part, place]]] += weights[:, place]
        votes /= np.maximum(votes.sum(axis=1, keepdims=True), 1e-12)
        own[part] = votes[turn, labels[part]]
        votes[turn, labels[part]] = -1
        other[part], best[part] = votes.argmax(axis=1), votes.max(axis=1)
    lead = best - own
    if (share := float((lead > 0).mean())) > 0.5:
        print(
            f"note: {share:.0%} of the images have more neighbours of another class than of their own, so "
            "the table of labels means little: the classes can't be seen in the images (folders of years or "
            "places?), or not by this encoder",
            file=sys.stderr,
        )
    first = [row for row in largest(lead, count) if lead[row] > 0]
    lines = [
        [*one.about(row)[1:], one.classes[other[row]] if one.classes else str(other[row]),
         round(float(own[row]), 4), round(float(lead[row] + own[row]), 4)]
        for row in first
    ]  # fmt: skip
    head = ["name", "class", "neighbours_class", "votes_for_class", "votes_for_neighbours_class"]
    return Table(head, lines, [[(0, row), *((0, int(n)) for n in rows[row, :5])] for row in first])


def diverse(bits: np.ndarray, count: int) -> list[int]:
    """Choose `count` rows of codes uint8 [N, B]: row 0 first, then always the row that is farthest, in
    Hamming distance, from all chosen ones (Gonzalez 1985: at most twice the best covering radius). Ties go to
    the lower row."""
    chosen: list[int] = []
    least = np.full(len(bits), 8 * bits.shape[1] + 1, np.int32)
    while len(chosen) < count:
        chosen.append(int(least.argmax()))
        least = np.minimum(least, hamming_distances(bits[chosen[-1]][None], bits)[0])
        least[chosen[-1]] = -1  # below the 0 of a copy, so that no row is chosen twice
    return chosen


def largest(scores: np.ndarray, count: int) -> list[int]:
    """Return the rows of the largest scores in descending order; ties go to the lower row."""
    return np.argsort(-scores, kind="stable")[:count].tolist()
