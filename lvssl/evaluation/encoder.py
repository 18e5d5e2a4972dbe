"""Encode images with what is fitted on a run, and search codes: shared by `encode`, `search`, `curate` and
the Python interface.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lvssl.codes.file import (
    MEANS,
    UNCERTAINTY,
    CodeFile,
    CodeFileError,
    Table,
    open_codes,
    open_means,
    require_checkpoint,
    stored_uncertainty,
)
from lvssl.codes.index import nearest_rows
from lvssl.codes.quantiser import Quantiser
from lvssl.codes.search import rerank
from lvssl.codes.writer import CodeWriter
from lvssl.evaluation.density import Density, stored_density
from lvssl.evaluation.quantisers import stored_quantiser
from lvssl.models import inference
from lvssl.models.inference import Batches, in_batches
from lvssl.runs.labels import names_of, readable, say_notes
from lvssl.runs.run import Run
from lvssl.settings.fields import beyond_defaults
from pipelines.datasets.idx import is_idx
from pipelines.datasets.parquet import files_in
from pipelines.datasets.parts import files_of, is_by_name
from pipelines.datasets.recognise import ending_in
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.decode.images import ImageReader
from pipelines.decode.on_cpu import TABLES_AND_TARS
from pipelines.decode.pixels import decode_rgb
from pipelines.decode.resize import resize_crop
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.kernels.pack import pack_bits
from pipelines.parameters import centre_boxes
from pipelines.views import ViewSettings

QUERIES = 1024  # number of queries that are searched together
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
CANDIDATES = 100  # minimum number of candidates for `--rerank`


class Neighbour(NamedTuple):
    """An image found by a search.

    >>> model = lvssl.load("run")
    >>> nearest = model.search("photos/a/0.png", model.encode("photos"), k=1)[0][0]
    >>> nearest.name, nearest.distance
    ('a/0.png', 0)
    """

    name: str
    """Name of the encoded image."""
    distance: float
    """Distance to the query: Hamming distance for codes, squared Euclidean for real-valued queries."""
    similarity: float | None = None
    """Cosine similarity of the query and the vector that the code represents, or of posterior means."""
    uncertainty: float | None = None
    """Uncertainty in nats, if it was stored with the codes."""


class Query(NamedTuple):
    name: str
    uncertainty: float | None  # in nats, if the run has a density


class Coded(NamedTuple):
    """B encoded images."""

    rows: np.ndarray  # int64 [B], positions in the set
    codes: np.ndarray  # packed, uint8 [B, bytes]
    means: np.ndarray  # of the posteriors, float32 [B, D]
    values: np.ndarray  # input of the quantiser, float32 [B, L]; L = 0 without one
    uncertainty: np.ndarray | None  # float32 [B]
    thumbnails: np.ndarray | None = None  # uint8 [B, P], for `lvssl curate`


@dataclass(frozen=True)
class Encoder:
    """A run with the quantiser and density fitted on it: everything needed to encode images."""

    run: Run
    bits: int
    code: str = "bits"
    quantiser: Quantiser | None = None
    density: Density | None = None

    def coded(self, batches: Batches) -> Iterator[Coded]:
        run = self.run
        for part in inference.encode(run.network, batches, run.settings.view):
            values = np.empty((len(part.rows), 0), np.float32)
            if self.quantiser is not None:
                of = inference.locations(run.network, part) if self.code == "bits" else part.features
                values = of.float().cpu().numpy()
            if self.code == "bits" or self.quantiser is None:
                codes = pack_bits(part.posterior.code()[:, : self.bits])
            else:
                codes = self.quantiser.encode(values)
            means = part.posterior.mean().float().cpu().numpy()
            scores = self.density(part.stages.cpu().numpy()) if self.density else None
            yield Coded(part.rows, codes, means, values, scores)


def code_path(run: Path, given: Path | None) -> Path:
    return given or run / "codes.lvcodes"


class Queries(NamedTuple):
    names: list[str]
    codes: np.ndarray  # packed, uint8 [Q, bytes]
    means: np.ndarray  # of the posteriors, [Q, D]; D = 0 if they aren't needed
    values: np.ndarray  # input of the quantiser, [Q, L]; L = 0 if only codes are known
    uncertainty: list[float | None]


class Searcher:
    """A run and its codes, loaded once for many searches.

    `symmetric`, `staged` and `again` (`rerank`) are as in SearchSettings. Raises CodeFileError: no code file,
    or it is damaged, of another checkpoint or quantiser, or lacks the means for reranking; InputError: an
    empty code file, or --staged or --rerank with product codes.
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
            raise InputError(
                "--staged and --rerank compare bits, but these are product codes: leave them out"
            )
        self.encoder = Encoder(run, self.codes.bits, code, quantiser, stored_density(run))
        self.symmetric, self.staged = symmetric or staged or again, staged
        self.means = open_means(self.codes) if again else None
        self.uncertainty = stored_uncertainty(self.codes)

    def queries(self, names: list[str], batches: Batches) -> Iterator[Queries]:
        """Yield images as queries, batch by batch; the positions in a batch index `names`."""
        for part in self.encoder.coded(batches):
            scores = [None] * len(part.rows) if part.uncertainty is None else part.uncertainty.tolist()
            yield Queries([names[row] for row in part.rows], part.codes, part.means, part.values, scores)

    def image(self, path: Path, keep: bool = False) -> Queries:
        """Return an image file as a query; `keep` as in `decode_rgb`. Raises InputError if unreadable."""
        crop = torch.from_numpy(centre_crop(self.run.settings.view, decode_rgb(path, keep=keep))[None])
        return next(self.queries([str(path)], in_batches(crop)))

    def images(self, paths: list[Path], k: int) -> list[list[Neighbour]]:
        """Return the k nearest images of each image file. Raises InputError for one that can't be read."""
        return [near for path in paths for near in self.nearest(self.image(path), k)]

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
        quantiser = self.encoder.quantiser if real and cosines is None else None
        projected = None if quantiser is None else quantiser.project(some.values)
        found = []
        for i, of_query in enumerate(rows.tolist()):
            similarity: list[float | None] = [None] * k
            if cosines is not None:
                similarity = cosines[i].tolist()
            elif quantiser is not None and projected is not None:
                similarity = quantiser.cosines(projected[i], index.rows[of_query]).tolist()
            scores = [None] * k if self.uncertainty is None else self.uncertainty[rows[i]].tolist()
            columns = zip(of_query, distances[i].tolist(), similarity, scores)
            found.append([Neighbour(index.names[row], *rest) for row, *rest in columns])
        return found


