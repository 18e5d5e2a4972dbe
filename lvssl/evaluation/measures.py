"""Measures of a single run for a study, and equal-bit controls made from a deterministic run.

Measurements are rows (`lvssl.runs.rows`). A measure is what arms are compared in; it has a value for each
*method* that obtains it: a code's accuracy for each code, an uncertainty's R-AUROC for each score. The
strongest method is chosen over all seeds (`lvssl.evaluation.pairs`), not run by run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lvssl.codes.controls import CONTROLS, Coder
from lvssl.evaluation.embedding import Embedding
from lvssl.evaluation.factors import Factors, known_factors
from lvssl.evaluation.knn import hamming_knn, weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.quantisers import has_faiss
from lvssl.evaluation.regression import ridge_each
from lvssl.evaluation.retrieval import retrieval_map, similarity_map
from lvssl.evaluation.scorer import uncertainty
from lvssl.evaluation.sets import Sampling, Sets, a_sample, embed_both
from lvssl.evaluation.streamed import Bits
from lvssl.models.inference import device_of
from lvssl.models.network import latent_dim
from lvssl.runs.labels import sound_part
from lvssl.runs.rows import FOREIGN, Point, Row, rows_of_points
from lvssl.runs.run import Run
from lvssl.settings.pretrain import PretrainSettings
from pipelines.decode import Reader
from pipelines.kernels.pack import pack_bits

FIRST = 1000  # n of mAP@n
SCORES = 2  # version of the uncertainty scores; a study repeats measurements of other versions
HASHES = ("sign", "PCA + sign", "ITQ", "LSH")  # from lvssl.codes.controls, compared by Hamming distance
EQUAL_BIT = (*HASHES, "OPQ")  # OPQ needs faiss
LABEL_FREE = ("posterior", "rate", "norm", "distance", "density")  # scores that have seen no labels
OF_LATENT = ("posterior", "rate")


class Measure(NamedTuple):
    """A quantity in which arms are compared: the rows of a representation and a metric."""

    says: str
    higher: bool  # whether higher is better
    representation: str
    metric: str
    own_score: bool = False  # for an uncertainty: only the latent's own scores


def of_uncertainty(own_score: bool) -> dict[str, Measure]:
    by = "latent's own score" if own_score else "best label-free score"
    says = {
        "r_auroc": ("R-AUROC", True),
        "aurc": ("AURC", False),
        "ood": ("AUROC against out-of-distribution images", True),
        "corruption": ("rank correlation with severity", True),
        "crop": ("share of crops less certain than the whole", True),
    }
    prefix = "latent_" if own_score else ""
    return {
        f"{prefix}{metric}": Measure(f"{what}, {by}", higher, "uncertainty", metric, own_score)
        for metric, (what, higher) in says.items()
    }


MEASURES: dict[str, Measure] = {
    "features_linear": Measure("features, linear probe, %", True, "features", "linear"),
    "features_knn": Measure("features, kNN, %", True, "features", "knn"),
    "features_map": Measure("features, mAP@1000 over hits", True, "features", "map_over_hits"),
    "features_map_relevant": Measure(
        "features, mAP@1000 over relevant", True, "features", "map_over_relevant"
    ),
    "code_linear": Measure("code, linear probe, %", True, "code", "linear"),
    "code_knn": Measure("code, Hamming kNN, %", True, "code", "knn"),
    "code_map": Measure("code, mAP@1000 over hits", True, "code", "map_over_hits"),
    "code_map_relevant": Measure("code, mAP@1000 over relevant", True, "code", "map_over_relevant"),
    "code_shapes_r2": Measure("shapes' factors from the code, R²", True, "code", "shapes_r2"),
    "code_augmentation_r2": Measure(
        "augmentation parameters from the code, R²", True, "code", "augmentation_r2"
    ),
    "recall_at_1": Measure("R@1", True, "features", "recall_at_1"),
    **of_uncertainty(own_score=False),
    **of_uncertainty(own_score=True),
    "nll": Measure("NLL of the probe (of the latent's samples, if any)", False, "probe", "nll"),
    "brier": Measure("Brier score of that probe", False, "probe", "brier"),
    "ece": Measure("ECE of that probe", False, "probe", "ece"),
}
OF_UNCERTAINTY = tuple(MEASURES)[tuple(MEASURES).index("r_auroc") :]  # including the probe's confidence


def code_bits(settings: PretrainSettings) -> int:
    """Return the number of bits of the run's code."""
    latent = settings.latent
    return latent.distribution.code_bits(latent_dim(settings.model, latent))


