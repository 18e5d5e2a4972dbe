"""Outputs of a network for a set of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lvssl.latents.noise import keyed
from lvssl.models.inference import device_of, encode, in_batches
from lvssl.models.network import LVNet
from pipelines.kernels.pack import unpack_bits
from pipelines.views import ViewSettings


@dataclass(frozen=True)
class NetworkOutputs:
    """A network's outputs for N images; everything but `samples` is the same in every call."""

    features: np.ndarray  # float32 [N, F]
    bits: np.ndarray  # bool [N, bits], the deployed code
    mean: np.ndarray  # float32 [N, D], mean of the latent
    stages: np.ndarray  # float32 [N, S], mean activations after each stage of the backbone
    uncertainty: np.ndarray  # float32 [N], the family's uncertainty
    rate: np.ndarray  # float32 [N], KL to the prior in nats
    samples: np.ndarray  # float32 [K, N, D]; K = 0 if none were requested


def network_outputs(
    network: LVNet, images: torch.Tensor | np.ndarray, view: ViewSettings, samples: int = 0, seed: int = 0
) -> NetworkOutputs:
    """Return the outputs for crops uint8 [N, R, R, 3], or for views that are already normalised, float32 [N,
    3, R, R]."""
    count = samples if network.family.stochastic else 0
    parts = []
    for part in encode(network, in_batches(torch.as_tensor(images)), view):
        posterior = part.posterior
        bits = unpack_bits(part.codes(), network.family.code_bits(network.dim))
        drawn = posterior.mean()[None, :, :0]
        if count:
            noise = keyed(seed, torch.from_numpy(part.rows), device_of(network))
            drawn = posterior.sample(count, noise, network.latent.relaxation)
        values = (part.features, posterior.mean(), part.stages, posterior.uncertainty(), posterior.kl())
        parts.append((bits, *(value.float().cpu().numpy() for value in (*values, drawn))))
    code, h, mean, stages, uncertainty, rate = (np.concatenate(column) for column in list(zip(*parts))[:6])
    noisy = np.concatenate([values[6] for values in parts], axis=1)[:count]
    return NetworkOutputs(h, code.astype(bool), mean, stages, uncertainty, rate, noisy)
