"""A network's reading of pixels, and the scores of its (un)certainty: the posterior's own, and the
deterministic ones that it has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lvssl.evaluation.calibration import predictive_entropy
from lvssl.evaluation.probe import fit_probe
from lvssl.latents.noise import keyed
from lvssl.models.inference import device_of, encode, in_batches
from lvssl.models.network import LVNet
from pipelines.kernels.pack import unpack_bits
from pipelines.views import ViewSettings

NEIGHBOURS = 20  # of the distance score


@dataclass(frozen=True)
class Reading:
    """N images as a network reads them; everything but `samples` is the same at every call."""

    features: np.ndarray  # float32 [N, F]
    bits: np.ndarray  # bool [N, bits], the deployed code
    mean: np.ndarray  # float32 [N, D], of the latent
    spread: np.ndarray  # float32 [N], the family's uncertainty
    rate: np.ndarray  # float32 [N], KL to the prior in nats
    samples: np.ndarray  # float32 [K, N, D]; K = 0 where none were asked for


def read(
    network: LVNet, images: torch.Tensor | np.ndarray, view: ViewSettings, samples: int = 0, seed: int = 0
) -> Reading:
    """The reading of crops uint8 [N, R, R, 3], or of views that are normalised already, float32
    [N, 3, R, R]."""
    count = samples if network.family.stochastic else 0
    parts = []
    for part in encode(network, in_batches(torch.as_tensor(images)), view):
        posterior = part.posterior
        bits = unpack_bits(part.codes(), network.family.code_bits(network.dim))
        drawn = posterior.mean()[None, :, :0]
        if count:
            noise = keyed(seed, torch.from_numpy(part.rows), device_of(network))
            drawn = posterior.sample(count, noise, network.latent.relaxation)
        values = (part.features, posterior.mean(), posterior.uncertainty(), posterior.kl(), drawn)
        parts.append((bits, *(value.float().cpu().numpy() for value in values)))
    code, h, mean, spread, rate = (np.concatenate(column) for column in list(zip(*parts))[:5])
    noisy = np.concatenate([values[5] for values in parts], axis=1)[:count]
    return Reading(h, code.astype(bool), mean, spread, rate, noisy)


class Certainty:
    """Predictions and uncertainty scores of one network, fitted on labelled training images."""

    def __init__(self, stochastic: bool, train: Reading, labels: np.ndarray) -> None:
        self.stochastic = stochastic
        self.probe = fit_probe(train.features, labels)
        self.latent_probe = fit_probe(train.mean, labels) if stochastic else None
        self.classes = self.probe.classes
        self.train = F.normalize(torch.from_numpy(train.features), dim=1)

    def predictions(self, reading: Reading) -> dict[str, np.ndarray]:
        """Class probabilities [N, C]: from h; from the latent's mean; averaged over its K samples (METHOD,
        "classification")."""
        found = {"features": self.probe.probabilities(reading.features)}
        if self.latent_probe is not None:
            found["latent mean"] = self.latent_probe.probabilities(reading.mean)
            if len(reading.samples):
                drawn = [self.latent_probe.probabilities(sample) for sample in reading.samples]
                found["latent samples"] = np.mean(drawn, axis=0)
        return found

    def scores(self, reading: Reading) -> dict[str, np.ndarray]:
        """Uncertainty [N] by name; higher means less certain.

        posterior: the family's own (entropy, or summed log-variance). rate: minus the KL. samples: entropy of
        the prediction averaged over K samples. norm: minus the feature's norm. distance: 1 - mean cosine to
        the 20 nearest training images. probe: entropy of the feature probe's prediction, which, unlike the
        others, has seen labels; so has `samples`.
        """
        predictions = self.predictions(reading)
        found = {}
        if self.stochastic:
            found = {"posterior": reading.spread, "rate": -reading.rate}
            if "latent samples" in predictions:
                found["samples"] = predictive_entropy(predictions["latent samples"])
        found["norm"] = -np.linalg.norm(reading.features, axis=1)
        found["distance"] = self.distance(reading.features)
        found["probe"] = predictive_entropy(predictions["features"])
        return {name: np.asarray(score, np.float64) for name, score in found.items()}

    def distance(self, features: np.ndarray) -> np.ndarray:
        h = F.normalize(torch.from_numpy(features), dim=1)
        k = min(NEIGHBOURS, len(self.train))
        near = [(part @ self.train.T).topk(k, dim=1).values.mean(dim=1) for part in h.split(512)]
        return (1 - torch.cat(near)).numpy()


def severity_correlation(scores: np.ndarray) -> float:
    """Mean over images of Spearman's correlation of score and severity, for scores [S, N] at severities
    0..S-1; an image whose score never changes counts as 0."""
    from scipy.stats import rankdata

    rank_SN = rankdata(scores, axis=0)
    rank_SN -= rank_SN.mean(axis=0)
    severity = np.arange(len(scores)) - (len(scores) - 1) / 2
    scale = np.sqrt((rank_SN**2).sum(axis=0) * (severity**2).sum())
    rho = np.where(scale > 0, (severity @ rank_SN) / np.where(scale > 0, scale, 1), 0.0)
    return float(rho.mean())
