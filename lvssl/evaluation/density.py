"""The score `density`: how far an image lies from the images that the run was trained on.

    N  images   L  mean activations, concatenated over the stages

A Gaussian is fitted to the training images' activations after each stage of the backbone, averaged over the
pixels. The score is the negative log-density per dimension, averaged over the stages, so that the early
stages count as much as the wider late ones. The covariance is the estimator of Ledoit & Wolf (2004), "A
well-conditioned estimator for large-dimensional covariance matrices", on activations standardised by the
training set. The score needs no labels and exists for every family, including runs without a latent. A single
Gaussian ranks images as their Mahalanobis distance does (on every layer: Lee et al. 2018; without labels:
SSD, Sehwag et al. 2021). Alternatives that were tried and lost: docs/uncertainty.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lvssl.evaluation.fitted import FittedOn, keep, kept
from lvssl.evaluation.knn import WHY_NOT_FINITE
from lvssl.models.backbone import stage_widths
from lvssl.runs.run import Run

FILE = "density.safetensors"
OF = {"of": "stages"}  # the density of earlier versions is one of the posteriors' locations
CHUNK = 8192  # images at a time


@dataclass(frozen=True)
class Density:
    """One Gaussian per stage, in coordinates in which a squared distance is the squared Mahalanobis distance
    per dimension, averaged over the stages."""

    mean: np.ndarray  # float32 [L], of the training set
    whitening: np.ndarray  # float32 [L, L], block-diagonal
    constant: np.ndarray  # float64 [1], negative log-density at the mean

    @property
    def digest(self) -> str:
        """sha256 of the arrays, in hex."""
        return hashlib.sha256(b"".join(array.tobytes() for array in asdict(self).values())).hexdigest()

    def __call__(self, activations: np.ndarray) -> np.ndarray:
        """Return the negative log-density of activations [N, L], in nats per dimension, float32 [N]; higher
        means less certain. Raises ValueError for another width."""
        if activations.ndim != 2 or activations.shape[1] != len(self.mean):
            raise ValueError(f"activations [N, {len(self.mean)}] are needed, not {list(activations.shape)}")
        found = np.empty(len(activations), np.float32)
        for start in range(0, len(activations), CHUNK):
            part = slice(start, start + CHUNK)
            white = (activations[part].astype(np.float32) - self.mean) @ self.whitening
            found[part] = self.constant + 0.5 * np.square(white).sum(axis=1, dtype=np.float64)
        return found


def fit_density(sample: np.ndarray, widths: Sequence[int] = ()) -> Density:
    """Fit to activations [M, L] of training images, from stages of these widths (by default, a single stage).
    Raises ValueError for fewer than two images, FloatingPointError for values that are not finite."""
    if sample.ndim != 2 or len(sample) < 2:
        raise ValueError(f"at least two images [M, L] are needed, not {list(sample.shape)}")
    if not np.isfinite(sample).all():
        raise FloatingPointError(f"activations of the training set are not finite: {WHY_NOT_FINITE}")
    ends = np.cumsum(widths or [sample.shape[1]])
    whitening, constant = np.zeros((sample.shape[1],) * 2, np.float32), 0.0
    for part in (slice(end - width, end) for end, width in zip(ends, np.diff(ends, prepend=0))):
        of_stage, own = fit_gaussian(sample[:, part])
        whitening[part, part] = of_stage / math.sqrt(len(of_stage) * len(ends))
        constant += own / (len(of_stage) * len(ends))
    return Density(sample.mean(axis=0, dtype=np.float64).astype(np.float32), whitening, np.array([constant]))


def fit_gaussian(sample: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (whitening [L, L], negative log-density at the mean) of a sample [M, L]."""
    from sklearn.covariance import ledoit_wolf

    mean, scale = sample.mean(axis=0, dtype=np.float64), sample.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * scale.max(), scale, scale.max() or 1.0)  # constants aren't scaled up
    covariance, _ = ledoit_wolf(((sample - mean) / scale).astype(np.float32), assume_centered=True)
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values = np.maximum(values, np.finfo(np.float32).eps * (values.max() or 1.0))
    constant = 0.5 * (len(mean) * math.log(2 * math.pi) + np.log(values).sum()) + np.log(scale).sum()
    return vectors / np.sqrt(values) / scale[:, None], float(constant)


def density_of(images: FittedOn) -> Density:
    """Return the run's density from RUN/density.safetensors. It is fitted and saved first if the file is
    missing or belongs to another checkpoint or to other images. Raises InputError for unreadable images."""
    run = images.run
    path = run.folder / FILE
    if arrays := kept(path, run, OF, images):
        return Density(**arrays)
    widths = stage_widths(run.settings.model.backbone) if isinstance(run, Run) else ()
    density = fit_density(images.sample("stages"), widths)
    keep(path, asdict(density), run, OF | images.about)
    return density


def stored_density(run: Run) -> Density | None:
    """Return the density saved in the run's folder, whichever images it was fitted to; None if there is none
    of this checkpoint. Raises InputError for a damaged file."""
    arrays = kept(run.folder / FILE, run, OF)
    return Density(**arrays) if arrays else None
