"""A stage after pretraining: its run, its data, its working folder and its result."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lvssl.models.device import claim, encoding_precision, note_if_slow, pick_device, precision
from lvssl.runs.identity import describe_set, other_set
from lvssl.runs.labels import (
    LabelledDataset,
    check_pair,
    open_labelled,
    say_if_same,
    say_notes,
    sibling_test_set,
)
from lvssl.runs.progress import peak_memory
from lvssl.runs.result import ResultFile, read_result, result_path
from lvssl.runs.run import Run, load_run, require_classes_of, stored_set, training_set, versions
from lvssl.settings.fields import identity
from lvssl.settings.pretrain import EngineSettings
from lvssl.settings.stages import LinearSettings, StageSettings, TrainingSettings
from lvssl.training.distributed import World, from_first, world_of
from lvssl.training.stopping import Stop
from lvssl.training.supervised import Classifier, Recipe, SupervisedTrainer, largest_batch, predict, scaled_lr
from pipelines.errors import InputError
from pipelines.files import write_json

# The files that a stage writes into its folder and into the folders of its trainings.
OWN = (
    "stage.json", "result.json", "trials.json", "metrics.jsonl", "checkpoints/step-*.pt",
    "tensorboard/events.out.tfevents.*", "non_finite_batch*.npy",
)  # fmt: skip
Settings = TypeVar("Settings", bound=StageSettings)


@dataclass(frozen=True)
class Stage(Generic[Settings]):
    """One call of a stage, ready to start."""

    name: str
    settings: Settings  # with train and test filled in
    run: Run
    path: Path  # of the result
    done: dict[str, Any] | None  # the result, if it exists already
    device: torch.device
    world: World

    def sets(self) -> tuple[LabelledDataset, LabelledDataset]:
        """Open the training and test sets. Raises InputError if they don't match."""
        settings = self.settings
        assert settings.train is not None and settings.test is not None
        given = settings.target, settings.source, self.run.on_error(settings.on_error), str(self.device)
        train = open_labelled(settings.train, *given)
        if settings.train == self.run.settings.data:
            require_classes_of(self.run, train.source, settings.train)
        test = open_labelled(settings.test, *given, train=train)
        check_pair(train, test)
        if self.world.first:
            say_notes(train.source, test.source)
            say_if_same(train.source, test.source)
        return train, test

    @property
    def result(self) -> ResultFile:
        """The file of the result, whether or not it exists."""
        return ResultFile(self.path, self.name, self.settings, self.run.digest)

    @property
    def engine(self) -> EngineSettings:
        """How to compute: as in the run's training unless the settings say otherwise; stages that train
        nothing use fp32."""
        given, asked = self.run.settings.engine, getattr(self.settings, "precision", "fp32")
        return given if asked == "auto" else replace(given, precision=asked)

    @property
    def folder(self) -> Path:
        """Folder of the work's checkpoints and metrics: X for X/result.json and for X.json."""
        return self.path.parent if self.path.name == "result.json" else self.path.with_suffix("")

    def claim(self, train: LabelledDataset) -> Path:
        """Return the folder, which rank 0 marks as belonging to this work. Raises InputError if it contains
        other work, or the same on other training images."""
        from_first(self.world, lambda: self._claim(describe_set(train.source)))
        if self.world.first:
            note_if_slow(self.settings.device, self.engine, self.device)
        return self.folder

    def _claim(self, data: dict[str, Any]) -> None:
        folder = self.folder
        mark = folder / "stage.json"
        wanted = identity(self.settings)
        if mark.exists():
            begun = read_result(mark)
            before = stored_set(mark, begun.get("data", data))
            changed = self.result.changes(begun) or other_set(before, data)
            if not changed:
                return
            if not self.settings.overwrite:
                raise InputError(
                    f"{folder} contains an unfinished job with other settings ({changed}); "
                    "--overwrite discards it, --out writes elsewhere"
                )
            remove_work(folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists but is not a stage's folder: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": wanted, "checkpoint": self.run.digest, "data": data, "versions": versions()}
        write_json(mark, content, indent=2)

    def finish(
        self, sets: tuple[LabelledDataset, LabelledDataset], results: dict[str, dict[str, Any]], **more: Any
    ) -> Stage[Settings]:
        """Write `results` (representation -> figures of `score`) with everything about their origin."""
        train, test = sets
        data = {
            "train": str(train.path),
            "images": len(train),
            "test": str(test.path),
            "test_images": len(test),
        }
        content = {
            "stage": self.name,
            "results": results,
            "step": self.run.step,
            "data": data,
            **more,
            "peak_memory_mib": round(peak_memory(self.device) / 2**20, 1),
            "device": str(self.device),
            "arithmetic": self.run.arithmetic,
        }
        finish = self.result.write if self.world.first else self.result.complete
        return replace(self, done=finish(content))


def remove_work(folder: Path) -> None:
    """Remove the files that stages write into their folder, and nothing that others have put there."""
    for part in (folder / "final", *folder.glob("trial-*"), folder):
        for pattern in OWN:
            for path in part.glob(pattern):
                path.unlink()
        for emptied in (part / "checkpoints", part / "tensorboard", part):
            with suppress(OSError):  # not empty, or not there
                emptied.rmdir()


def prepare(name: str, settings: Settings, result: str) -> Stage[Settings]:
    """Check everything that can be checked before the work starts. `result` is its path in the run's folder.

    Raises InputError: impossible settings, no such run or data, or a result for other settings exists there.
    """
    settings.validate()
    world = world_of()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device, world.local_rank)
    run = load_run(settings.run, device)
    train = training_set(run, settings.train)
    settings = replace(
        settings, train=train, test=settings.test or sibling_test_set(train), on_error=run.reading(settings)
    )
    path = result_path(settings.out or settings.run / result)
    stage = Stage(name, settings, run, path, None, device, world)
    if isinstance(settings, TrainingSettings):  # otherwise the encoder keeps the run's own precision
        run.network.precision = encoding_precision(stage.engine, device)
    stage = replace(stage, done=stage.result.found())
    claim(device, precision(stage.engine, device))
    return stage


