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

from lvssl.codes.file import CodeFile, CodeFileError, open_codes, open_means, require_checkpoint
from lvssl.codes.search import hamming_search, rerank, staged_search
from lvssl.codes.writer import CodeWriter
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
from pipelines.parameters import centre_boxes

QUERIES = 1024  # searched together
CANDIDATES = 100  # that `--rerank` looks at, at least


@dataclass(frozen=True)
class EncodeSettings:
    """Write the packed code of every image of a set. Resumable: rerun the command after an interruption."""

    run: Positional[Path]
    """The run whose encoder is used."""
    images: Path
    """A folder of images, searched recursively, no labels needed; or a .beton, tars, a parquet ..."""
    out: Path | None = None
    """The code file; left out: RUN/codes.lvcodes."""
    means: bool = False
    """Store the posteriors' means beside it, too, as fp16: 16 times a code of bits, for `search --rerank`."""
    on_error: str | None = None
    """An image that can't be decoded: raise (stop and name it), or skip (leave it out, with a warning); left
    out: as in the pretraining."""
    workers: int = 0
    """Threads that decode; 0: the cores less two, 2 to 12."""


@dataclass(frozen=True)
class SearchSettings:
    """Find the images whose codes are nearest to those of one query or of many, by Hamming distance."""

    run: Positional[Path]
    """The run that made the codes."""
    query: Path
    """An image; or a folder, a .beton or a code file (.lvcodes), each image of which is a query."""
    codes: Path | None = None
    """The code file that is searched; left out: RUN/codes.lvcodes."""
    k: int = 10
    """Neighbours to show."""
    staged: bool = False
    """Compare 512 bits with all, and the rest with the nearest of them: faster, and may miss a neighbour."""
    rerank: bool = False
    """Put the nearest 10 k (100 at least) in the order of their posteriors' similarity (encode --means)."""
    on_error: str | None = None
    """A query in a folder or set that can't be decoded: raise, or skip; left out: as in the pretraining."""
    csv: Path | None = None
    """Write the neighbours there instead: query, rank, name, distance, and similarity with --rerank."""


class Neighbour(NamedTuple):
    name: str
    distance: int
    similarity: float | None = None  # cosine of the posteriors' means, where reranked


def code_path(run: Path, given: Path | None) -> Path:
    return given or run / "codes.lvcodes"


def encode(settings: EncodeSettings) -> Path:
    """Write the code file and return its path. Memory doesn't grow with the count of images.

    Raises:
        InputError: no run, no images, or a damaged image (named).
        CodeFileError: another process writes the same file.
    """
    if settings.workers < 0:
        raise InputError(f"--workers must be at least 0, got {settings.workers}")
    run = load_encoder(settings.run)
    skip = run.on_error(settings.on_error) == "skip"
    source, names = image_set(settings.images)
    out = code_path(settings.run, settings.out)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write the codes to")
    writer = CodeWriter(
        out,
        family=run.settings.latent.family,
        bits=run.network.family.code_bits(run.network.dim),
        checkpoint=run.digest,
        created_by=created_by(run),
        means=width_of_means(run) if settings.means else 0,
        source=identity(run, settings, names, skip),
    )
    with writer:
        first = writer.position
        if first:
            tqdm.write(f"going on after {first:,} images", file=sys.stderr)
        batches = crops_of(run, source, skip, settings.workers, np.arange(first, len(names)))
        with tqdm(total=len(names), initial=first, desc="encode", unit="img", disable=None) as bar:
            for rows, codes, means in coded(run, batches):
                found = [names[row] for row in rows]
                writer.append(codes, found, means if settings.means else None, rows.tolist())
                bar.update(int(rows[-1]) + 1 - bar.n)
    return out


def search(settings: SearchSettings) -> Iterator[tuple[str, list[Neighbour]]]:
    """(name of the query, its nearest images, nearest first) of every query.

    Raises:
        InputError: no run, an unreadable query, or k below 1.
        CodeFileError: no code file, a damaged one, or one of another checkpoint or of another device's
            arithmetic; no means to rerank by.
    """
    if settings.k < 1:
        raise InputError(f"--k must be at least 1, got {settings.k}")
    run = load_encoder(settings.run)
    index = open_codes(code_path(settings.run, settings.codes))
    require_checkpoint(index, run.digest)
    if settings.query.suffix != ".lvcodes":
        require_arithmetic(index, run)
    if not index.count:
        raise InputError(f"{index.path}: there are no codes in it to search")
    means = open_means(index) if settings.rerank else None
    for names, codes, query_means in queries(run, settings):
        k = min(settings.k, index.count)
        asked = min(max(10 * k, CANDIDATES), index.count) if settings.rerank else k
        find = staged_search if settings.staged else hamming_search
        rows, distances = find(codes, index.rows, asked)
        cosines = None
        if means is not None:
            rows, cosines = rerank(query_means, means, rows, k)
            distances = np.bitwise_count(codes[:, None] ^ index.rows[rows]).sum(axis=2, dtype=np.int32)
        for i, name in enumerate(names):
            similarity = [None] * k if cosines is None else cosines[i].tolist()
            found = zip(rows[i].tolist(), distances[i].tolist(), similarity)
            yield name, [Neighbour(index.names[row], *rest) for row, *rest in found]


