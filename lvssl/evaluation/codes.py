"""Codes of a set of images, and the nearest images of queries."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import Positional

from lvssl.codes.file import (
    UNCERTAINTY,
    CodeFile,
    CodeFileError,
    open_codes,
    open_means,
    open_uncertainty,
    require_checkpoint,
    table_path,
)
from lvssl.codes.index import nearest_rows, write_faiss
from lvssl.codes.quantiser import Quantiser
from lvssl.codes.search import rerank
from lvssl.codes.writer import CodeWriter
from lvssl.evaluation.density import Density, density_of, stored_density
from lvssl.evaluation.fitted import TrainingImages, locations
from lvssl.evaluation.quantisers import (
    chosen_code,
    own_bits,
    quantiser_of,
    require_faiss,
    stored_quantiser,
)
from lvssl.models import inference
from lvssl.models.inference import Batches, in_batches
from lvssl.runs.labels import readable, say_notes
from lvssl.runs.run import Run, load_encoder
from lvssl.settings.fields import beyond_defaults
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.decode.images import ImageReader
from pipelines.decode.pixels import decode_rgb
from pipelines.decode.resize import resize_crop
from pipelines.errors import InputError
from pipelines.files import write_atomically
from pipelines.formats.manifest import manifest_path, read_manifest
from pipelines.kernels.pack import pack_bits
from pipelines.parameters import centre_boxes

QUERIES = 1024  # searched together
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
CANDIDATES = 100  # that `--rerank` looks at, at least


@dataclass(frozen=True)
class EncodeSettings:
    """Write the packed code and the uncertainty of every image of a set, no labels needed. Resumable: rerun
    the command after an interruption.

    The uncertainty is minus the log-density, in nats, of a Gaussian fitted to the training images'
    posteriors: RUN/density.safetensors, fitted by the first call, which needs the training images."""

    run: Positional[Path]
    """The run whose encoder is used."""
    images: Path
    """A folder of images, searched recursively, no labels needed; or a .beton, tars, a parquet ..."""
    out: Path | None = None
    """The code file; left out: RUN/codes.lvcodes."""
    bits: int = 0
    """Length of the codes; 0: the run's own code."""
    code: str = "auto"
    """With --bits: auto (docs/codes.md says which at which length), bits (the first of the run's
    own), opq (product quantisation, needs the extra `faiss`), itq, pca; fitted on the training images by the
    first call and kept in RUN/quantisers."""
    clusters: int = 1
    """Gaussians of the density: 1, or a mixture of so many."""
    train: Path | None = None
    """Training images, at most 50,000 of which density and quantiser are fitted on; left out: the run's."""
    fit: bool = True
    """Fit what the training images are needed for; --no-fit: no uncertainty, and Hamming distance alone."""
    means: bool = False
    """Store the posteriors' means beside it, too, as fp16: 16 times a code of bits, for `search --rerank`."""
    csv: Path | None = None
    """Write names and uncertainties there, too."""
    faiss: Path | None = None
    """Write the codes there, too, as an index for `faiss.read_index` (opq) or `faiss.read_index_binary`."""
    on_error: str | None = None
    """An image that can't be decoded: raise (stop and name it), or skip (leave it out, with a warning); left
    out: as in the pretraining."""
    workers: int = 0
    """Threads that decode; 0: the cores less two, 2 to 12."""


@dataclass(frozen=True)
class SearchSettings:
    """Find the images whose codes are nearest to one query or to many.

    Queries that are images stay real-valued: the distance is the squared Euclidean one to what a code stands
    for. Hamming distance for queries that are codes, with --symmetric, --staged or --rerank, and for code
    files that were written with --no-fit."""

    run: Positional[Path]
    """The run that made the codes."""
    query: Path
    """An image; or a folder, a .beton or a code file (.lvcodes), each image of which is a query."""
    codes: Path | None = None
    """The code file that is searched; left out: RUN/codes.lvcodes."""
    k: int = 10
    """Neighbours to show."""
    symmetric: bool = False
    """Compare codes with codes: Hamming distance, or of product codes that between what they stand for."""
    staged: bool = False
    """Compare 512 bits with all, and the rest with the nearest of them: faster, and may miss a neighbour."""
    rerank: bool = False
    """Put the nearest 10 k (100 at least) in the order of their posteriors' similarity (encode --means)."""
    on_error: str | None = None
    """A query in a folder or set that can't be decoded: raise, or skip; left out: as in the pretraining."""
    csv: Path | None = None
    """Write the neighbours there instead: query, rank, name, distance, similarity with --rerank, and the
    uncertainties of neighbour and query."""


