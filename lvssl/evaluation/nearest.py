"""`lvssl knn`: what the nearest training images say of a test image, by features and by codes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.knn import hamming_votes, weighted_votes
from lvssl.evaluation.score import score
from lvssl.evaluation.stage import Stage, prepare
from lvssl.runs.labels import say_left_out
from lvssl.settings.stages import KnnSettings

LARGE_FROM = (
    200_000  # training images from which on k = 200 and T = 0.1 are the custom, instead of 20 and 0.07
)


def knn(settings: KnnSettings) -> Stage[KnnSettings]:
    """Measure, write knn.json into the run's folder; the stage returned is `done`.

    Raises InputError: impossible settings, no such run or data, or another result stands there.
    """
    stage = prepare("knn", settings, "knn.json")
    if stage.done is not None or not stage.world.first:  # one process is enough
        return stage
    train, test = stage.sets()
    started = time.monotonic()
    large = len(train) >= LARGE_FROM
    k, temperature = settings.k or (200 if large else 20), settings.temperature or (0.1 if large else 0.07)
    network, view = stage.run.network.to(stage.device), stage.run.settings.view
    known, asked = (
        embed(network, data.source, view, settings.workers, data.on_error, f"knn: {data.path.name}")
        for data in (train, test)
    )
    for data, seen in ((train, known), (test, asked)):
        say_left_out(data.path, len(data), seen.rows)
    answers, wanted = train.answers[torch.from_numpy(known.rows)], test.answers[torch.from_numpy(asked.rows)]
    found = vote(known, asked, answers, k, temperature, stage.device)
    figures = {name: score(votes, wanted, train.targets) for name, votes in found.items()}
    seconds = round(time.monotonic() - started, 3)
    return stage.finish((train, test), figures, k=k, temperature=temperature, seconds=seconds)


def vote(
    train: Embedding, test: Embedding, answers: Tensor, k: int, temperature: float, device: torch.device
) -> dict[str, Tensor]:
    """Votes by class [M, C], or weighted means of the targets [M, T], by features and by code."""
    wide = answers
    if answers.is_floating_point():  # the sum of the weights, too
        wide = torch.cat([answers, torch.ones(len(answers), 1)], dim=1)
    given = wide, test.features, k, temperature, device, "knn: votes by features"
    found = {
        "features": weighted_votes(train.features, *given),
        "code": hamming_votes(train.codes, wide, test.codes, test.bits, k, temperature, "knn: votes by code"),
    }
    if not answers.is_floating_point():
        return found
    return {name: sums[:, :-1] / sums[:, -1:] for name, sums in found.items()}