def fit(
    stage: Stage[Any], data: LabelledDataset, pair: dict[str, float], folder: Path, stop: Stop, title: str
) -> tuple[Classifier, SupervisedTrainer]:
    """Train a linear layer on the run's encoder, and the encoder too unless the stage is `linear`, or resume
    an interrupted training. `pair`: lr, which is for a batch of 256, and weight_decay."""
    settings, network = stage.settings, stage.run.network
    frozen = isinstance(settings, LinearSettings)
    batch = largest_batch(settings.batch_size, len(data), stage.world.size)
    recipe = Recipe(
        settings.epochs, batch, scaled_lr(pair["lr"], batch), pair["weight_decay"], settings.seed,
        settings.checkpoint_minutes, settings.log_every, settings.workers,
        0 if frozen else settings.min_steps, stage.engine,
    )  # fmt: skip
    model = Classifier(
        network if frozen else copy.deepcopy(network), settings.representation, data, frozen, settings.seed
    )
    view = stage.run.settings.view
    training = SupervisedTrainer(folder, model, data, view, recipe, stage.device, stage.world)
    training.run(stop, title)
    return model, training


def predictions(stage: Stage[Any], model: Classifier, data: LabelledDataset) -> tuple[Tensor, Tensor]:
    """Return the result of `predict`."""
    view, workers, title = stage.run.settings.view, stage.settings.workers, f"{stage.name}: {data.path.name}"
    return predict(model, data, view, workers, stage.world, title, stage.engine)


def note_without_effect(settings: LinearSettings, probe: str) -> None:
    """Print a note if an option has no effect on the probe, which `auto` has chosen."""
    if said := settings.without_effect(probe):
        print(f"note: {said}", file=sys.stderr, flush=True)


def show(name: str, path: Path, result: dict[str, Any]) -> None:
    """Print the result of a stage."""
    for representation, figures in result["results"].items():
        print(f"{name} on {representation}: {in_words(figures)}")
    print(f"written: {path}")


def in_words(figures: dict[str, Any]) -> str:
    if "top1" not in figures:
        targets = figures["targets"].items()
        return " · ".join(
            f"{n}: R2 {f['r2']:.3f}, MSE {f['mse']:.4g}, MAE {f['mae']:.4g}" for n, f in targets
        )
    low, high = figures["top1_interval"]
    top5 = f" · top-5 {figures['top5']:.2f} %" if "top5" in figures else ""
    return f"top-1 {figures['top1']:.2f} % [{low:.2f}, {high:.2f}]{top5}"
