"""The score `density`: how far an image lies from all that the run was trained on.

    N  images   L  mean activations   K  clusters

Minus the log-density of a Gaussian fitted to the training images' activations after every stage of the
backbone, averaged over the pixels; with clusters, of a mixture of K Gaussians that share one covariance. The
covariance is that of Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance
matrices", of activations standardised by the training set. It needs no labels, and is there for every family,
a run without a latent included. Among Gaussians it ranks images as their Mahalanobis distance does (of every
layer: Lee et al. 2018; label-free: SSD, Sehwag et al. 2021). Of the posteriors' locations alone it is worse,
of ten clusters no better (docs/uncertainty.md).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import logsumexp

from lvssl.evaluation.fitted import FittedOn, keep, kept
from lvssl.runs.run import Run
from pipelines.errors import InputError

FILE = "density.safetensors"
OF = {"of": "stages"}  # the first releases' is of the posteriors' locations
CHUNK = 8192  # images at a time


@dataclass(frozen=True)
class Density:
    """sum_k weights[k] N(z | centres[k], covariance) of activations z, in coordinates in which the covariance
    is 1: there squared distances are squared Mahalanobis distances."""

    mean: np.ndarray  # float32 [L], of the training set
    whitening: np.ndarray  # float32 [L, L]: (z - mean) @ whitening has the covariance 1 within a cluster
    centres: np.ndarray  # float32 [K, L], there
    log_weights: np.ndarray  # float64 [K], with the normalisation of the Gaussians, in nats

    @property
    def digest(self) -> str:
        """sha256, hex."""
        return hashlib.sha256(b"".join(array.tobytes() for array in asdict(self).values())).hexdigest()

    def __call__(self, activations: np.ndarray) -> np.ndarray:
        """Minus the log-density in nats, float32 [N], of activations [N, L]; higher is less certain. Raises
        ValueError for another width."""
        if activations.ndim != 2 or activations.shape[1] != len(self.mean):
            raise ValueError(f"activations [N, {len(self.mean)}] are needed, not {list(activations.shape)}")
        found = np.empty(len(activations), np.float32)
        for start in range(0, len(activations), CHUNK):
            part = slice(start, start + CHUNK)
            white = (activations[part].astype(np.float32) - self.mean) @ self.whitening
            squares = [np.square(white - centre).sum(axis=1, dtype=np.float64) for centre in self.centres]
            found[part] = -logsumexp(self.log_weights - 0.5 * np.stack(squares, axis=1), axis=1)
        return found


def fit_density(sample: np.ndarray, clusters: int = 1, seed: int = 0) -> Density:
    """Of activations [M, L] of training images. Raises ValueError for fewer than two, or than clusters."""
    from sklearn.cluster import KMeans
    from sklearn.covariance import ledoit_wolf

    if sample.ndim != 2 or len(sample) < max(2, clusters) or clusters < 1:
        raise ValueError(f"{clusters} clusters need as many images [M, L], not {list(sample.shape)}")
    mean = sample.mean(axis=0, dtype=np.float64)
    scale = sample.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * scale.max(), scale, scale.max() or 1.0)  # constants stay
    z = ((sample - mean) / scale).astype(np.float32)
    member, centres = np.zeros(len(z), np.int64), np.zeros((1, z.shape[1]), np.float32)
    if clusters > 1:
        found = KMeans(clusters, n_init=1, random_state=seed).fit(z)
        member, centres = found.labels_, found.cluster_centers_
    covariance, _ = ledoit_wolf(z - centres[member], assume_centered=True)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values = np.maximum(values, np.finfo(np.float32).eps * (values.max() or 1.0))
    turn = vectors / np.sqrt(values)
    constant = 0.5 * (len(mean) * math.log(2 * math.pi) + np.log(values).sum()) + np.log(scale).sum()
    weights = np.bincount(member, minlength=len(centres)) / len(z)
    return Density(
        mean.astype(np.float32),
        (turn / scale[:, None]).astype(np.float32),
        (centres @ turn).astype(np.float32),
        np.log(weights) - constant,
    )


def density_of(images: FittedOn, clusters: int = 1) -> Density:
    """The run's density as RUN/density.safetensors has it; fitted and written there if it isn't there yet, or
    is of another checkpoint, of other images or of another number of clusters.

    Raises InputError: --clusters below 1, training images that can't be read, or fewer than clusters.
    """
    if clusters < 1:
        raise InputError(f"--clusters must be at least 1, got {clusters}")
    run = images.run
    path = run.folder / FILE
    about = OF | {"train": images.path.resolve(), "clusters": clusters}
    if arrays := kept(path, run, about):
        return Density(**arrays)
    sample = images.sample("stages")
    if len(sample) < clusters:
        raise InputError(f"--clusters {clusters} needs as many training images; there are {len(sample)}")
    density = fit_density(sample, clusters)
    keep(path, asdict(density), run, about)
    return density


def stored_density(run: Run) -> Density | None:
    """The density that stands in the run's folder, of whatever images; None if there is none of this
    checkpoint. Raises InputError for a damaged file."""
    arrays = kept(run.folder / FILE, run, OF)
    return Density(**arrays) if arrays else None
