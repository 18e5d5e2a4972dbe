"""Inference: the one path from crops to features, posteriors and codes.

Everything that reads images with a trained network goes through `infer`: embeddings, code files, probes,
predictions, analyses, calibration. The same crops therefore give the same numbers everywhere, to the last bit
in batches of the same size; in batches of another size, sums may be rounded differently.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from lvssl.latents.posterior import Posterior
from lvssl.models.backbone import stage_means
from lvssl.models.network import LVNet
from pipelines.kernels.pack import pack_bits
from pipelines.loader import sent
from pipelines.normalise import normalise
from pipelines.views import ViewSettings

T = TypeVar("T")
# Crops uint8 [B, R, R, 3], or views that are already normalised, float [B, 3, R, R]; and their positions in
# the set, int64 [B].
Batches = Iterable[tuple[Tensor, np.ndarray]]
BATCH = 256


class Encoded(NamedTuple):
    """What a network computes from B images."""

    rows: np.ndarray  # int64 [B], positions in the set
    features: Tensor  # [B, F], in the network's precision and on its device
    stages: Tensor  # float32 [B, S], the mean activations of every stage of the backbone
    posterior: Posterior

    def codes(self) -> np.ndarray:
        """The deployed codes, packed: uint8 [B, ceil(bits / 8)]."""
        return pack_bits(self.posterior.code())


def encode(network: LVNet, batches: Batches, view: ViewSettings) -> Iterator[Encoded]:
    """Yield what a network computes from each batch, without gradients, in eval mode."""

    def encoded(images: Tensor) -> tuple[Tensor, Posterior, Tensor]:
        # The precision is the network's, not that of a caller's autocast; and the hooks are for one call, as
        # the next may come from another thread.
        with torch.autocast(images.device.type, enabled=False), stage_means(network.backbone) as means:
            features, posterior = network.encode(images)
        return features, posterior, torch.cat(means, dim=1)

    for (features, posterior, stages), rows in infer(network, batches, view, encoded):
        yield Encoded(rows, features, stages, posterior)


def locations(network: LVNet, part: Encoded) -> Tensor:
    """Return the posteriors' locations [B, L]: the family's normalised parameters (logits, means), without
    those of the scale; for a network without a latent, the features."""
    return part.posterior.parameters[:, : network.family.location_count(network.dim)]


def infer(
    model: nn.Module, batches: Batches, view: ViewSettings, function: Callable[[Tensor], T]
) -> Iterator[tuple[T, np.ndarray]]:
    """Yield function(images) and the images' positions for each batch, without gradients, in eval mode.

    `function` applies the model or parts of it to normalised images [B, 3, R, R] on the model's device.
    """
    model.eval()
    for images, rows in on_device(batches, view, device_of(model)):
        with torch.no_grad():
            found = function(images)
        yield found, rows


def on_device(
    batches: Batches, view: ViewSettings, device: torch.device
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield the batches on the device, normalised."""
    for images, rows in batches:
        there = sent(images, device)
        yield there if there.is_floating_point() else normalise(there, view), rows


def in_batches(images: Tensor, size: int = BATCH) -> Batches:
    """Split images in memory, [N, ...], into batches, in their order."""
    starts = range(0, len(images), size)
    return ((part, np.arange(start, start + len(part))) for start, part in zip(starts, images.split(size)))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
