"""A network over a data set: features, codes and uncertainties of every image, without augmentation."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from lvssl.models.inference import device_of, encode, on_device
from lvssl.models.network import LVNet
from lvssl.runs.labels import readable
from pipelines.decode import Reader
from pipelines.loader import evaluation_batches
from pipelines.views import ViewSettings


@dataclass(frozen=True)
class Embedding:
    """N images as a network sees them."""

    features: np.ndarray  # float32 [N, F]
    codes: np.ndarray  # uint8 [N, ceil(bits / 8)], packed
    bits: int
    uncertainty: np.ndarray  # float32 [N], grows with the posterior's scale
    rate_bits: float  # mean KL to the prior
    labels: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N], positions in the set: all, unless damaged images are skipped
    bit_means: np.ndarray | None  # float32 [N, bits], P(bit = 1), where the code is drawn bit by bit


def embed(
    network: LVNet,
    source: Reader,
    view: ViewSettings,
    workers: int = 0,
    on_error: str = "raise",
    title: str = "",
) -> Embedding:
    """Every image of the source, in its order, in eval mode: the same image gives the same row in any set.

    `on_error`, `title`: as `readable`'s.
    """
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("rows", "features", "codes", "uncertainty", "kl", "means")
    }
    for part in encode(network, readable(source, view, workers, on_error, title=title), view):
        posterior = part.posterior
        parts["rows"].append(part.rows)
        parts["features"].append(part.features.float().cpu().numpy())
        parts["codes"].append(part.codes())
        parts["uncertainty"].append(posterior.uncertainty().cpu().numpy())
        parts["kl"].append(posterior.kl().cpu().numpy())
        if (means := posterior.bit_means()) is not None:
            parts["means"].append(means.cpu().numpy())
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    return Embedding(
        joined["features"],
        joined["codes"],
        network.family.code_bits(network.dim),
        joined["uncertainty"],
        float(joined["kl"].mean() / np.log(2)),
        source.labels[joined["rows"]],
        joined["rows"],
        joined.get("means"),
    )


@torch.no_grad()
def calibrate_batch_statistics(network: LVNet, source: Reader, view: ViewSettings, workers: int = 0) -> None:
    """Replace every batch normalisation's running statistics by their averages over the source.

    For the random encoder: untrained running statistics would make it worse than it is.
    """
    layers = [m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    network.train()
    for images, _ in on_device(evaluation_batches(source, view, workers=workers), view, device_of(network)):
        network.backbone(images)
    network.eval()


def pixels(source: Reader, view: ViewSettings, workers: int = 0, side: int = 32) -> np.ndarray:
    """Evaluation crops as vectors, at most 32 px a side, float32 [N, D]; one channel if all are grey."""
    batches = evaluation_batches(source, view, workers=workers)
    values = torch.cat([shrink(crops.permute(0, 3, 1, 2) / 255, side) for crops, _ in batches])
    if bool((values - values[:, :1]).abs().max() < 1e-5):
        values = values[:, :1]
    return values.flatten(1).numpy()


def shrink(images: Tensor, side: int) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(images, side) if images.shape[-1] > side else images.contiguous()
