"""A study: every arm over several seeds, measured alike, and compared pair by pair.

Arms differ in the settings that their names give and in nothing else: data, order, augmentation and steps are
those of the seed. A run that is finished is not trained again, and its measures lie in its folder, so that a
study goes on where it was killed and its parts can be an array job (--shard K/N).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from lvssl.config import PRESETS, PretrainSettings, choice, preset, to_dict
from lvssl.evaluation.analyse import AnalyseSettings, analyse
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.evaluate import measure
from lvssl.training.pretrain import pretrain
from lvssl.training.run import load_run, versions
from pipelines.errors import InputError
from pipelines.files import write_atomically
from pipelines.sources import open_source

CONTROL, FAIR_CONTROL = "none", "sign"
ROW = "study.json"  # in each run's folder

# Measures of a run: name -> (what it says, whether higher is better).
MEASURES: dict[str, tuple[str, bool]] = {
    "features_linear": ("features, linear probe, %", True),
    "features_knn": ("features, kNN, %", True),
    "code_linear": ("code, linear probe, %", True),
    "code_knn": ("code, Hamming kNN, %", True),
    "r_auroc": ("R-AUROC of the best score without labels", True),
    "recall_at_1": ("R@1", True),
    "aurc": ("AURC of that score", False),
    "ood": ("AUROC against images from elsewhere, mean", True),
    "corruption": ("rank correlation with corruption severity, mean", True),
    "nll": ("NLL of the probe (of the latent's samples, if any)", False),
    "ece": ("ECE of that probe", False),
    "code_shapes_r2": ("shapes' factors from the code, R^2, mean", True),
    "code_augmentation_r2": ("augmentation parameters from the code, R^2, mean", True),
}


@dataclass(frozen=True)
class StudySettings:
    """Pretrain every arm over several seeds, measure all alike, compare in pairs; tables and figures."""

    train: Path
    """The training images, made by `convert-beton`."""
    test: Path
    """The test images."""
    preset: str = "cifar10-small"
    """Settings that all arms share."""
    out: Path = Path("runs/study")
    """One run folder for each arm and seed, study.json, study.csv, study.md, figures."""
    arms: tuple[str, ...] = ("none", "sign", "bernoulli", "gaussian")
    """A family, or NAME:setting=value,... with the latent's settings, such as low:family=bernoulli,dim=64."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 0
    """Of each run; 0: the preset's."""
    threads: int = 0
    """Threads of torch on a CPU; 0: all cores."""
    images: int = 2000
    """Test images on which uncertainty and meaning are measured."""
    ood: tuple[Path, ...] = field(default=())
    """Betons of other data, as for `lvssl analyse`."""
    shard: str = ""
    """K/N: train and measure every N-th run only, from the K-th (0-based), for an array job; then run once
    without it to collect."""


def study(settings: StudySettings) -> dict[str, Any] | None:
    """Do all that isn't done; study.json in `out`, and its content (None for a shard).

    Raises:
        InputError: an unknown preset, arm or setting, a doubled arm, a shard that isn't K/N; before any work.
    """
    choice("preset", settings.preset, tuple(PRESETS))
    plans = [plan(settings, arm, seed) for seed in settings.seeds for arm in settings.arms]
    if len({p.out for p in plans}) < len(plans):
        raise InputError("--arms, --seeds: two arms of one name, or a seed twice")
    for chosen in plans:
        chosen.validate()
    first, step = shard(settings.shard)
    rows = []
    for number, chosen in enumerate(plans[first::step], 1):
        print(f"== {chosen.out.name} ({number} of {len(plans[first::step])})", file=sys.stderr, flush=True)
        rows.append(row(settings, chosen))
    if settings.shard:
        return None
    result = {"settings": to_dict(settings), "versions": versions(), "rows": rows, "pairs": pairs(rows)}
    write_atomically(settings.out / "study.json", json.dumps(result, indent=1).encode())
    return result


def shard(text: str) -> tuple[int, int]:
    """(K, N) of "K/N"; (0, 1) of "". InputError for anything else."""
    if not text:
        return 0, 1
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and int(k) < int(n)):
        raise InputError(f"--shard must be K/N with 0 <= K < N, got {text!r}")
    return int(k), int(n)


def plan(settings: StudySettings, arm: str, seed: int) -> PretrainSettings:
    """The pretraining of an arm and a seed."""
    base = preset(settings.preset)
    name, colon, text = arm.partition(":")
    changes = dict(pair.partition("=")[::2] for pair in text.split(",")) if colon else {"family": name}
    return dataclasses.replace(
        base,
        data=settings.train,
        out=settings.out / f"{name}-s{seed}",
        seed=seed,
        threads=settings.threads,
        epochs=settings.epochs or base.epochs,
        latent=dataclasses.replace(base.latent, **latent_values(arm, changes)),
    )


