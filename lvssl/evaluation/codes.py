"""Encode a set of images, and search codes for the nearest images of queries."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lvssl.codes.file import MAGIC, MEANS, UNCERTAINTY, CodeFile, open_codes, open_uncertainty, path_beside
from lvssl.codes.index import write_faiss
from lvssl.evaluation.density import density_of
from lvssl.evaluation.embedding_codes import EmbeddingEncoder
from lvssl.evaluation.encoder import (
    QUERIES,
    Encoder,
    Neighbour,
    Queries,
    Query,
    Searcher,
    centre_crop,
    code_path,
    code_writer,
    crops_of,
    holds_codes,
    holds_many,
    identity,
    image_set,
    joined,
    queries_of,
    require_arithmetic,
    write_coded,
)
from lvssl.evaluation.fitted import TrainingEmbeddings, TrainingImages
from lvssl.evaluation.quantisers import (
    QUANTISER,
    chosen_code,
    code_of_length,
    keep_quantiser,
    own_bits,
    quantiser_of,
    require_faiss,
)
from lvssl.evaluation.sets import picture, picture_view
from lvssl.runs.embeddings import is_embeddings, open_embeddings, require_same_width, training_file
from lvssl.runs.run import Run, load_encoder
from lvssl.settings.apply import EncodeSettings, SearchSettings
from lvssl.settings.pretrain import at_least
from pipelines.datasets.parts import files_of
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.files import begins_with, may_replace, written_csv
from pipelines.formats.manifest import manifest_path
from pipelines.loader import Replacements

# What each output is, and how it begins: a file that begins otherwise isn't replaced by it.
OF_UNCERTAINTIES = ["name", "uncertainty"]
OF_NEIGHBOURS = ["query", "rank", "name", "distance", "similarity", "uncertainty", "query_uncertainty"]
KINDS = {
    "--out": ("a code file", (MAGIC,)),
    "--csv": ("a table of uncertainties or neighbours", (b"name,uncertainty", b"query,rank,name,")),
    "--faiss": ("an index of faiss", (b"Ix", b"IB")),
    "--page": ("a page", (b"<!doctype html>",)),
}


def encode(settings: EncodeSettings) -> Path:
    """Write the code file and return its path. Memory doesn't grow with the number of images.

    Raises:
        InputError: no such run or images, impossible settings, or a damaged image (named).
        CodeFileError: another process is writing the same file.
    """
    at_least(settings, workers=0)
    if settings.faiss:
        require_faiss("--faiss")
    if settings.csv and not settings.fit:
        raise InputError("--csv writes uncertainties, which --no-fit doesn't compute")
    out = code_path(settings.run, settings.out)
    foreign = is_embeddings(settings.run)
    if foreign and settings.run.is_file():
        out = settings.out or settings.run.with_suffix(".lvcodes")
    require_outputs(
        {"--out": out, "--csv": settings.csv, "--faiss": settings.faiss},
        [settings.images, settings.train, settings.run],
    )
    encoder = of_embeddings(settings, out) if foreign else of_images(settings, out)
    if encoder.density is None:  # the file that an earlier call left may be of other images
        path_beside(out, UNCERTAINTY.ending).unlink(missing_ok=True)
    codes = open_codes(out)
    keep_quantiser(encoder.run, codes, encoder.quantiser)
    if settings.csv:
        write_uncertainties(settings.csv, codes)
    if settings.faiss:
        write_faiss(settings.faiss, codes.rows, encoder.quantiser)
    return out


def of_embeddings(settings: EncodeSettings, out: Path) -> EmbeddingEncoder:
    """Encode embeddings into `out`, with their row numbers as names, and return the encoder."""
    if settings.means or not settings.fit or not settings.bits:
        raise InputError(
            "embeddings have neither a code nor a posterior: pass --bits, but not --means or --no-fit"
        )
    known = open_embeddings(settings.train or training_file(settings.run), labelled=False)
    asked = open_embeddings(settings.images, labelled=False)
    code = code_of_length(settings.bits, settings.code, known.features.shape[1], 0, len(known.features))
    require_same_width(known, asked)
    train = TrainingEmbeddings(known)
    quantiser = quantiser_of(train, code, settings.bits)
    assert quantiser is not None
    encoder = EmbeddingEncoder(known, code, quantiser, density_of(train))
    encoder.write(out, asked)
    return encoder


def of_images(settings: EncodeSettings, out: Path) -> Encoder:
    """Encode images into `out` with a run's encoder, and return the encoder."""
    run = load_encoder(settings.run)
    on_error = run.reading(settings)
    images = TrainingImages(run, settings.train, settings.workers, on_error, noted=settings.images)
    asked = images.count if settings.bits and settings.code == "auto" else None
    code = chosen_code(run, settings.bits, settings.code, asked)
    source, names = image_set(settings.images)
    encoder = fitted_encoder(settings, code, images)
    means = run.network.dim if settings.means else 0
    with code_writer(encoder, out, means, identity(encoder, settings.images, names, on_error)) as writer:
        first = writer.position
        if first:
            tqdm.write(f"resuming after {first:,} images", file=sys.stderr)
        batches = crops_of(run, source, on_error, settings.workers, np.arange(first, len(names)))
        write_coded(writer, encoder.coded(batches), names, "encode")
    return encoder


