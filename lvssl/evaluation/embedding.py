"""A network over a data set: features, codes and uncertainties of every image, without augmentation."""

from __future__ import annotations

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

LARGE_SET = 200_000  # images from which on what is exact would take too much memory and time
VERSION = 1  # of what the arrays of a store mean
SIDE = 32  # pixels to which images are shrunk that stand for themselves


@dataclass(frozen=True)
class Embedding:
    """N images as a network sees them; the arrays may be mapped files."""

    features: np.ndarray  # float32 [N, F]
    codes: np.ndarray  # uint8 [N, ceil(bits / 8)], packed
    bits: int
    uncertainty: np.ndarray  # float32 [N], grows with the posterior's scale
    rate_bits: float  # mean KL to the prior
    labels: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N], positions in the set: all, unless damaged images are skipped
    bit_means: np.ndarray | None  # float32 [N, bits], P(bit = 1), where the code is drawn bit by bit

    @classmethod
    def of(cls, network: LVNet, arrays: Arrays, labels: np.ndarray) -> Embedding:
        """Of what `batches_of` gave, joined, and the labels of the whole set."""
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
    network: LVNet,
    source: Reader,
    view: ViewSettings,
    workers: int = 0,
    on_error: str = "raise",
) -> Embedding:
    """Every image of the source, in its order, in eval mode: the same image gives the same row in any set.
    In memory, and computed anew: see `embedded`."""
    batches = list(batches_of(network, readable(source, view, workers, on_error), view))
    joined = {name: np.concatenate([arrays[name] for _, arrays in batches]) for name in batches[0][1]}
    joined["rows"] = np.concatenate([rows for rows, _ in batches])
    return Embedding.of(network, joined, source.labels)


def embedded(
    run: Run, source: Reader, workers: int = 0, on_error: str = "raise", title: str = ""
) -> Embedding:
    """As `embed` with the run's network, from the run's store of features, RUN/features, which is filled
    first where it doesn't hold them: on from where a kill left it, and together with other processes.

    From LARGE_SET images on without bit_means.
    """
    store, compute = store_of(run, source, workers, on_error, title)
    with naming(store.folder):
        store.fill(compute)
    arrays = store.open()
    left_out = np.setdiff1d(np.arange(len(source)), arrays["rows"])
    if len(left_out) and on_error == "raise":
        list(compute(left_out))  # which names the first of them
    return Embedding.of(run.network, arrays, source.labels)


def help_to_embed(run: Run, source: Reader, workers: int = 0, on_error: str = "raise") -> None:
    """Compute those parts of what `embedded` needs that no other process computes: a rank but the first."""
    store, compute = store_of(run, source, workers, on_error, "")
    store.fill(compute, to_the_end=False)


def store_of(run: Run, source: Reader, workers: int, on_error: str, title: str) -> tuple[Store, Compute]:
    """Where a run keeps its features of a set, and what computes them."""
    view, means = run.settings.view, len(source) < LARGE_SET
    key: dict[str, Any] = {
        "version": VERSION,
        "checkpoint": run.digest,
        "set": describe_set(source),
        "view": asdict(view),
        "arithmetic": run.arithmetic,
        "decoder": getattr(getattr(source, "source", source), "decoder", ""),
    }
    if on_error == "keep":  # which images are read
        key["on_error"] = on_error
    if jpeg.most_pixels != jpeg.MAX_PIXELS:
        key["max_pixels"] = jpeg.most_pixels

    def compute(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Arrays]]:
        part = f"{title}, from {rows[0]:,} of {len(source):,}" if title and len(source) > PART else title
        return batches_of(run.network, readable(source, view, workers, on_error, rows, part), view, means)

    return Store.beside(run.folder / "features", key, len(source)), compute


def bytes_an_image(width: int, bits: int, images: int) -> int:
    """What such a store takes for each of its images at most: features of that width, a code, two scores, a
    position, and where there are fewer than LARGE_SET images the means of the bits."""
    return 4 * width + -(-bits // 8) + 4 + 4 + 8 + (4 * bits if images < LARGE_SET else 0)


def batches_of(
    network: LVNet, batches: Batches, view: ViewSettings, means: bool = True
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Of each batch of crops: positions, and the arrays that an Embedding is made of."""
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

    For the random encoder: untrained running statistics would make it worse than it is.
    """
    batches = readable(source, view, workers, on_error)
    update_bn(on_device(batches, view, device_of(network)), network.backbone)


def pixels(source: Reader, view: ViewSettings, workers: int = 0, on_error: str = "raise") -> np.ndarray:
    """Evaluation crops as vectors, at most SIDE px a side, float32 [N, D]; one channel if all are grey."""
    batches = readable(source, view, workers, on_error)
    values = torch.cat([shrink(crops.permute(0, 3, 1, 2) / 255, SIDE) for crops, _ in batches])
    if bool((values - values[:, :1]).abs().max() < 1e-5):
        values = values[:, :1]
    return values.flatten(1).numpy()


def shrink(images: Tensor, side: int) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(images, side) if images.shape[-1] > side else images.contiguous()