def measured(
    run: Run,
    train: Reader,
    test: Reader,
    test_path: Path,
    codes: Iterable[tuple[str, int]],
    sampling: Sampling,
    codes_alone: bool = False,
) -> tuple[dict[str, Any], list[Row]]:
    """Return a description of the run and its measurements; the rows' `run` is the name of the run's folder.
    For a deterministic run they include the equal-bit `codes`, each a method of EQUAL_BIT and its bits; with
    `codes_alone` nothing else is measured. Large sets are sampled (`sets.a_sample`)."""
    train, test = a_sample(train, test)
    counts, on_error = (len(train), len(test)), run.on_error(sampling.on_error)
    embedded = embed_both(run, train, test, 0, on_error)
    train = sound_part(run.settings.data, train, embedded[0].rows)
    test = sound_part(test_path, test, embedded[1].rows)
    bits, width = embedded[1].bits, embedded[1].features.shape[1]
    sets = Sets.of(sampling, run, train, test)
    data = CodeEvaluationData(*embedded, known_factors(run, sets, sampling))
    points: list[Point] = []
    if not codes_alone:
        analysed, _ = uncertainty(run, sets, sampling)
        recall = next(iter(analysed["scores"].values()))["recall_at_1"]
        features, labels = ([e.features for e in embedded], [e.labels for e in embedded])
        of_features = accuracies(None, features, labels, 0, FIRST, device_of(run.network))
        points = [("features", "", 32 * width, of_features | {"recall_at_1": recall}), *of_scores(analysed)]
        if run.network.family.own_code:
            points.append(("code", "code", bits, of_one_code(data, bits)))
    if not run.network.family.stochastic:
        for method, length, coder in equal_bit_coders(data.train.features, codes):
            points.append(("code", method, length, of_one_code(data, length, coder)))
    described = {
        "deterministic": not run.network.family.stochastic,
        "bits": bits,
        "features": width,
        "rate_bits": embedded[1].rate_bits,
        "database": len(train),
        "queries": len(test),
        "skipped": {"train": counts[0] - len(train), "test": counts[1] - len(test)},
    }
    return described, rows_of_points(run.folder.name, run.settings.seed, points)