class Neighbour(NamedTuple):
    name: str
    distance: float  # an int, where it is Hamming's
    similarity: float | None = None  # cosine of the posteriors' means, where reranked
    uncertainty: float | None = None  # in nats, where it was stored with the codes


class Query(NamedTuple):
    name: str
    uncertainty: float | None  # in nats, where the run has a density


class Coded(NamedTuple):
    """B images, encoded."""

    rows: np.ndarray  # int64 [B], positions in the set
    codes: np.ndarray  # packed, uint8 [B, bytes]
    means: np.ndarray  # of the posteriors, float32 [B, D]
    values: np.ndarray  # what the quantiser encodes, float32 [B, L]; L = 0 without one
    uncertainty: np.ndarray | None  # float32 [B]


@dataclass(frozen=True)
class Encoder:
    """A run with what was fitted for it: all that leads from images to codes."""

    run: Run
    bits: int
    code: str = "bits"
    quantiser: Quantiser | None = None
    density: Density | None = None

    def coded(self, batches: Batches) -> Iterator[Coded]:
        run = self.run
        for part in inference.encode(run.network, batches, run.settings.view):
            where = locations(run, part).float().cpu().numpy()
            values = np.empty((len(where), 0), np.float32)
            if self.quantiser is not None:
                values = where if self.code == "bits" else part.features.float().cpu().numpy()
            if self.code == "bits" or self.quantiser is None:
                codes = pack_bits(part.posterior.code()[:, : self.bits])
            else:
                codes = self.quantiser.encode(values)
            means = part.posterior.mean().float().cpu().numpy()
            yield Coded(part.rows, codes, means, values, self.density(where) if self.density else None)


def code_path(run: Path, given: Path | None) -> Path:
    return given or run / "codes.lvcodes"


def encode(settings: EncodeSettings) -> Path:
    """Write the code file and return its path. Memory doesn't grow with the count of images.

    Raises:
        InputError: no run, no images, impossible settings, or a damaged image (named).
        CodeFileError: another process writes the same file.
    """
    if settings.workers < 0:
        raise InputError(f"--workers must be at least 0, got {settings.workers}")
    if settings.faiss:
        require_faiss("--faiss")
    if settings.csv and not settings.fit:
        raise InputError("--csv writes uncertainties, which --no-fit leaves out")
    run = load_encoder(settings.run)
    on_error = run.on_error(settings.on_error)
    code = chosen_code(run, settings.bits, settings.code)
    source, names = image_set(settings.images)
    out = code_path(settings.run, settings.out)
    for path in filter(None, (out, settings.csv, settings.faiss)):
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder to write {path.name} to")
    encoder = fitted_encoder(run, settings, code, on_error)
    quantiser = encoder.quantiser
    writer = CodeWriter(
        out,
        family=run.settings.latent.family,
        bits=encoder.bits,
        checkpoint=run.digest,
        created_by=created_by(run),
        means=width_of_means(run) if settings.means else 0,
        uncertainty=encoder.density is not None,
        quantiser={"code": encoder.code, "sha256": quantiser.digest} if quantiser else None,
        source=identity(encoder, settings.images, names, on_error),
    )
    with writer:
        first = writer.position
        if first:
            tqdm.write(f"going on after {first:,} images", file=sys.stderr)
        batches = crops_of(run, source, on_error, settings.workers, np.arange(first, len(names)))
        with tqdm(total=len(names), initial=first, desc="encode", unit="img", disable=None) as bar:
            for part in encoder.coded(batches):
                found = [names[row] for row in part.rows]
                means = part.means if settings.means else None
                writer.append(part.codes, found, means, part.rows.tolist(), part.uncertainty)
                bar.update(int(part.rows[-1]) + 1 - bar.n)
    if encoder.density is None:  # what an earlier call left there needn't be of these images
        table_path(out, UNCERTAINTY).unlink(missing_ok=True)
    codes = open_codes(out)
    if settings.csv:
        write_uncertainties(settings.csv, codes)
    if settings.faiss:
        write_faiss(settings.faiss, codes.rows, quantiser)
    return out


def fitted_encoder(run: Run, settings: EncodeSettings, code: str, on_error: str) -> Encoder:
    """With density and quantiser, fitted where they are not there yet."""
    bits = settings.bits or own_bits(run)
    if not settings.fit:
        if code != "bits":
            raise InputError(f"--code {code} is fitted on the training images: leave --no-fit out")
        return Encoder(run, bits)
    images = TrainingImages(run, settings.train, settings.workers, on_error)
    density = density_of(images, settings.clusters)
    return Encoder(run, bits, code, quantiser_of(images, code, bits), density)


