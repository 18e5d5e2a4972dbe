"""Codes of a folder of images, and the nearest images of a query."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import Positional

from lvssl.codes.file import CodeWriter, open_codes, require_checkpoint
from lvssl.codes.pack import pack_bits
from lvssl.codes.search import hamming_search
from lvssl.evaluation.embedding import device_of
from lvssl.training.run import Run, load_run
from pipelines.augment.cpu import statistics
from pipelines.convert.readers import decode_rgb, list_images
from pipelines.errors import InputError
from pipelines.parameters import centre_boxes
from pipelines.resize import resize_crop

BATCH = 64


@dataclass(frozen=True)
class EncodeSettings:
    """Write the packed code of every image of a folder."""

    run: Positional[Path]
    """The run whose encoder is used."""
    images: Path
    """A folder of images, searched recursively; no labels needed."""
    out: Path | None = None
    """The code file; left out: RUN/codes.lvcodes."""
    skip_damaged: bool = False
    """Leave out images that can't be decoded, with a warning, instead of stopping."""


@dataclass(frozen=True)
class SearchSettings:
    """Find the images whose codes are nearest to a query image's, by Hamming distance."""

    run: Positional[Path]
    """The run that made the codes."""
    query: Path
    """An image file."""
    codes: Path | None = None
    """The code file; left out: RUN/codes.lvcodes."""
    k: int = 10
    """Neighbours to show."""


def code_path(run: Path, given: Path | None) -> Path:
    return given or run / "codes.lvcodes"


def encode(settings: EncodeSettings) -> Path:
    """Write the code file and return its path. Memory doesn't grow with the count of images.

    Raises:
        InputError: no run, no images, or a damaged image (named); no file is left behind then.
    """
    run = load_run(settings.run)
    files = list_images(settings.images)
    out = code_path(settings.run, settings.out)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write the codes to")
    family = run.network.family
    writer = CodeWriter(
        out,
        family=run.settings.latent.family,
        bits=family.code_bits(run.network.dim),
        checkpoint=run.digest,
        created_by="lvssl encode",
    )
    with writer, tqdm(total=len(files), desc="encode", unit="img", disable=None) as bar:
        for batch in batches(decoded(run, files, settings.skip_damaged)):
            names = [str(path.relative_to(settings.images)) for path, _ in batch]
            writer.append(codes_of(run, np.stack([crop for _, crop in batch])), names)
            bar.update(len(batch))
    return out


def search(settings: SearchSettings) -> list[tuple[str, int]]:
    """(name, Hamming distance) of the nearest images, nearest first.

    Raises:
        InputError: no run, an unreadable query, or k below 1.
        CodeFileError: no code file, a damaged one, or one of another checkpoint.
    """
    if settings.k < 1:
        raise InputError(f"--k must be at least 1, got {settings.k}")
    run = load_run(settings.run)
    codes = open_codes(code_path(settings.run, settings.codes))
    require_checkpoint(codes, run.digest)
    query = codes_of(run, centre_crop(run, decode_rgb(settings.query))[None])
    rows, distances = hamming_search(query, codes.rows, min(settings.k, codes.count))
    return [
        (codes.names[int(row)], int(distance)) for row, distance in zip(rows[0], distances[0], strict=True)
    ]


def decoded(run: Run, files: list[Path], skip_damaged: bool) -> Iterator[tuple[Path, np.ndarray]]:
    for path in files:
        try:
            yield path, centre_crop(run, decode_rgb(path))
        except InputError as error:
            if not skip_damaged:
                raise InputError(f"{error}; --skip-damaged leaves such images out") from None
            tqdm.write(f"warning: left out: {error}", file=sys.stderr)


def batches(items: Iterator[tuple[Path, np.ndarray]]) -> Iterator[list[tuple[Path, np.ndarray]]]:
    while batch := list(islice(items, BATCH)):
        yield batch


def centre_crop(run: Run, image: np.ndarray) -> np.ndarray:
    """The evaluation's crop of uint8 [H, W, 3], as from a beton: uint8 [R, R, 3]."""
    view = run.settings.view
    height, width = image.shape[:2]
    box = centre_boxes(np.array([height]), np.array([width]), view.evaluation_crop)[0, 0]
    out = np.empty((view.resolution, view.resolution, 3), np.uint8)
    resize_crop(np.ascontiguousarray(image), box, out)
    return out


@torch.no_grad()
def codes_of(run: Run, crops: np.ndarray) -> np.ndarray:
    """Packed codes uint8 [N, bytes] of crops uint8 [N, R, R, 3]."""
    view = run.settings.view
    mean, std = statistics(view)
    images = (crops.astype(np.float32) / 255 - mean) / std
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(device_of(run.network))
    _, posterior = run.network.encode(batch)
    return pack_bits(posterior.code())
