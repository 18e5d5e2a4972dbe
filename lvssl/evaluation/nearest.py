"""`lvssl knn`: classify test images by their nearest training images, in features and in codes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lvssl.evaluation.embedding import Embedding, embedded, help_to_embed
from lvssl.evaluation.knn import customary, hamming_votes, weighted_votes
from lvssl.evaluation.score import score
from lvssl.evaluation.stage import Stage, prepare
from lvssl.runs.labels import say_left_out
from lvssl.settings.stages import KnnSettings


def knn(settings: KnnSettings) -> Stage[KnnSettings]:
    """Measure a run and write knn.json to its folder; the returned stage is `done`.

    Raises InputError: impossible settings, no such run or data, or a result for other settings exists there.
    """
    stage = prepare("knn", settings, "knn.json")
    if stage.done is not None:
        return stage
    train, test = stage.sets()
    if not stage.world.first:  # a single process does the rest
        for data in (train, test):
            help_to_embed(stage.run, data.source, settings.workers, data.on_error)
        return stage
    started = time.monotonic()
    k, temperature = customary(len(train))
    k, temperature = settings.k or k, settings.temperature or temperature
    known, asked = (
        embedded(stage.run, data.source, settings.workers, data.on_error, f"knn: {data.path.name}")
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
    """Return votes by class [M, C], or weighted means of the targets [M, T], by features and by code."""
    wide = answers
    if answers.is_floating_point():  # a column of ones also gives the sum of the weights
        wide = torch.cat([answers, torch.ones(len(answers), 1)], dim=1)
    given = wide, test.features, k, temperature, device, "knn: votes by features"
    found = {
        "features": weighted_votes(train.features, *given),
        "code": hamming_votes(train.codes, wide, test.codes, test.bits, k, temperature, "knn: votes by code"),
    }
    if not answers.is_floating_point():
        return found
    return {name: sums[:, :-1] / sums[:, -1:] for name, sums in found.items()}