def write_uncertainties(path: Path, codes: CodeFile) -> None:
    """A row for each image: name, uncertainty."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["name", "uncertainty"])
    for name, value in zip(codes.names, open_uncertainty(codes).tolist()):
        rows.writerow([name, f"{value:.6g}"])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def search(settings: SearchSettings) -> Iterator[tuple[Query, list[Neighbour]]]:
    """Each query and its nearest images, nearest first.

    Raises:
        InputError: no run, an unreadable query, or k below 1.
        CodeFileError: no code file, a damaged one, or one of another checkpoint, of another quantiser or of
            another device's arithmetic; no means to rerank by.
    """
    if settings.k < 1:
        raise InputError(f"--k must be at least 1, got {settings.k}")
    searcher = Searcher(
        load_encoder(settings.run),
        code_path(settings.run, settings.codes),
        settings.symmetric,
        settings.staged,
        settings.rerank,
    )
    if settings.query.suffix != ".lvcodes":
        require_arithmetic(searcher.codes, searcher.run)
    for some in queries(searcher, settings):
        yield from zip(
            [Query(*one) for one in zip(some.names, some.uncertainty)], searcher.nearest(some, settings.k)
        )


class Queries(NamedTuple):
    names: list[str]
    codes: np.ndarray  # packed, uint8 [Q, bytes]
    means: np.ndarray  # of the posteriors, [Q, D]; D = 0 where they aren't asked for
    values: np.ndarray  # what the quantiser encodes, [Q, L]; L = 0 where there are codes alone
    uncertainty: list[float | None]


class Searcher:
    """A run and its codes, loaded once and searched again and again.

    `symmetric`, `staged`, `rerank`: as in SearchSettings. Raises CodeFileError: no code file, a damaged or
    empty one, of another checkpoint or quantiser, without means to rerank by; InputError: --staged or
    --rerank for a product code.
    """

    def __init__(
        self, run: Run, path: Path, symmetric: bool = False, staged: bool = False, again: bool = False
    ) -> None:
        self.run, self.codes = run, open_codes(path)
        require_checkpoint(self.codes, run.digest)
        if not self.codes.count:
            raise InputError(f"{path}: there are no codes in it to search")
        quantiser = stored_quantiser(run, self.codes)
        code = self.codes.quantiser["code"] if self.codes.quantiser else "bits"
        if (staged or again) and quantiser is not None and not quantiser.hamming:
            raise InputError("--staged and --rerank compare bits; these are product codes: leave them out")
        self.encoder = Encoder(run, self.codes.bits, code, quantiser, stored_density(run))
        self.symmetric, self.staged = symmetric or staged or again, staged
        self.means = open_means(self.codes) if again else None
        beside = table_path(path, UNCERTAINTY).exists()
        self.uncertainty = open_uncertainty(self.codes) if beside else None

    def queries(self, names: list[str], batches: Batches) -> Iterator[Queries]:
        """Images as queries, batch by batch; a batch's positions are those of its names."""
        for part in self.encoder.coded(batches):
            scores = [None] * len(part.rows) if part.uncertainty is None else part.uncertainty.tolist()
            yield Queries([names[row] for row in part.rows], part.codes, part.means, part.values, scores)

    def images(self, paths: list[Path], k: int) -> list[list[Neighbour]]:
        """The k nearest of each image file. Raises InputError for one that can't be read."""
        found = []
        for path in paths:
            crop = torch.from_numpy(centre_crop(self.run, decode_rgb(path))[None])
            for some in self.queries([str(path)], in_batches(crop)):
                found += self.nearest(some, k)
        return found

    def nearest(self, some: Queries, k: int) -> list[list[Neighbour]]:
        index = self.codes
        k = min(k, index.count)
        asked = min(max(10 * k, CANDIDATES), index.count) if self.means is not None else k
        real = some.values.shape[1] > 0 and not self.symmetric
        asking = some.values if real else some.codes
        rows, distances = nearest_rows(asking, index.rows, asked, self.encoder.quantiser, self.staged)
        cosines: np.ndarray | None = None
        if self.means is not None:
            rows, cosines = rerank(some.means, self.means, rows, k)
            distances = np.bitwise_count(some.codes[:, None] ^ index.rows[rows]).sum(axis=2, dtype=np.int32)
        found = []
        for i, of_query in enumerate(rows.tolist()):
            similarity = [None] * k if cosines is None else cosines[i].tolist()
            scores = [None] * k if self.uncertainty is None else self.uncertainty[rows[i]].tolist()
            columns = zip(of_query, distances[i].tolist(), similarity, scores)
            found.append([Neighbour(index.names[row], *rest) for row, *rest in columns])
        return found


