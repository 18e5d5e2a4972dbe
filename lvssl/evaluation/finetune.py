"""Fine-tune a run's encoder with all or some labels.

RUN/finetune-LABELS/stage.json       settings that the folder belongs to
                   /trials.json      figures of each setting on the held-out images
                   /trial-0 ...      checkpoints of the trial in progress
                   /final            checkpoints of the training on all labelled images
                   /result.json      figures on the test images, which are read once, at the very end
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from lvssl.evaluation.score import score
from lvssl.evaluation.stage import Stage, fit, predictions, prepare
from lvssl.runs.labels import LabelledDataset, labelled_rows, split
from lvssl.runs.result import read_json
from lvssl.settings.stages import FinetuneSettings
from lvssl.training.distributed import connected, from_first
from lvssl.training.stopping import Stop, stop_signals
from pipelines.errors import InputError
from pipelines.files import write_json


def finetune(settings: FinetuneSettings) -> Stage[FinetuneSettings]:
    """Choose the settings, train, test once and write result.json; the returned stage is `done`.

    Raises:
        InputError: impossible settings, no such run, data or list, or a result for other settings
            exists there.
        Interrupted: SIGTERM or SIGUSR2 was received; the state is saved.
        FloatingPointError: the final training or every trial diverged. A single diverging trial isn't chosen.
    """
    stage = prepare("finetune", settings, f"{folder_name(settings)}/result.json")
    if stage.done is not None:
        return stage
    train, test = stage.sets()
    labelled = train.only(labelled_rows(train, settings.label_fraction, settings.subset_list, settings.seed))
    with stop_signals() as stop, connected(stage.world, stage.device):
        folder = stage.claim(train)
        trials = sweep(stage, labelled, folder, stop)
        chosen = best(trials)
        model, training = fit(stage, labelled, chosen, folder / "final", stop, f"finetune {folder.name}")
        figures = {settings.representation: score(*predictions(stage, model, test), train.targets)}
        more = training.describe() | {"seconds_sweep": round(sum(trial["seconds"] for trial in trials), 3)}
        return stage.finish((labelled, test), figures, chosen=chosen, trials=trials, **more)


def folder_name(settings: FinetuneSettings) -> str:
    """Return finetune-0.1, finetune-latent-0.1 or, with a list and no --labels, the list's name."""
    share = settings.label_fraction
    what = settings.subset_list.stem if settings.subset_list and share == 1 else str(share)
    return "-".join(["finetune", *(["latent"] if settings.representation == "latent" else []), what])


def grid(settings: FinetuneSettings) -> list[dict[str, float]]:
    pairs = itertools.product(settings.lr, settings.weight_decay)
    return [{"lr": lr, "weight_decay": decay} for lr, decay in pairs]


def sweep(
    stage: Stage[FinetuneSettings], labelled: LabelledDataset, folder: Path, stop: Stop
) -> list[dict[str, Any]]:
    """Return each pair of the grid with its figures on held-out images, reusing those in trials.json."""
    pairs = grid(stage.settings)
    fitted, held = split(labelled, stage.settings.validation_fraction, stage.settings.seed)
    if len(pairs) == 1 or not len(held) or not len(fitted):
        if len(pairs) > 1:
            said = f"too few labels to hold any out: using the middle one of {len(pairs)} settings"
            print(said, file=sys.stderr)
        return [pairs[len(pairs) // 2] | {"held_out": None, "seconds": 0.0}]
    record = folder / "trials.json"
    trials: list[dict[str, Any]] = from_first(stage.world, lambda: read_trials(record))
    for number, pair in enumerate(pairs[len(trials) :], len(trials)):
        title = f"finetune {folder.name}, trial {number + 1} of {len(pairs)}"
        parts = labelled.only(fitted), labelled.only(held)
        trials.append(pair | trial(stage, parts, pair, folder / f"trial-{number}", stop, title))
        if stage.world.first:
            write_json(record, trials, indent=2)
            shutil.rmtree(folder / f"trial-{number}", ignore_errors=True)
    return trials


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Return the finished trials. Raises InputError if the file is damaged."""
    trials = read_json(path) if path.exists() else []
    known = {"lr", "weight_decay", "held_out", "seconds"}
    if not isinstance(trials, list) or not all(isinstance(t, dict) and known <= t.keys() for t in trials):
        raise InputError(f"{path}: not a record of trials; remove it to repeat them")
    return trials


def trial(
    stage: Stage[FinetuneSettings],
    parts: tuple[LabelledDataset, LabelledDataset],
    pair: dict[str, float],
    folder: Path,
    stop: Stop,
    title: str,
) -> dict[str, Any]:
    """Train on the first part, measure on the second."""
    fitted, held = parts
    try:
        model, training = fit(stage, fitted, pair, folder, stop, title)
        found, answers = predictions(stage, model, held)
        figures = score(found, answers, held.targets)
    except FloatingPointError as error:
        return {"held_out": None, "diverged": str(error), "seconds": 0.0}
    if not held.targets:
        figures["cross_entropy"] = float(F.cross_entropy(found, answers))
    return {"held_out": figures, "seconds": training.seconds}


def finite_or(otherwise: float, value: float | None) -> float:
    """Return the figure, or `otherwise` if it isn't finite; files store such figures as null."""
    return value if value is not None and math.isfinite(value) else otherwise


def best(trials: list[dict[str, Any]]) -> dict[str, float]:
    """Return the pair with the best held-out accuracy (ties: the lower cross entropy) or R^2."""

    def merit(trial: dict[str, Any]) -> tuple[float, float]:
        figures = trial["held_out"]
        if figures is None:
            return (-math.inf, 0.0)
        if "top1" in figures:
            return (figures["top1"], -finite_or(math.inf, figures["cross_entropy"]))
        return (finite_or(-math.inf, figures["r2"]), 0.0)

    chosen = max(trials, key=merit)
    if "diverged" in chosen:
        raise FloatingPointError(f"every trial diverged ({chosen['diverged']}); try smaller values of --lr")
    return {name: chosen[name] for name in ("lr", "weight_decay")}