def fitted_encoder(settings: EncodeSettings, code: str, images: TrainingImages) -> Encoder:
    """Return the encoder with its density and quantiser, fitting those that don't exist yet."""
    run = images.run
    bits = settings.bits or own_bits(run)
    if not settings.fit:
        if code != "bits":
            raise InputError(f"--code {code} is fitted on the training images: leave out --no-fit")
        return Encoder(run, bits)
    density = density_of(images)
    return Encoder(run, bits, code, quantiser_of(images, code, bits), density)


def write_uncertainties(path: Path, codes: CodeFile) -> None:
    """Write a row for each image: name, uncertainty."""
    with written_csv(path) as table:
        table.writerow(OF_UNCERTAINTIES)
        for name, value in zip(codes.names, open_uncertainty(codes).tolist()):
            table.writerow([name, f"{value:.6g}"])


def require_outputs(outputs: dict[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise InputError if an output, given by its option, can't be a file, if it is also another output or a
    file that is read, or if it would replace a file of another kind, such as one of the images."""
    given = [path for path in inputs if path is not None]
    files = [each for path in given for each in files_of(path)]
    read = {path.resolve() for path in (*given, *files, *map(manifest_path, files))}
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        require_folder_of(path)
        place = path.resolve()
        if place in read:
            raise InputError(f"{option} {path}: this file is read; write to another")
        if place in written:
            raise InputError(f"{option} {path}: {written[place]} writes the same file; choose another")
        kind, starts = KINDS[option]
        if not begins_with(path, starts):
            raise InputError(f"{option} {path}: exists and isn't {kind}; choose another")
        beside = [path_beside(path, ending) for ending in (MEANS.ending, UNCERTAINTY.ending, QUANTISER)]
        written |= {one.resolve(): option for one in (path, *(beside if option == "--out" else []))}


def require_folder_of(path: Path) -> None:
    """Raise InputError if the folder of an output doesn't exist, or if a folder is where the file should be:
    before the work, not when its result is written."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if not may_replace(path):
        raise InputError(f"{path}: is not a regular file; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder to write {path.name} to")


def searcher_of(settings: SearchSettings) -> Searcher:
    """Load the run and the codes that the settings name.

    Raises:
        InputError: no such run, k below 1, or an output in no folder.
        CodeFileError: no code file, a damaged one, one of another checkpoint or quantiser, or no means.
    """
    at_least(settings, k=1)
    if settings.csv and settings.page:
        raise InputError("--csv and --page each write the neighbours to a file: pass one of them")
    if settings.images and not settings.page:
        raise InputError("--images are those that --page shows: pass --page FILE as well")
    run, path = load_encoder(settings.run), code_path(settings.run, settings.codes)
    require_outputs({"--csv": settings.csv, "--page": settings.page}, [path, settings.query, settings.images])
    return Searcher(run, path, settings.symmetric, settings.staged, settings.rerank)


def search(
    settings: SearchSettings, searcher: Searcher | None = None
) -> Iterator[tuple[Query, list[Neighbour]]]:
    """Yield each query with its nearest images, nearest first. `searcher`: that of the settings, if open.

    Raises as `searcher_of` does, and InputError: an unreadable query; CodeFileError: codes computed with the
    arithmetic of another device.
    """
    searcher = searcher or searcher_of(settings)
    if not holds_codes(settings.query):
        require_arithmetic(searcher.codes, searcher.run)
    for some in queries(searcher, settings):
        yield from zip(
            [Query(*one) for one in zip(some.names, some.uncertainty)], searcher.nearest(some, settings.k)
        )


def write_csv(path: Path, found: Iterable[tuple[Query, list[Neighbour]]]) -> int:
    """Write a row for each neighbour of each query; return the number of queries."""
    count = 0
    with written_csv(path) as table:
        table.writerow(OF_NEIGHBOURS)
        for query, neighbours in found:
            count += 1
            for rank, near in enumerate(neighbours, 1):
                similarity = as_text(near.similarity, ".6f")
                scores = as_text(near.uncertainty, ".6g"), as_text(query.uncertainty, ".6g")
                distance = as_text(near.distance, "" if isinstance(near.distance, int) else ".6g")
                table.writerow([query.name, rank, near.name, distance, similarity, *scores])
    return count


def pictured(
    run: Run, settings: SearchSettings, found: list[tuple[Query, list[Neighbour]]]
) -> Iterator[tuple[str, np.ndarray, list[tuple[str, float, np.ndarray]]]]:
    """Yield the name and picture of each query, and the name, distance and picture of each of its neighbours.
    Pictures are uint8 [S, S, 3], see `picture_view`.

    Raises InputError if the images of the codes, or of queries that are codes, can't be read.
    """
    on_error = run.reading(settings)
    database = Pictures(run, settings.images or run.settings.data, on_error)
    many, coded = holds_many(settings.query), holds_codes(settings.query)
    asked = Pictures(run, settings.query, on_error) if many and not coded else database
    for query, neighbours in found:
        if many:
            image = asked[query.name]
        else:
            pixels = decode_rgb(settings.query, keep=on_error == "keep")
            image = centre_crop(picture_view(run.settings.view, [min(pixels.shape[:2])]), pixels)
        yield query.name, image, [(near.name, near.distance, database[near.name]) for near in neighbours]


class Pictures:
    """The pictures of a set, by name."""

    def __init__(self, run: Run, path: Path, on_error: str) -> None:
        self.run, self.path = run, path
        source, names = image_set(path)
        self.images = Replacements(source, on_error)
        self.position = {name: position for position, name in enumerate(names)}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.position:
            raise InputError(
                f"{self.path}: doesn't contain {name}: pass the images that were encoded, by --images"
            )
        return picture(self.images, self.run.settings.view, self.position[name])


def as_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_found(found: Iterable[tuple[Query, list[Neighbour]]]) -> None:
    """Print each query with its uncertainty, followed by a table of its neighbours."""
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
    """Yield the queries in parts of about QUERIES, because each search reads the whole code file."""
    path, run = settings.query, searcher.run
    if holds_codes(path):
        yield from queries_of(open_codes(path), searcher)
    elif holds_many(path):
        source, names = image_set(path)
        batches = crops_of(run, source, run.reading(settings))
        waiting: list[Queries] = []
        for part in searcher.queries(names, batches):
            waiting.append(part)
            if sum(len(some.names) for some in waiting) >= QUERIES:
                yield joined(waiting)
                waiting = []
        if waiting:
            yield joined(waiting)
    else:
        yield searcher.image(path, keep=run.reading(settings) == "keep")