def write_csv(path: Path, found: Iterable[tuple[Query, list[Neighbour]]]) -> int:
    """A row for each neighbour of each query; returns the number of queries."""
    text, count = io.StringIO(), 0
    writer = csv.writer(text)
    writer.writerow(["query", "rank", "name", "distance", "similarity", "uncertainty", "query_uncertainty"])
    for query, neighbours in found:
        count += 1
        for rank, near in enumerate(neighbours, 1):
            similarity = as_text(near.similarity, ".6f")
            scores = as_text(near.uncertainty, ".6g"), as_text(query.uncertainty, ".6g")
            distance = as_text(near.distance, "" if isinstance(near.distance, int) else ".6g")
            writer.writerow([query.name, rank, near.name, distance, similarity, *scores])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
    return count


def as_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_found(found: Iterable[tuple[Query, list[Neighbour]]]) -> None:
    """Each query with its uncertainty, and a table of its neighbours under it."""
    for query, neighbours in found:
        print(
            query.name, *([f"(uncertainty {query.uncertainty:.4g})"] if query.uncertainty is not None else [])
        )
        similar = any(near.similarity is not None for near in neighbours)
        scored = any(near.uncertainty is not None for near in neighbours)
        columns = ["similarity"] * similar + ["distance"] + ["uncertainty"] * scored
        print("  ".join(f"{name:>11}" for name in columns) + "  name")
        for near in neighbours:
            figures = [as_text(near.similarity, "11.4f")] * similar
            figures.append(format(near.distance, "11d" if isinstance(near.distance, int) else "11.4g"))
            figures += [as_text(near.uncertainty, "11.4g")] * scored
            print("  ".join(figures) + f"  {near.name}")


def queries(searcher: Searcher, settings: SearchSettings) -> Iterator[Queries]:
    """The queries, at most some QUERIES at a time: each time the whole file is read."""
    path, run = settings.query, searcher.run
    if path.suffix == ".lvcodes":
        yield from queries_of(open_codes(path), searcher)
    elif holds_many(path):
        source, names = image_set(path)
        batches = crops_of(run, source, run.on_error(settings.on_error))
        waiting: list[Queries] = []
        for part in searcher.queries(names, batches):
            waiting.append(part)
            if sum(len(some.names) for some in waiting) >= QUERIES:
                yield joined(waiting)
                waiting = []
        if waiting:
            yield joined(waiting)
    else:
        image = decode_rgb(path, keep=run.on_error(settings.on_error) == "keep")
        crop = torch.from_numpy(centre_crop(run, image)[None])
        yield from searcher.queries([str(path)], in_batches(crop))


def created_by(run: Run) -> str:
    """What a code file says of its making."""
    return f"lvssl encode, {run.arithmetic}"


def require_arithmetic(index: CodeFile, run: Run) -> None:
    """Raise CodeFileError if queries encoded here may differ in a few bits from codes of the same images.
    Files of the first releases don't say what made them."""
    if index.created_by.startswith("lvssl encode, ") and index.created_by != created_by(run):
        made = index.created_by.removeprefix("lvssl encode, ")
        raise CodeFileError(
            f"{index.path}: its codes were computed by {made}, queries would be by {run.arithmetic} here, "
            "and a few of their bits may differ: encode the images again here, or give queries encoded there "
            "(a .lvcodes)"
        )


def holds_many(path: Path) -> bool:
    """Whether a query is a set of images, or their codes, rather than an image."""
    return path.is_dir() or path.suffix in (".lvcodes", ".beton", ".tar", ".parquet", ".csv", ".jsonl")


def joined(parts: list[Queries]) -> Queries:
    return Queries(
        [name for part in parts for name in part.names],
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.means for part in parts]),
        np.concatenate([part.values for part in parts]),
        [score for part in parts for score in part.uncertainty],
    )


