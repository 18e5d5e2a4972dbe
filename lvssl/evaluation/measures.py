"""What a study measures of one run, and the equal-bit controls that are made of a deterministic one.

A measure has a value for each *method* by which it is obtained: a code's accuracy for each code, an
uncertainty's R-AUROC for each score. Which one is the strongest is decided over seeds
(`lvssl.evaluation.pairs`), not run by run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lvssl.codes.controls import CONTROLS, Coder
from lvssl.evaluation.embedding import Embedding
from lvssl.evaluation.factors import Factors, known_factors
from lvssl.evaluation.knn import hamming_knn, weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.regression import ridge_each
from lvssl.evaluation.retrieval import retrieval_map, similarity_map
from lvssl.evaluation.scorer import uncertainty
from lvssl.evaluation.sets import Sampling, Sets, embed_both
from lvssl.models.inference import device_of
from lvssl.models.network import latent_dim
from lvssl.runs.labels import sound_part
from lvssl.runs.run import Run
from lvssl.settings.pretrain import PretrainSettings
from pipelines.decode import Reader
from pipelines.kernels.pack import pack_bits, unpack_bits

FIRST = 1000  # n of mAP@n
HASHES = ("sign", "PCA + sign", "ITQ", "LSH")  # of lvssl.codes.controls, compared by Hamming distance
LABEL_FREE = ("posterior", "rate", "norm", "distance")  # scores of uncertainty that have seen no label
OF_LATENT = ("posterior", "rate")

# Measures of a run: name -> (what it says, whether higher is better).
MEASURES: dict[str, tuple[str, bool]] = {
    "features_linear": ("features, linear probe, %", True),
    "features_knn": ("features, kNN, %", True),
    "features_map": ("features, mAP@1000 over hits", True),
    "features_map_relevant": ("features, mAP@1000 over relevant", True),
    "code_linear": ("code, linear probe, %", True),
    "code_knn": ("code, Hamming kNN, %", True),
    "code_map": ("code, mAP@1000 over hits", True),
    "code_map_relevant": ("code, mAP@1000 over relevant", True),
    "code_shapes_r2": ("shapes' factors from the code, R²", True),
    "code_augmentation_r2": ("augmentation parameters from the code, R²", True),
    "recall_at_1": ("R@1", True),
    "r_auroc": ("R-AUROC, best label-free score", True),
    "aurc": ("AURC, best label-free score", False),
    "ood": ("AUROC against out-of-distribution images, best label-free score", True),
    "corruption": ("rank correlation with severity, best label-free score", True),
    "crop": ("share of crops less certain than the whole, best label-free score", True),
    "latent_r_auroc": ("R-AUROC, latent's own score", True),
    "latent_aurc": ("AURC, latent's own score", False),
    "latent_ood": ("AUROC against out-of-distribution images, latent's own score", True),
    "latent_corruption": ("rank correlation with severity, latent's own score", True),
    "latent_crop": ("share of crops less certain than the whole, latent's own score", True),
    "nll": ("NLL of the probe (of the latent's samples, if any)", False),
    "brier": ("Brier score of that probe", False),
    "ece": ("ECE of that probe", False),
}
OF_CODE = tuple(name for name in MEASURES if name.startswith("code_"))
OF_UNCERTAINTY = tuple(MEASURES)[tuple(MEASURES).index("r_auroc") :]  # and of the probe's confidence
OF_SCORES = ("r_auroc", "aurc", "ood", "corruption", "crop")

ByMethod = dict[str, float]  # method -> value


def code_bits(settings: PretrainSettings) -> int:
    """The bits of the code that such a run gives."""
    latent = settings.latent
    return latent.distribution.code_bits(latent_dim(settings.model, latent))


def measured(
    run: Run, train: Reader, test: Reader, test_path: Path, lengths: tuple[int, ...], sampling: Sampling
) -> dict[str, Any]:
    """`measures`: name -> ByMethod. `controls`, of a deterministic run: bits -> name of OF_CODE -> ByMethod,
    for each of `lengths`."""
    counts, on_error = (len(train), len(test)), run.on_error(sampling.on_error)
    embedded = embed_both(run, train, test, 0, on_error)
    train = sound_part(run.settings.data, train, embedded[0].rows)
    test = sound_part(test_path, test, embedded[1].rows)
    bits = embedded[1].bits
    sets = Sets.of(sampling, run, train, test)
    data = CodeEvaluationData(*embedded, known_factors(run, sets, sampling))
    of_features = accuracies_of_features(*embedded, device_of(run.network))
    controls, of_code = {}, {}
    if not run.network.family.stochastic:
        controls = {str(length): equal_bit(data, length) for length in lengths}
        of_code = controls.get(str(bits)) or equal_bit(data, bits)
    if run.network.family.own_code:
        own = of_one_code(data, lambda features, code: code, bits)
        of_code = {name: of_code.get(name, {}) | {"code": own[name]} for name in OF_CODE}
    analysed, _ = uncertainty(run, sets, sampling)
    return {
        "bits": bits,
        "features": embedded[1].features.shape[1],
        "rate_bits": embedded[1].rate_bits,
        "database": len(train),
        "queries": len(test),
        "skipped": {"train": counts[0] - len(train), "test": counts[1] - len(test)},
        "measures": of_features | of_code | of_scores(analysed),
        "controls": controls,
    }


def accuracies_of_features(train: Embedding, test: Embedding, device: torch.device) -> dict[str, ByMethod]:
    both = train.features, train.labels, test.features, test.labels
    score = similarity_map(test.features, test.labels, train.features, train.labels, FIRST)
    return {
        "features_linear": {"": linear_probe(*both).accuracy},
        "features_knn": {"": weighted_knn(*both, device=device)},
        "features_map": {"": score.over_hits},
        "features_map_relevant": {"": score.over_relevant},
    }


# Codes ----------------------------------------------------------------------------------------------------


class CodeEvaluationData(NamedTuple):
    """All that a code is judged on."""

    train: Embedding
    test: Embedding
    factors: dict[str, tuple[Factors, Factors]]


Coding = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # (features [N, F], the run's own code) -> packed bits


def equal_bit(data: CodeEvaluationData, bits: int) -> dict[str, ByMethod]:
    """The measures of the code for each of HASHES, fitted on the training features; empty if none has so many
    bits."""
    found: dict[str, ByMethod] = {}
    for method in HASHES:
        try:
            coder = CONTROLS[method](data.train.features, bits, 0)
        except ValueError:  # more bits than features
            continue
        for name, value in of_one_code(data, partial(encoded_by, coder), bits).items():
            found.setdefault(name, {})[method] = value
    return found


def encoded_by(coder: Coder, features: np.ndarray, own: np.ndarray) -> np.ndarray:
    return coder.encode(features)


def of_one_code(data: CodeEvaluationData, coding: Coding, bits: int) -> dict[str, float]:
    """OF_CODE of one code."""
    packed = [coding(s.features, s.codes) for s in (data.train, data.test)]
    labels = data.train.labels, data.test.labels
    x = [signs(p, bits) for p in packed]
    score = retrieval_map(packed[1], labels[1], packed[0], labels[0], FIRST)
    found = {
        "code_linear": linear_probe(x[0], labels[0], x[1], labels[1]).accuracy,
        "code_knn": hamming_knn(packed[0], labels[0], packed[1], labels[1], bits),
        "code_map": score.over_hits,
        "code_map_relevant": score.over_relevant,
    }
    for kind, parts in data.factors.items():
        x = [signs(coding(outputs.features, pack_bits(outputs.bits)), bits) for outputs, _ in parts]
        regressed = ridge_each(x[0], parts[0][1], x[1], parts[1][1])
        found[f"code_{kind}_r2"] = float(np.nanmean([r.r2 for r in regressed.values()]))
    return found


def signs(packed: np.ndarray, bits: int) -> np.ndarray:
    return 2 * unpack_bits(packed, bits).astype(np.float32) - 1


# Uncertainty ----------------------------------------------------------------------------------------------


def of_scores(analysed: dict[str, Any]) -> dict[str, ByMethod]:
    """The uncertainty's measures and the probe's, from `scorer.uncertainty`. A deterministic run has, in the
    place of a latent's own score, its strongest label-free one."""
    scores = {name: of_one_score(s) for name, s in analysed["scores"].items() if name in LABEL_FREE}
    own = {name: s for name, s in scores.items() if name in OF_LATENT} or scores
    found = {name: {method: s[name] for method, s in scores.items()} for name in OF_SCORES}
    found |= {f"latent_{name}": {method: s[name] for method, s in own.items()} for name in OF_SCORES}
    found["recall_at_1"] = {"": next(iter(analysed["scores"].values()))["recall_at_1"]}
    probe = "latent samples" if "latent samples" in analysed["probes"] else "features"
    return found | {name: {probe: analysed["probes"][probe][name]} for name in ("nll", "brier", "ece")}


def of_one_score(score: dict[str, float]) -> dict[str, float]:
    return {
        "r_auroc": score["r_auroc"],
        "aurc": score["aurc"],
        "ood": mean_of(score, "ood "),
        "corruption": mean_of(score, "rank "),
        "crop": score["crops less certain"],
    }


def mean_of(score: dict[str, float], prefix: str) -> float:
    return float(np.mean([value for name, value in score.items() if name.startswith(prefix)]))
