"""`lvssl knn` and `lvssl linear` on embeddings that another model has made, instead of a run."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvssl.evaluation.embedding import LARGE_SET
from lvssl.evaluation.knn import customary, weighted_votes
from lvssl.evaluation.score import score
from lvssl.evaluation.stage import note_without_effect
from lvssl.evaluation.streamed import probed
from lvssl.models.device import claim, pick_device
from lvssl.runs.embeddings import Embeddings, open_pair_of_embeddings
from lvssl.runs.labels import SAME
from lvssl.runs.progress import peak_memory
from lvssl.runs.result import ResultFile, result_path
from lvssl.settings.stages import KnnSettings, LinearSettings
from pipelines.errors import InputError


def measure_embeddings(name: str, settings: KnnSettings | LinearSettings) -> tuple[Path, dict[str, Any]]:
    """Measure embeddings and write NAME.json next to them, or to --out. Returns its path and content, also of
    a result that exists.

    Raises InputError: impossible settings, no such embeddings, or a result for other settings exists there.
    """
    settings.validate()
    if settings.target:
        raise InputError("--target needs a set of images: embeddings only have classes")
    train, test = open_pair_of_embeddings(settings.run, settings.train, settings.test)
    settings = replace(settings, train=train.path, test=test.path, on_error="raise")
    folder = settings.run if settings.run.is_dir() else settings.run.parent
    path = result_path(settings.out or folder / f"{name}.json")
    result = ResultFile(path, name, settings, f"{train.digest[:32]}{test.digest[:32]}")
    if (done := result.found()) is not None:
        return path, done
    if train.digest == test.digest:
        print(f"note: {SAME}", file=sys.stderr, flush=True)
    device, started = pick_device(settings.device), time.monotonic()
    claim(device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if isinstance(settings, KnnSettings):
        votes, how = by_knn(settings, train, test, device)
    else:
        votes, how = by_probe(settings, train, test, device)
    content = {
        "stage": name,
        "results": {"features": score(votes, torch.from_numpy(test.labels))},
        "data": {
            "train": str(train.path),
            "images": len(train.labels),
            "test": str(test.path),
            "test_images": len(test.labels),
        },
        **how,
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_mib": round(peak_memory(device) / 2**20, 1),
        "device": str(device),
    }
    return path, result.write(content)


def by_knn(
    settings: KnnSettings, train: Embeddings, test: Embeddings, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Return votes [M, C], and the parameters used."""
    k, temperature = customary(len(train.labels))
    k, temperature = settings.k or k, settings.temperature or temperature
    given = test.features, k, temperature, device, "knn: votes by features"
    votes = weighted_votes(train.features, torch.from_numpy(train.labels), *given)
    return votes, {"k": k, "temperature": temperature}


def by_probe(
    settings: LinearSettings, train: Embeddings, test: Embeddings, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Return probabilities [M, C], and how the probe was fitted."""
    if settings.probe in ("sgd", "ridge") or settings.representation != "features":
        raise InputError("embeddings have neither images nor codes: use --probe logistic, streamed or auto")
    probe = settings.probe
    if probe == "auto":
        probe = "streamed" if len(train.labels) >= LARGE_SET else "logistic"
    note_without_effect(settings, probe)
    found, how = probed(settings, probe, (train.features, train.labels), (test.features, test.labels), device)
    return torch.from_numpy(found.scores(int(train.labels.max()) + 1)), {"probe": probe} | how