def queries_of(codes: CodeFile, searcher: Searcher) -> Iterator[Queries]:
    require_checkpoint(codes, searcher.run.digest)
    index = searcher.codes
    if (codes.bits, codes.quantiser) != (index.bits, index.quantiser):
        raise CodeFileError(
            f"{codes.path} has {in_words(codes)}, {index.path} {in_words(index)}: encode both alike"
        )
    none = np.empty((codes.count, 0), np.float32)
    means = open_means(codes) if searcher.means is not None else none
    beside = table_path(codes.path, UNCERTAINTY).exists()
    scores = open_uncertainty(codes) if beside else None
    for start in range(0, codes.count, QUERIES):
        part = slice(start, start + QUERIES)
        rows = np.asarray(codes.rows[part])
        of_part = [None] * len(rows) if scores is None else scores[part].tolist()
        yield Queries(list(codes.names[part]), rows, np.asarray(means[part]), none[part], of_part)


def in_words(codes: CodeFile) -> str:
    made = codes.quantiser
    return f"{codes.bits} bits" + (f" by {made['code']} {made['sha256'][:12]}" if made else "")


# ---------------------------------------------------------------------------------------- images


def image_set(path: Path) -> tuple[Reader, list[str]]:
    """A set of images and their names. Every image below a folder, in the order of their paths; else, and of
    a folder that has tars or parquet files instead, what `pipelines.decode` reads."""
    if path.is_file() and path.suffix.lower() in IMAGE_ENDINGS:
        raise InputError(
            f"{path}: a single image; give the folder that it is in, or `search` it with --query"
        )
    source = every_image(path) or open_reader(path)
    say_notes(source)
    return source, names_of(source, path)


def every_image(path: Path) -> Reader | None:
    """Those below a folder; None if there is none, but tars or parquet files, or if it is no folder."""
    if not path.is_dir():
        return None
    try:
        return ImageReader(path, labelled=False)
    except InputError:
        if any(any(path.glob(f"*{end}")) for end in (".tar", ".parquet")):
            return None
        raise


def crops_of(
    run: Run, source: Reader, on_error: str, workers: int = 0, rows: np.ndarray | None = None
) -> Batches:
    """Centre crops of those of the images (or of `rows`) that can be decoded, with a warning for each other
    one; or InputError, which names it."""
    try:
        yield from readable(source, run.settings.view, workers, on_error, rows, left_out=say_left_out)
    except DamagedSample as sample:
        raise InputError(f"{sample}; --on-error skip leaves such images out") from None


def say_left_out(reason: str) -> None:
    tqdm.write(f"warning: left out: {reason}", file=sys.stderr)


def names_of(source: Reader, path: Path) -> list[str]:
    """From the source or its manifest; positions where neither has any."""
    if hasattr(source, "names"):
        return list(source.names)
    manifest = manifest_path(path)
    if manifest.is_file():
        names = read_manifest(manifest)[1].get("name", [])
        if len(names) == len(source):
            return names
    return [str(i) for i in range(len(source))]


def identity(encoder: Encoder, images: Path, names: list[str], on_error: str) -> str:
    """Another one wherever the same position may mean another code or another uncertainty."""
    digest, run = hashlib.sha256(), encoder.run
    view = beyond_defaults(run.settings.view)
    file = None
    if images.is_file():
        stat = images.stat()
        file = [stat.st_size, stat.st_mtime_ns]
    fitted = [part and part.digest for part in (encoder.quantiser, encoder.density)]
    told = [str(images.resolve()), view, on_error, file, run.arithmetic, encoder.bits, fitted]
    digest.update(json.dumps(told, sort_keys=True).encode())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def centre_crop(run: Run, image: np.ndarray) -> np.ndarray:
    """The evaluation's crop of uint8 [H, W, 3], as from a beton: uint8 [R, R, 3]."""
    view = run.settings.view
    height, width = image.shape[:2]
    box = centre_boxes(np.array([height]), np.array([width]), view.evaluation_crop)[0, 0]
    out = np.empty((view.resolution, view.resolution, 3), np.uint8)
    resize_crop(np.ascontiguousarray(image), box, out)
    return out


def codes_of(run: Run, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the run's own codes, packed, uint8 [N, bytes], the posteriors' means float32 [N, D]) of crops uint8
    [N, R, R, 3]."""
    parts = list(Encoder(run, own_bits(run)).coded(in_batches(torch.from_numpy(crops))))
    return np.concatenate([part.codes for part in parts]), np.concatenate([part.means for part in parts])


def width_of_means(run: Run) -> int:
    side = run.settings.view.resolution
    return codes_of(run, np.zeros((1, side, side, 3), np.uint8))[1].shape[1]
