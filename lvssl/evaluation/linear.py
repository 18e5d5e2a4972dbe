"""The linear evaluation of a run, by the published protocol or, for smaller sets, by an exact probe."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from lvssl.evaluation.embedding import LARGE_SET, embedded, help_to_embed
from lvssl.evaluation.probe import standardise
from lvssl.evaluation.score import score
from lvssl.evaluation.stage import Stage, fit, note_without_effect, predictions, prepare
from lvssl.evaluation.streamed import Bits, Rows, probed
from lvssl.models.inference import infer
from lvssl.runs.labels import LabelledDataset, readable, say_left_out, split
from lvssl.runs.run import Run
from lvssl.settings.stages import LinearSettings
from lvssl.training.distributed import connected
from lvssl.training.stopping import stop_signals
from lvssl.training.supervised import represent
from pipelines.errors import InputError

RIDGES = np.logspace(-6, 2, 9)  # regularisation strengths, per image


def linear(settings: LinearSettings) -> Stage[LinearSettings]:
    """Measure a run and write linear.json to its folder; the returned stage is `done`.

    Raises:
        InputError: impossible settings, no such run or data, or a result for other settings exists there.
        Interrupted: SIGTERM or SIGUSR2 was received; the state is saved.
    """
    suffix = "" if settings.representation == "features" else f"-{settings.representation}"
    stage = prepare("linear", settings, f"linear{suffix}.json")
    if stage.done is not None:
        return stage
    train, test = stage.sets()
    probe = pick_probe(settings.probe, train)
    if stage.world.first:
        note_without_effect(settings, probe)
    if probe == "sgd":
        with stop_signals() as stop, connected(stage.world, stage.device):
            pair, title = {"lr": settings.lr, "weight_decay": 0.0}, f"linear {stage.run.folder.name}"
            model, training = fit(stage, train, pair, stage.claim(train), stop, title)
            figures = {settings.representation: score(*predictions(stage, model, test), train.targets)}
            return stage.finish((train, test), figures, probe=probe, **training.describe())
    if not stage.world.first:  # a single process does the rest
        if settings.representation != "latent":
            for data in (train, test):
                help_to_embed(stage.run, data.source, settings.workers, data.on_error)
        return stage
    started = time.monotonic()
    found, answers, more = exactly(stage, train, test, probe)
    figures = {settings.representation: score(found, answers, train.targets)}
    seconds = round(time.monotonic() - started, 3)
    return stage.finish((train, test), figures, probe=probe, seconds=seconds, **more)


def pick_probe(wanted: str, train: LabelledDataset) -> str:
    """Resolve `auto` to a probe. Raises InputError for a probe that doesn't suit the labels."""
    exact = "ridge" if train.targets else "logistic"
    if wanted == "auto":
        return "sgd" if len(train) >= LARGE_SET else exact
    if wanted not in ("sgd", exact) and (wanted != "streamed" or train.targets):
        asked = "numbers" if train.targets else "classes"
        raise InputError(f"--probe {wanted} can't predict {asked}; use {exact}, sgd or auto")
    return wanted


def exactly(
    stage: Stage[LinearSettings], train: LabelledDataset, test: LabelledDataset, probe: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Evaluate with an L2-regularised probe on the representations of centre crops; its strength is chosen on
    held-out images. Returns test predictions, answers, and facts on the fit."""
    settings = stage.settings
    (x, train), (test_x, test) = (
        represented(stage.run, data, settings.representation, settings.workers) for data in (train, test)
    )
    if train.targets:
        predicted, strength = ridge_probe(x, train, test_x, settings.seed)
        return predicted, test.answers, {"regularisation": strength}
    both = (x, train.answers.numpy()), (test_x, test.answers.numpy())
    found, how = probed(settings, probe, *both, stage.device)
    return torch.from_numpy(found.scores(train.outputs)), test.answers, how


def represented(run: Run, data: LabelledDataset, on: str, workers: int) -> tuple[Rows, LabelledDataset]:
    """Return a representation of each centre crop, [N, W], and the images that were not skipped."""
    title = f"linear: {data.path.name}"
    x: Rows
    if on == "latent":  # the store doesn't have the latent's means
        batches = readable(data.source, run.settings.view, workers, data.on_error, title=title)
        network = run.network
        found = list(
            infer(network, batches, run.settings.view, lambda images: represent(network, images, on))
        )
        x, rows = (np.concatenate(parts) for parts in zip(*((x.cpu().numpy(), rows) for x, rows in found)))
    else:
        seen = embedded(run, data.source, workers, data.on_error, title)
        x, rows = seen.features, seen.rows
        if on == "code":
            x = Bits(seen.codes, seen.bits, off=-1.0)
    say_left_out(data.path, len(data), rows)
    return x, data if len(rows) == len(data) else data.only(rows)


def ridge_probe(x: Rows, train: LabelledDataset, test_x: Rows, seed: int) -> tuple[Tensor, float]:
    """Fit ridge regression on standardised features, min |y - xW - b|^2 + N * strength * |W|^2. Returns the
    predictions for test_x, and the strength."""
    x, test_x = standardise(x[:].astype(np.float32), test_x[:].astype(np.float32))
    answers = train.answers.numpy()
    mean, deviation = answers.mean(0), np.maximum(answers.std(0), 1e-12)
    y = (answers - mean) / deviation
    fitted, held = split(train, 0.15, seed)

    def predicted(rows: np.ndarray, strength: float, of: np.ndarray) -> np.ndarray:
        model = Ridge(alpha=len(rows) * strength).fit(x[rows], y[rows])
        return model.predict(of).reshape(len(of), -1)  # a single target gives a vector

    chosen = float(RIDGES[len(RIDGES) // 2])  # too few images to choose with: take the middle one
    if len(held):
        errors = [float(((predicted(fitted, s, x[held]) - y[held]) ** 2).mean()) for s in RIDGES]
        chosen = float(RIDGES[int(np.argmin(errors))])
    found = predicted(np.arange(len(x)), chosen, test_x) * deviation + mean
    return torch.from_numpy(found).float(), chosen