def accuracies(
    codes: Sequence[np.ndarray] | None,
    vectors: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    bits: int,
    top_n: int,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Measure training and test images: the linear probe on vectors [N, D], and kNN and mAP@top_n by Hamming
    distance of packed codes with this many bits or, if `codes` is None, by the vectors' cosine."""
    (x, test_x), (y, test_y) = vectors, labels
    probe = linear_probe(x, y, test_x, test_y)
    if codes is None:
        knn = weighted_knn(x, y, test_x, test_y, device=device)
        score = similarity_map(test_x, test_y, x, y, top_n)
    else:
        knn = hamming_knn(codes[0], y, codes[1], test_y, bits)
        score = retrieval_map(codes[1], test_y, codes[0], y, top_n)
    maps = {"map_over_hits": score.over_hits, "map_over_relevant": score.over_relevant}
    return {"linear": probe.accuracy, "knn": knn} | maps


# Codes ----------------------------------------------------------------------------------------------------


class CodeEvaluationData(NamedTuple):
    """Everything needed to judge a code."""

    train: Embedding
    test: Embedding
    factors: dict[str, tuple[Factors, Factors]]


def equal_bit_codes(lengths: Iterable[int]) -> list[tuple[str, int]]:
    """Return each of EQUAL_BIT at each length; OPQ only at whole bytes, and if faiss is installed."""
    return [
        (method, bits)
        for bits in sorted(lengths)
        for method in EQUAL_BIT
        if method != "OPQ" or (bits % 8 == 0 and has_faiss())
    ]


def without_opq() -> list[str]:
    """Return a line on what EQUAL_BIT lacks, and print it on stderr; nothing if faiss is installed."""
    if has_faiss():
        return []
    said = "OPQ of the control, which may be the strongest, needs faiss: pip install 'lvssl[faiss]'"
    print(f"note: {said}", file=sys.stderr, flush=True)
    return [said]


def equal_bit_coders(
    features: np.ndarray, codes: Iterable[tuple[str, int]], left_out: list[str] | None = None
) -> Iterator[tuple[str, int, Coder]]:
    """Yield the codes, fitted on training features [N, F]. A code that can't have this many bits, or can't be
    fitted on so few images, is left out; a line on it is added to `left_out`."""
    for method, bits in codes:
        try:
            coder = CONTROLS[method](features, bits, 0)
        except ValueError as error:
            if left_out is not None:
                left_out.append(f"{method} of the control, {bits} bits: {error}")
            continue
        yield method, bits, coder


def of_one_code(data: CodeEvaluationData, bits: int, coder: Coder | None = None) -> dict[str, float]:
    """Return the metrics of one code; `coder` makes it from features, and is None for a run's own code."""

    def coded(features: np.ndarray, own: np.ndarray) -> np.ndarray:
        return own if coder is None else coder.encode(features)

    def vectors(packed: np.ndarray) -> np.ndarray:
        return Bits(packed, bits, off=-1.0)[:] if coder is None else coder.decode(packed)

    packed = [coded(each.features, each.codes) for each in data[:2]]
    by_hamming = packed if coder is None or coder.hamming else None
    labels = data.train.labels, data.test.labels
    found = accuracies(by_hamming, [vectors(each) for each in packed], labels, bits, FIRST)
    for kind, parts in data.factors.items():
        x = [vectors(coded(outputs.features, pack_bits(outputs.bits))) for outputs, _ in parts]
        regressed = ridge_each(x[0], parts[0][1], x[1], parts[1][1])
        found[f"{kind}_r2"] = float(np.nanmean([r.r2 for r in regressed.values()]))
    return found


# Uncertainty ----------------------------------------------------------------------------------------------


def of_scores(analysed: dict[str, Any]) -> list[Point]:
    """Return the metrics of each uncertainty score and of the probe, from `scorer.uncertainty`."""
    scores = {name: score for name, score in analysed["scores"].items() if name in LABEL_FREE}
    found: list[Point] = [("uncertainty", name, None, of_one_score(s)) for name, s in scores.items()]
    probe = "latent samples" if "latent samples" in analysed["probes"] else "features"
    return [
        *found,
        ("probe", probe, None, {n: analysed["probes"][probe][n] for n in ("nll", "brier", "ece")}),
    ]


def of_one_score(score: dict[str, float]) -> dict[str, float]:
    """Return the metrics in which arms are compared, and the AUROC of each out-of-distribution set."""
    return {
        "r_auroc": score["r_auroc"],
        "aurc": score["aurc"],
        "ood": mean_of(score, FOREIGN),
        "corruption": mean_of(score, "rank "),
        "crop": score["crops less certain"],
        **{name: value for name, value in score.items() if name.startswith(FOREIGN)},
    }


def mean_of(score: dict[str, float], prefix: str) -> float:
    return float(np.mean([value for name, value in score.items() if name.startswith(prefix)]))
