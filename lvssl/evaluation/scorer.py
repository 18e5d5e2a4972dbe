"""Uncertainty scores of a network, the posterior's own and the deterministic ones that it has to beat, and
how well they predict errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lvssl.codes.controls import standardised
from lvssl.evaluation.calibration import calibration, predictive_entropy
from lvssl.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from lvssl.evaluation.density import fit_density
from lvssl.evaluation.neighbours import unit
from lvssl.evaluation.outputs import NetworkOutputs, network_outputs
from lvssl.evaluation.probe import fit_probe
from lvssl.evaluation.sets import Sampling, Sets
from lvssl.evaluation.uncertainty import auroc, r_auroc, risk_coverage_area
from lvssl.models.backbone import stage_widths
from lvssl.runs.rows import FOREIGN
from lvssl.runs.run import Run
from pipelines.datasets.dataset import evenly_spaced

CORRUPTED = 500  # maximum number of test images that are corrupted (25 times each); each has a correlation


class Distance:
    """Cosine distance to the nearest training image, in features standardised by the training set. Of the
    distances that were tried, it tells best whether the neighbour is a wrong one (docs/uncertainty.md)."""

    def __init__(self, train: np.ndarray) -> None:
        self.z = standardised(train)[1:]
        self.train = unit(train, slice(None), self.z)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return distances float32 [N] in [0, 2] for features [N, F]."""
        h = unit(features, slice(None), self.z)
        return (1 - torch.cat([(part @ self.train.T).amax(dim=1) for part in h.split(512)])).numpy()


class UncertaintyScorer:
    """Predictions and uncertainty scores of one network, fitted on labelled training images."""

    def __init__(
        self, stochastic: bool, train: NetworkOutputs, labels: np.ndarray, widths: Sequence[int] = ()
    ) -> None:
        """Fit probes, distance and density; `widths` are those of the backbone's stages."""
        self.stochastic = stochastic
        self.probe = fit_probe(train.features, labels)
        self.latent_probe = fit_probe(train.mean, labels) if stochastic else None
        self.classes = self.probe.classes
        self.distance = Distance(train.features)
        self.density = fit_density(train.stages, widths)

    def predictions(self, outputs: NetworkOutputs) -> dict[str, np.ndarray]:
        """Return probabilities [N, C]: from features, from the latent's mean, averaged over its samples."""
        found = {"features": self.probe.probabilities(outputs.features)}
        if self.latent_probe is not None:
            found["latent mean"] = self.latent_probe.probabilities(outputs.mean)
            if len(outputs.samples):
                drawn = [self.latent_probe.probabilities(sample) for sample in outputs.samples]
                found["latent samples"] = np.mean(drawn, axis=0)
        return found

    def scores(self, outputs: NetworkOutputs) -> dict[str, np.ndarray]:
        """Return uncertainty scores [N] by name; higher means less certain.

        posterior: the family's own (entropy, or summed log-variance). rate: negative KL. samples: entropy of
        the prediction averaged over K samples. norm: negative norm of the features. distance: 1 - cosine to
        the nearest training image, of standardised features. density: negative log-density of the training
        images' activations. probe: entropy of the feature probe's prediction. Only `probe` and
        `samples` have seen labels.
        """
        predictions = self.predictions(outputs)
        found = {}
        if self.stochastic:
            found = {"posterior": outputs.uncertainty, "rate": -outputs.rate}
            if "latent samples" in predictions:
                found["samples"] = predictive_entropy(predictions["latent samples"])
        found["norm"] = -np.linalg.norm(outputs.features, axis=1)
        found["distance"] = self.distance(outputs.features)
        found["density"] = self.density(outputs.stages)
        found["probe"] = predictive_entropy(predictions["features"])
        return {name: np.asarray(score, np.float64) for name, score in found.items()}


def uncertainty(run: Run, sets: Sets, sampling: Sampling) -> tuple[dict[str, Any], NetworkOutputs]:
    """Return the metrics of every uncertainty score and the probes' calibration; and the test outputs."""
    network, view = run.network, run.settings.view

    def outputs(pixels: np.ndarray) -> NetworkOutputs:
        return network_outputs(network, pixels, view, sampling.samples, sampling.seed)

    widths = stage_widths(run.settings.model.backbone)
    scorer = UncertaintyScorer(network.family.stochastic, outputs(sets.train), sets.train_labels, widths)
    test = outputs(sets.test)
    predictions, scores = scorer.predictions(test), scorer.scores(test)
    wrong = scorer.classes[predictions["features"].argmax(axis=1)] != sets.test_labels
    rows = {}
    for name, score in scores.items():
        neighbours = r_auroc(test.features, sets.test_labels, score)
        rows[name] = neighbours._asdict() | {"aurc": risk_coverage_area(wrong, score)}
    for name, pixels in sets.out_of_distribution.items():
        far = scorer.scores(outputs(pixels))
        for key, row in rows.items():
            both = np.concatenate([scores[key], far[key]])
            row[FOREIGN + name] = auroc(np.arange(len(both)) >= len(sets.test), both)
    corrupted = evenly_spaced(len(sets.test), CORRUPTED)
    for kind in CORRUPTIONS:
        steps = [{name: score[corrupted] for name, score in scores.items()}] + [
            scorer.scores(outputs(corrupt(sets.test[corrupted], kind, severity, sampling.seed)))
            for severity in SEVERITIES
        ]
        for key, row in rows.items():
            values = np.stack([step[key] for step in steps])
            row[f"rank {kind}"] = severity_correlation(values)
            if kind == "crop":  # for crops the share is preferred to the rank correlation
                row["crops less certain"] = float((values[1:] > values[0]).mean())
    unseen = np.setdiff1d(sets.test_labels, scorer.classes)  # by the sample of the training images
    classes = np.concatenate([scorer.classes, unseen])
    calibrated = {
        name: calibration(np.pad(p, ((0, 0), (0, len(unseen)))), sets.test_labels, classes)._asdict()
        for name, p in predictions.items()
    }
    return {"scores": rows, "probes": calibrated}, test


def severity_correlation(scores: np.ndarray) -> float:
    """Return the mean over images of Spearman's correlation of score and severity, for scores [S, N] at
    severities 0..S-1; an image whose score never changes counts as 0.

    All images are computed at once from their ranks: scipy's spearmanr takes 400 times as long (67 ms for 500
    images), because it correlates every image with every other."""
    from scipy.stats import rankdata

    rank_SN = rankdata(scores, axis=0)
    rank_SN -= rank_SN.mean(axis=0)
    severity = np.arange(len(scores)) - (len(scores) - 1) / 2
    scale = np.sqrt((rank_SN**2).sum(axis=0) * (severity**2).sum())
    rho = np.where(scale > 0, (severity @ rank_SN) / np.where(scale > 0, scale, 1), 0.0)
    return float(rho.mean())