def code_writer(
    encoder: Encoder,
    path: Path,
    means: int,
    source: str,
    beside: dict[Table, int] | None = None,
    of: str = "",
) -> CodeWriter:
    """Return a writer of these codes, and of uncertainties if there is a density. `means`: width of the means
    stored with the codes, or 0; `source`: from `identity`; `beside`: widths of further tables; `of`:
    what identifies the images, to be recorded."""
    run, quantiser = encoder.run, encoder.quantiser
    writer = CodeWriter(
        path,
        family=run.settings.latent.family,
        bits=encoder.bits,
        checkpoint=run.digest,
        created_by=created_by(run),
        beside={MEANS: means, UNCERTAINTY: int(encoder.density is not None)} | (beside or {}),
        quantiser={"code": encoder.code, "sha256": quantiser.digest} if quantiser else None,
        source=source,
    )
    if of:
        writer.header["of"] = of
    return writer


def write_coded(writer: CodeWriter, parts: Iterable[Coded], names: list[str], title: str) -> None:
    """Append the parts, which start at image `writer.position`, with a progress bar."""
    with tqdm(total=len(names), initial=writer.position, desc=title, unit="img", disable=None) as bar:
        for part in parts:
            means = part.means if MEANS in writer.tables else None
            found = [names[row] for row in part.rows]
            writer.append(part.codes, found, means, part.rows.tolist(), part.uncertainty, part.thumbnails)
            bar.update(int(part.rows[-1]) + 1 - bar.n)


def created_by(run: Run) -> str:
    """Return the `created_by` entry of a code file."""
    return f"lvssl encode, {run.arithmetic}"


def require_arithmetic(index: CodeFile, run: Run) -> None:
    """Raise CodeFileError if queries encoded here may differ in a few bits from codes of the same images.
    Files of the first releases don't record what made them and are accepted."""
    if index.created_by.startswith("lvssl encode, ") and index.created_by != created_by(run):
        made = index.created_by.removeprefix("lvssl encode, ")
        raise CodeFileError(
            f"{index.path}: its codes were computed by {made}, but queries would be by "
            f"{run.arithmetic} here, "
            "and a few of their bits may differ: encode the images again here, or pass queries encoded there "
            "(a .lvcodes)"
        )