def write_csv(path: Path, found: Iterable[tuple[str, list[Neighbour]]]) -> int:
    """A row for each neighbour of each query; returns the number of queries."""
    text, count = io.StringIO(), 0
    writer = csv.writer(text)
    writer.writerow(["query", "rank", "name", "distance", "similarity"])
    for query, neighbours in found:
        count += 1
        for rank, (name, distance, similarity) in enumerate(neighbours, 1):
            writer.writerow([query, rank, name, distance, "" if similarity is None else f"{similarity:.6f}"])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
    return count


class Queries(NamedTuple):
    names: list[str]
    codes: np.ndarray  # packed, uint8 [Q, bytes]
    means: np.ndarray  # of the posteriors, [Q, D]; D = 0 where they aren't asked for


def queries(run: Run, settings: SearchSettings) -> Iterator[Queries]:
    """The queries, at most some QUERIES at a time: each time the whole file is read."""
    path = settings.query
    if path.suffix == ".lvcodes":
        yield from queries_of(open_codes(path), run, settings.rerank)
    elif holds_many(path):
        waiting: list[Queries] = []
        for part in encoded(run, path, run.on_error(settings.on_error) == "skip"):
            waiting.append(part)
            if sum(len(some.names) for some in waiting) >= QUERIES:
                yield joined(waiting)
                waiting = []
        if waiting:
            yield joined(waiting)
    else:
        yield Queries([str(path)], *codes_of(run, centre_crop(run, decode_rgb(path))[None]))


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


def encoded(run: Run, path: Path, skip: bool) -> Iterator[Queries]:
    source, names = image_set(path)
    for rows, codes, means in coded(run, crops_of(run, source, skip)):
        yield Queries([names[row] for row in rows], codes, means)


def joined(parts: list[Queries]) -> Queries:
    names = [name for part in parts for name in part.names]
    return Queries(names, np.concatenate([p.codes for p in parts]), np.concatenate([p.means for p in parts]))


def queries_of(codes: CodeFile, run: Run, with_means: bool) -> Iterator[Queries]:
    require_checkpoint(codes, run.digest)
    means = open_means(codes) if with_means else np.empty((codes.count, 0))
    for start in range(0, codes.count, QUERIES):
        part = slice(start, start + QUERIES)
        yield Queries(list(codes.names[part]), np.asarray(codes.rows[part]), np.asarray(means[part]))


# ---------------------------------------------------------------------------------------- images


def image_set(path: Path) -> tuple[Reader, list[str]]:
    """A set of images and their names. Every image below a folder, in the order of their paths; else, and of
    a folder that has tars or parquet files instead, what `pipelines.decode` reads."""
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
    run: Run, source: Reader, skip: bool, workers: int = 0, rows: np.ndarray | None = None
) -> Batches:
    """Centre crops of those of the images (or of `rows`) that can be decoded, with a warning for each other
    one; or InputError, which names it."""
    on_error = "skip" if skip else "raise"
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


def identity(run: Run, settings: EncodeSettings, names: list[str], skip: bool) -> str:
    """Another one wherever the same position may mean another code."""
    digest = hashlib.sha256()
    view = beyond_defaults(run.settings.view)
    file = None
    if settings.images.is_file():
        stat = settings.images.stat()
        file = [stat.st_size, stat.st_mtime_ns]
    told = [str(settings.images.resolve()), view, skip, file, run.arithmetic]
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


def coded(run: Run, batches: Batches) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions int64 [B], packed codes uint8 [B, bytes] and the posteriors' means float32 [B, D] of each
    batch."""
    for part in inference.encode(run.network, batches, run.settings.view):
        yield part.rows, part.codes(), part.posterior.mean().float().cpu().numpy()


def codes_of(run: Run, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed codes uint8 [N, bytes], the posteriors' means float32 [N, D]) of crops uint8 [N, R, R, 3]."""
    _, codes, means = zip(*coded(run, in_batches(torch.from_numpy(crops))))
    return np.concatenate(codes), np.concatenate(means)


def width_of_means(run: Run) -> int:
    side = run.settings.view.resolution
    return codes_of(run, np.zeros((1, side, side, 3), np.uint8))[1].shape[1]
