"""A network over images: the one way from crops to features, posteriors and codes.

Whatever reads images with a trained network goes through `infer`: embeddings, code files, probes,
predictions, analyses, calibration. So the same crops give the same numbers everywhere, to the last bit in
batches of the same size; in batches of another size a sum may be rounded otherwise.
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
# Crops uint8 [B, R, R, 3], or views that are normalised already, float [B, 3, R, R]; and their positions in
# the set, int64 [B].
Batches = Iterable[tuple[Tensor, np.ndarray]]
BATCH = 256


class Encoded(NamedTuple):
    """B images as a network sees them."""

    rows: np.ndarray  # int64 [B], positions in the set
    features: Tensor  # [B, F], in the network's precision and on its device
    stages: Tensor  # float32 [B, S], the mean activations of every stage of the backbone
    posterior: Posterior

    def codes(self) -> np.ndarray:
        """The deployed codes, packed: uint8 [B, ceil(bits / 8)]."""
        return pack_bits(self.posterior.code())


def encode(network: LVNet, batches: Batches, view: ViewSettings) -> Iterator[Encoded]:
    """What a network sees in each batch, without gradients, in eval mode."""
    with stage_means(network.backbone) as means:
        for (features, posterior), rows in infer(network, batches, view, network.encode):
            yield Encoded(rows, features, torch.cat(means, dim=1), posterior)


def locations(network: LVNet, part: Encoded) -> Tensor:
    """The posteriors' locations [B, L]: the family's normalised parameters without those of the scale
    (logits, means); the features of a network without a latent."""
    return part.posterior.parameters[:, : network.family.location_count(network.dim)]


def infer(
    model: nn.Module, batches: Batches, view: ViewSettings, function: Callable[[Tensor], T]
) -> Iterator[tuple[T, np.ndarray]]:
    """function(images) of each batch, and the images' positions; without gradients, in eval mode.

    `function`: of the model or its parts, on normalised images [B, 3, R, R] on the model's device.
    """
    model.eval()
    for images, rows in on_device(batches, view, device_of(model)):
        with torch.no_grad():
            found = function(images)
        yield found, rows


def on_device(
    batches: Batches, view: ViewSettings, device: torch.device
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The batches there, normalised."""
    for images, rows in batches:
        there = sent(images, device)
        yield there if there.is_floating_point() else normalise(there, view), rows


def in_batches(images: Tensor, size: int = BATCH) -> Batches:
    """Images that lie in memory, [N, ...], in their order."""
    starts = range(0, len(images), size)
    return ((part, np.arange(start, start + len(part))) for start, part in zip(starts, images.split(size)))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
