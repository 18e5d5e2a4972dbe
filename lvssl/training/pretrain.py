"""Pretraining: from a converted data set to a run folder."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lvssl.config import PretrainSettings
from lvssl.models.network import LVNet
from lvssl.training import checkpoint
from lvssl.training.objective import objective
from lvssl.training.optimiser import build_optimiser, learning_rate
from lvssl.training.progress import Metrics, Progress
from lvssl.training.run import create_run, pick_device
from pipelines.augment import augmenter_for, backend_for
from pipelines.loader import TwoViewLoader, ViewBatch, evaluation_batches
from pipelines.sources import Source, open_source

CALIBRATION_IMAGES = 50_000


def pretrain(settings: PretrainSettings, resume: bool = False) -> None:
    """Train from scratch, or go on from the newest checkpoint, until the last epoch's end.

    Raises:
        InputError: impossible settings or data; nothing has been written then.
        FloatingPointError: the loss stayed non-finite.
        Interrupted: SIGTERM or SIGUSR2 came; the state is saved.
    """
    settings.validate()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    source = open_source(settings.data, settings.source, device.type)
    classes = int(source.labels.max()) + 1 if len(source) and source.labels.min() >= 0 else 0
    augmenter = augmenter_for(device, settings.augmentation)
    loader = TwoViewLoader(
        source,
        settings.view,
        settings.batch_size,
        settings.seed,
        settings.workers,
        order=settings.order,
        on_error=settings.on_error,
        augmenter=augmenter,
        device=device,
    )
    with loader:
        create_run(settings, classes, resume)
        form = backend_for(device, settings.augmentation) if augmenter else "numba"
        print(f"pretrain {settings.out.name}: on {device}, augmented by {form}", file=sys.stderr, flush=True)
        trainer = Trainer(settings, classes, loader, device)
        trainer.restore()
        with stop_signals() as stop:
            trainer.train(stop)
        if not trainer.calibrated:
            trainer.calibrate(source)
        if loader.skipped:
            print(loader.describe_skipped(), file=sys.stderr, flush=True)


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


@dataclass
class Stop:
    """Set by a signal, read between steps."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGUSR2 (a cluster's warning) ask for a checkpoint and an end, instead of killing."""
    stop = Stop()

    def ask(number: int, _: Any) -> None:
        stop.signal = number

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread, where no signal arrives
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """Network, optimiser and position of one run."""

    def __init__(
        self, settings: PretrainSettings, classes: int, loader: TwoViewLoader, device: torch.device
    ) -> None:
        self.settings, self.loader, self.device = settings, loader, device
        torch.manual_seed(settings.seed)
        network = LVNet(settings.model, settings.latent, settings.view.resolution, classes)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.optimiser = build_optimiser(self.network, settings.optimiser)
        self.noise = torch.Generator(device=device)
        self.step = 0
        self.steps = settings.epochs * len(loader)
        self.calibrated = False
        self.folder = settings.out / "checkpoints"

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one."""
        found = checkpoint.load_latest(self.folder)
        if found is None:
            return
        state = found[1]
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.calibrated = state["step"], state["calibrated"]
        if self.step < self.steps:  # a finished run stands at its end, not at an epoch's beginning
            self.loader.set_position(*divmod(self.step, len(self.loader)))

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "calibrated": self.calibrated,
        }
        checkpoint.save(self.folder, self.step, state)

    def train(self, stop: Stop) -> None:
        """All steps from the present one on."""
        if self.step >= self.steps:
            return
        settings = self.settings
        title = f"pretrain {settings.out.name} ({settings.latent.family})"
        progress = Progress(title, self.steps, self.step, settings.batch_size)
        metrics = Metrics(settings.out, self.step)
        logged = Window(settings.batch_size)
        saved = time.monotonic()
        try:
            while self.step < self.steps:
                batches = iter(self.loader)
                while (batch := logged.next_batch(batches)) is not None:
                    try:
                        figures = self.train_step(batch.to(self.device))
                    except FloatingPointError as error:  # on a CPU the loss itself sees it, and says what
                        raise self.diverged(str(error), batch) from error
                    self.step += 1
                    if self.step % settings.log_every == 0 or self.step == self.steps:
                        row = self.describe(figures, logged)
                        metrics.write(row)
                        self.check_finite(row, batch)
                        note = f"loss {row['loss']:.3f} · rate {row['rate_bits']:.0f} bits"
                        progress.update(self.step, note)
                    due = time.monotonic() - saved >= 60 * settings.checkpoint_minutes
                    if due or stop.signal or self.step % len(self.loader) == 0:
                        self.save()
                        saved = time.monotonic()
                    if stop.signal:
                        name = signal.Signals(stop.signal).name
                        raise Interrupted(f"{name}: stopped at step {self.step}, saved; go on with --resume")
        finally:
            progress.close()
            metrics.close()

    def train_step(self, batch: ViewBatch) -> dict[str, Tensor]:
        """One step of the optimiser; its figures stay tensors on the device, so that nothing waits for it."""
        settings = self.settings
        fraction = self.step / self.steps
        lr = learning_rate(self.step, self.steps, len(self.loader), settings.optimiser)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        # Noise keyed by (seed, step): a resumed or repeated step draws the same, whatever was drawn before.
        self.noise.manual_seed((settings.seed * 1_000_003 + self.step) % 2**63)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            outputs = self.network(batch.views.flatten(0, 1), self.noise, fraction)
            probes = self.network.probe_logits(outputs)
        figures = objective(outputs, settings, fraction)
        loss = figures["loss"]
        labels = batch.labels.repeat(2)
        for name, logits in probes.items():
            loss = loss + F.cross_entropy(logits.float(), labels)
            figures[f"probe_{name}"] = (logits.argmax(1) == labels).float().mean() * 100
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return {name: value.detach() for name, value in figures.items()}

    def describe(self, figures: dict[str, Tensor], logged: "Window") -> dict[str, Any]:
        """One row of metrics.jsonl. The only place where the host waits for the device."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.step / len(self.loader)}
        row.update({name: value.item() for name, value in figures.items()})
        row["lr"] = self.optimiser.param_groups[0]["lr"]
        if self.settings.on_error == "skip":
            row["skipped"] = self.loader.skipped
        return row | logged.speed()

    def check_finite(self, row: dict[str, Any], batch: ViewBatch) -> None:
        """A weight that is NaN never recovers, so the loss is looked at wherever it is read anyway."""
        if not math.isfinite(row["loss"]):
            raise self.diverged(f"the loss is {row['loss']}", batch)

    def diverged(self, what: str, batch: ViewBatch) -> FloatingPointError:
        """The error to raise, once the batch's indices are kept."""
        indices = self.settings.out / "non_finite_batch.npy"
        np.save(indices, batch.indices.cpu().numpy())
        advice = "Lower --lr, or raise --temperature"
        return FloatingPointError(f"step {self.step}: {what}; the batch's indices are in {indices}. {advice}")

    def calibrate(self, source: Source) -> None:
        """Exact statistics for the code's thresholds, from the training images without augmentation."""
        self.network.eval()
        chosen = np.linspace(0, len(source) - 1, min(len(source), CALIBRATION_IMAGES)).astype(np.int64)
        batches = evaluation_batches(
            source, self.settings.view, 256, self.settings.workers, chosen, self.settings.on_error
        )
        with torch.no_grad():
            features = [self.network.backbone(images.to(self.device)).float() for images, _ in batches]
        self.network.calibrate(torch.cat(features))
        self.calibrated = True
        self.save()


class Window:
    """Images a second and the share of time spent waiting for data, since they were last asked for."""

    def __init__(self, images_per_step: int) -> None:
        self.images = images_per_step
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next_batch(self, batches: Iterator[ViewBatch]) -> ViewBatch | None:
        started = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - started
        self.steps += batch is not None
        return batch

    def speed(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "images_per_second": self.steps * self.images / elapsed,
            "data_percent": 100 * self.waited / elapsed,
        }
        self.reset()
        return figures
