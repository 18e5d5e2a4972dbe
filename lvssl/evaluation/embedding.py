"""Embed a data set with a network: features, codes and uncertainties of every image, without augmentation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import update_bn

from lvssl.models.inference import Batches, device_of, encode, on_device
from lvssl.models.network import LVNet
from lvssl.runs.features import PART, Arrays, Compute, Store
from lvssl.runs.identity import describe_set
from lvssl.runs.labels import readable
from lvssl.runs.run import Run
from pipelines.decode import Reader
from pipelines.files import naming
from pipelines.formats import jpeg
from pipelines.views import ViewSettings

LARGE_SET = 200_000  # from this many images on, exact methods would take too much memory and time
VERSION = 1  # version of the meaning of a store's arrays
SIDE = 32  # pixels to which images are shrunk when pixels serve as features


@dataclass(frozen=True)
class Embedding:
    """A network's outputs for N images; the arrays may be memory-mapped."""

    features: np.ndarray  # float32 [N, F]
    codes: np.ndarray  # uint8 [N, ceil(bits / 8)], packed
    bits: int
    uncertainty: np.ndarray  # float32 [N], grows with the posterior's scale
    rate_bits: float  # mean KL to the prior
    labels: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N], positions in the set; all of them unless damaged images are skipped
    bit_means: np.ndarray | None  # float32 [N, bits], P(bit = 1), if the code is drawn bit by bit

    @classmethod
    def of(cls, network: LVNet, arrays: Arrays, labels: np.ndarray) -> Embedding:
        """Create it from the joined arrays of `batches_of` and the labels of the whole set."""
        return cls(
            arrays["features"],
            arrays["codes"],
            network.family.code_bits(network.dim),
            arrays["uncertainty"],
            float(arrays["kl"].mean() / np.log(2)),
            labels[arrays["rows"]],
            arrays["rows"],
            arrays.get("bit_means"),
        )


def embed(
    network: LVNet, source: Reader, view: ViewSettings, workers: int = 0, on_error: str = "raise"
) -> Embedding:
    """Embed every image of the source in order, in eval mode: an image gives the same row in any set.
    Everything is computed anew and held in memory; see `embedded`."""
    batches = list(batches_of(network, readable(source, view, workers, on_error), view))
    joined = {name: np.concatenate([arrays[name] for _, arrays in batches]) for name in batches[0][1]}
    joined["rows"] = np.concatenate([rows for rows, _ in batches])
    return Embedding.of(network, joined, source.labels)


def embedded(
    run: Run, source: Reader, workers: int = 0, on_error: str = "raise", title: str = ""
) -> Embedding:
    """Embed with the run's network, as `embed` does, but read the outputs from the run's store, RUN/features.
    What the store lacks is computed first: interrupted calls are resumed, and processes share the work. If an
    image that was left out can be read by now, the store is made anew.

    There are no bit_means for sets of LARGE_SET images or more.
    """
    store, compute = store_of(run, source, workers, on_error, title)
    with naming(store.folder):
        store.fill(compute)
    arrays = store.open()
    left_out = np.setdiff1d(np.arange(len(source)), arrays["rows"])
    # With on_error="raise", computing them raises, naming the first.
    if len(left_out) and next(iter(compute(left_out)), None) is not None:
        shutil.rmtree(store.folder, ignore_errors=True)  # they can be read by now
        if not store.whole:
            return embedded(run, source, workers, on_error, title)
    return Embedding.of(run.network, arrays, source.labels)


def help_to_embed(run: Run, source: Reader, workers: int = 0, on_error: str = "raise") -> None:
    """Compute the parts for `embedded` that no other process computes; for all ranks but the first."""
    store, compute = store_of(run, source, workers, on_error, "")
    store.fill(compute, to_the_end=False)


def store_of(run: Run, source: Reader, workers: int, on_error: str, title: str) -> tuple[Store, Compute]:
    """Return the run's store of features for a set, and the function that computes them."""
    view, means = run.settings.view, len(source) < LARGE_SET
    key: dict[str, Any] = {
        "version": VERSION,
        "checkpoint": run.digest,
        "set": describe_set(source),
        "view": asdict(view),
        "arithmetic": run.arithmetic,
        "decoder": getattr(getattr(source, "source", source), "decoder", ""),
    }
    if on_error == "keep":  # changes which images can be read
        key["on_error"] = on_error
    if jpeg.most_pixels != jpeg.MAX_PIXELS:
        key["max_pixels"] = jpeg.most_pixels

    def compute(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Arrays]]:
        part = f"{title}, from {rows[0]:,} of {len(source):,}" if title and len(source) > PART else title
        return batches_of(run.network, readable(source, view, workers, on_error, rows, part), view, means)

    return Store.beside(run.folder / "features", key, len(source)), compute


def bytes_an_image(width: int, bits: int, images: int) -> int:
    """Return the maximum number of bytes per image in such a store: features of that width, a code, two
    scores, a position and, for fewer than LARGE_SET images, the means of the bits."""
    return 4 * width + -(-bits // 8) + 4 + 4 + 8 + (4 * bits if images < LARGE_SET else 0)


def batches_of(
    network: LVNet, batches: Batches, view: ViewSettings, means: bool = True
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Yield for each batch of crops the positions and the arrays of an Embedding."""
    for part in encode(network, batches, view):
        posterior = part.posterior
        arrays = {
            "features": part.features.float(),
            "uncertainty": posterior.uncertainty(),
            "kl": posterior.kl(),
        }
        if means and (of_bits := posterior.bit_means()) is not None:
            arrays["bit_means"] = of_bits
        yield part.rows, {name: a.cpu().numpy() for name, a in arrays.items()} | {"codes": part.codes()}


def calibrate_batch_statistics(
    network: LVNet, source: Reader, view: ViewSettings, workers: int = 0, on_error: str = "raise"
) -> None:
    """Replace every batch normalisation's running statistics by their averages over the source.

    Used for the random encoder, which would be worse than it is with untrained running statistics.
    """
    batches = readable(source, view, workers, on_error)
    update_bn(on_device(batches, view, device_of(network)), network.backbone)


def pixels(source: Reader, view: ViewSettings, workers: int = 0, on_error: str = "raise") -> np.ndarray:
    """Return evaluation crops, at most SIDE pixels a side, as float32 [N, D]; one channel if all are grey."""
    batches = readable(source, view, workers, on_error)
    values = torch.cat([shrink(crops.permute(0, 3, 1, 2) / 255, SIDE) for crops, _ in batches])
    if bool((values - values[:, :1]).abs().max() < 1e-5):
        values = values[:, :1]
    return values.flatten(1).numpy()


def shrink(images: Tensor, side: int) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(images, side) if images.shape[-1] > side else images.contiguous()
