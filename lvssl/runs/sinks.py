"""Sinks for a training's figures, besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`--log`)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lvssl.runs.result import read_json
from lvssl.settings.fields import flat
from pipelines.errors import InputError
from pipelines.files import naming


class Sink(Protocol):
    """Receives the figures of steps, in ascending order, and is closed at the end."""

    def add(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes to FOLDER/tensorboard; purges steps that a resumed training will take again. An error of its
    thread, such as a full disk, is raised by the call that follows it, and by `close`."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        try:
            str(folder).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{folder}: TensorBoard needs a folder's name in UTF-8: choose another"
            ) from error
        purge = resumed_at + 1 if resumed_at else None
        self.path, self.hook = folder / "tensorboard", threading.excepthook
        threading.excepthook = self.uncaught
        with naming(self.path):
            self.board = SummaryWriter(str(self.path), purge_step=purge)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        with naming(self.path):
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            with naming(self.path):
                self.board.close()
        finally:
            threading.excepthook = self.hook

    def uncaught(self, error: threading.ExceptHookArgs) -> None:
        """Suppress tracebacks of TensorBoard's thread, whose errors are raised here anyway."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self.hook(error)


class WandB:
    """Logs to a run of the project $WANDB_PROJECT (lvssl unless set), which a resumed training continues,
    online or into FOLDER/wandb, by $WANDB_MODE."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "lvssl")
        named = {"id": run_id(folder), "name": folder.resolve().name, "resume": "allow"}
        self.run = wandb.init(project=project, dir=folder, config=about(folder), **named)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """Logs to a run of the server or store $MLFLOW_TRACKING_URI, which a resumed training continues."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        import mlflow

        mlflow.set_experiment("lvssl")
        self.client, own = mlflow.tracking.MlflowClient(), f"tags.lvssl = '{run_id(folder)}'"
        experiment = self.client.get_experiment_by_name("lvssl").experiment_id
        known = self.client.search_runs([experiment], own, max_results=1)
        if known:
            self.id = known[0].info.run_id
            return
        tags, title = {"lvssl": run_id(folder)}, folder.resolve().name
        self.id = self.client.create_run(experiment, tags=tags, run_name=title).info.run_id
        for name, value in about(folder).items():
            self.client.log_param(self.id, name, str(value)[:500])

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


SINKS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def require_installed(names: Sequence[str]) -> None:
    """Raise InputError for a sink whose library isn't installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log {name}: needs {name}: pip install {name}")


def run_id(folder: Path) -> str:
    """Return an id that depends on the folder's path alone, so that a resumed run is found."""
    return hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def about(folder: Path) -> dict[str, Any]:
    """Return a run's settings by flat names, such as "latent.family"."""
    path = folder / "config.json"
    return flat(read_json(path)["settings"]) if path.exists() else {}