def holds_many(path: Path) -> bool:
    """Return whether a query is a set of images or their codes, rather than a single image."""
    ends = (".beton", ".txt", *TABLES_AND_TARS)
    return path.is_dir() or holds_codes(path) or is_by_name(path) or path.suffix.lower() in ends


def holds_codes(path: Path) -> bool:
    """Return whether a query is a file of codes, judging by its name."""
    return path.suffix.lower() == ".lvcodes"


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
            f"{codes.path} has {in_words(codes)}, {index.path} {in_words(index)}: encode both in the same way"
        )
    none = np.empty((codes.count, 0), np.float32)
    means = open_means(codes) if searcher.means is not None else none
    scores = stored_uncertainty(codes)
    for start in range(0, codes.count, QUERIES):
        part = slice(start, start + QUERIES)
        rows = np.asarray(codes.rows[part])
        of_part = [None] * len(rows) if scores is None else scores[part].tolist()
        yield Queries(list(codes.names[part]), rows, np.asarray(means[part]), none[part], of_part)


def in_words(codes: CodeFile) -> str:
    made = codes.quantiser
    return f"{codes.bits} bits" + (f" by {made['code']} {made['sha256'][:12]}" if made else "")


def image_set(path: Path) -> tuple[Reader, list[str]]:
    """Open a set of images, with their names: all images below a folder, in the order of their paths, or else
    (also for a folder that has tars or parquet files instead) whatever `pipelines.decode` reads."""
    if path.is_file() and path.suffix.lower() in IMAGE_ENDINGS:
        raise InputError(f"{path}: a single image; pass its folder, or use `search --query`")
    source = every_image(path) or open_reader(path)
    say_notes(source)
    if isinstance(source, ImageReader) and path.is_dir() and source.split:
        print(f"note: {path}: only its split {source.split} is read", file=sys.stderr, flush=True)
    return source, names_or_numbers(source, path)


def every_image(path: Path) -> Reader | None:
    """Open the images below a folder; None if it has none, but tars or tables, or if it isn't a folder."""
    if not path.is_dir():
        return None
    try:
        return ImageReader(path, labelled=False)
    except InputError:
        if is_idx(path) or ending_in(path, ".tar") or files_in(path):
            return None
        raise


def crops_of(
    run: Run, source: Reader, on_error: str, workers: int = 0, rows: np.ndarray | None = None
) -> Batches:
    """Yield centre crops of the images (or of `rows`). An image that can't be decoded is left out with a
    warning, or raises InputError, which names it."""
    try:
        yield from readable(source, run.settings.view, workers, on_error, rows, left_out=say_left_out)
    except DamagedSample as sample:
        raise InputError(f"{sample}; --on-error skip leaves such images out") from None


def say_left_out(reason: str) -> None:
    tqdm.write(f"warning: left out: {reason}", file=sys.stderr)


def names_or_numbers(source: Reader, path: Path) -> list[str]:
    """Return the names of a set's images, or else their positions."""
    return names_of(source, path) or [str(i) for i in range(len(source))]


def identity(encoder: Encoder, images: Path, names: list[str], on_error: str) -> str:
    """Return a digest that changes whenever a position may get another code or another uncertainty."""
    digest, run = hashlib.sha256(), encoder.run
    view = beyond_defaults(run.settings.view)
    stats = [file.stat() for file in files_of(images) if file.is_file()]
    file = [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)] or None
    fitted = [part and part.digest for part in (encoder.quantiser, encoder.density)]
    told = [str(images.resolve()), view, on_error, file, run.arithmetic, encoder.bits, fitted]
    told += [jpeg.most_pixels] * (jpeg.most_pixels != jpeg.MAX_PIXELS)
    digest.update(json.dumps(told, sort_keys=True).encode())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def centre_crop(view: ViewSettings, image: np.ndarray) -> np.ndarray:
    """Return the evaluation crop of an image uint8 [H, W, 3], the same as from a beton: uint8 [R, R, 3]."""
    height, width = image.shape[:2]
    box = centre_boxes(np.array([height]), np.array([width]), view.evaluation_crop)[0, 0]
    out = np.empty((view.resolution, view.resolution, 3), np.uint8)
    resize_crop(np.ascontiguousarray(image), box, out, False)
    return out