def latent_values(arm: str, changes: dict[str, str]) -> dict[str, Any]:
    """Values of the latent's settings from text, in the types of their defaults."""
    fields = {f.name: f for f in dataclasses.fields(PretrainSettings().latent)}
    made: dict[str, Any] = {}
    for name, text in changes.items():
        if name not in fields:
            raise InputError(f"arm {arm!r}: unknown setting {name!r}; known: {', '.join(fields)}")
        default: Any = fields[name].default
        kind: Any = float if default is None else type(default)
        try:
            made[name] = text.lower() in ("true", "1", "yes") if kind is bool else kind(text)
        except ValueError as error:
            raise InputError(f"arm {arm!r}: {name} must be a {kind.__name__}, got {text!r}") from error
    return made


def row(settings: StudySettings, chosen: PretrainSettings) -> dict[str, Any]:
    """The measures of one run, which is trained and measured unless that is done."""
    pretrain(chosen, resume=True)
    run = load_run(chosen.out)
    kept = chosen.out / ROW
    measured_with = {
        "test": str(settings.test),
        "images": settings.images,
        "ood": [str(p) for p in settings.ood],
    }
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["checkpoint"] == run.digest and found["measured_with"] == measured_with:
            return found
    train, test = (
        embed(run.network, open_source(path), chosen.view) for path in (settings.train, settings.test)
    )
    figures, _ = measure(train, test, run.network.family.stochastic)
    analysis = analyse(
        AnalyseSettings(chosen.out, test=settings.test, ood=settings.ood, images=settings.images, alone=True)
    )
    found = {
        "arm": chosen.out.name.rpartition("-s")[0],
        "seed": chosen.seed,
        "family": chosen.latent.family,
        "bits": figures["bits"],
        "features": test.features.shape[1],
        "rate_bits": figures.get("rate_bits", 0.0),
        "checkpoint": run.digest,
        "measured_with": measured_with,
        "measures": measures(figures, analysis["models"]["run"]),
    }
    write_atomically(kept, json.dumps(found, indent=1).encode())
    return found


def measures(figures: dict[str, Any], analysed: dict[str, Any]) -> dict[str, float]:
    """One number for each of MEASURES, from `measure` and `analyse`.

    The uncertainty is the best of the run's label-free scores by R-AUROC: a deterministic arm may use its
    feature norm or its neighbours' distance, a latent one its posterior too.
    """
    scores = {n: s for n, s in analysed["scores"].items() if n in ("posterior", "rate", "norm", "distance")}
    best = max(scores.values(), key=lambda score: nan_low(score["r_auroc"]))
    probe = analysed["probes"].get("latent samples", analysed["probes"]["features"])
    r2 = {
        kind: [r["r2"] for r in analysed["regression"] if r["set"] == kind and r["from"] == "code"]
        for kind in ("shapes", "augmentation")
    }
    return {
        "features_linear": figures["linear"],
        "features_knn": figures["knn"],
        "code_linear": figures.get("code_linear", figures.get("sign_linear")),
        "code_knn": figures.get("hamming_knn", figures.get("sign_hamming_knn")),
        "r_auroc": best["r_auroc"],
        "recall_at_1": best["recall_at_1"],
        "aurc": best["aurc"],
        "ood": mean_of(best, "ood "),
        "corruption": mean_of(best, "rank "),
        "nll": probe["nll"],
        "ece": probe["ece"],
        "code_shapes_r2": float(np.nanmean(r2["shapes"])),
        "code_augmentation_r2": float(np.nanmean(r2["augmentation"])),
    }


def nan_low(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def mean_of(score: dict[str, float], prefix: str) -> float:
    return float(np.mean([value for name, value in score.items() if name.startswith(prefix)]))


# Pairs ----------------------------------------------------------------------------------------------------


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm minus each control, seed by seed: mean, standard error, 95 % interval, verdict."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    of = {(row["arm"], row["seed"]): row["measures"] for row in rows}
    found = []
    for control in (CONTROL, FAIR_CONTROL):
        for arm in arms:
            seeds = [seed for name, seed in of if name == arm and (control, seed) in of]
            if arm in (control, CONTROL) or not seeds:
                continue
            for measure_name, (_, higher) in MEASURES.items():
                each = [of[arm, s][measure_name] - of[control, s][measure_name] for s in seeds]
                found.append(
                    {"arm": arm, "control": control, "measure": measure_name, "seeds": seeds, "each": each}
                    | interval(each, higher)
                )
    return found


def interval(each: list[float], higher_is_better: bool) -> dict[str, Any]:
    """Mean, its standard error and Student's 95 % interval; the verdict is `level` unless 0 is outside."""
    mean = statistics.mean(each)
    if len(each) < 2:
        return {"mean": mean, "standard_error": None, "interval": None, "verdict": "one seed"}
    error = statistics.stdev(each) / math.sqrt(len(each))
    half = float(student.ppf(0.975, len(each) - 1)) * error
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        verdict = "level"
    else:
        verdict = "better" if (mean > 0) == higher_is_better else "worse"
    return {"mean": mean, "standard_error": error, "interval": [low, high], "verdict": verdict}
