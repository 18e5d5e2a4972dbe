"""The loop that pretraining, linear evaluation and fine-tuning share: position, checkpoints, signals, log,
and the handling of non-finite steps. Each of them implements its own step.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lvssl.latents.noise import Noise, key_of, rows_of
from lvssl.models.utilisation import peak_flops
from lvssl.runs import checkpoint
from lvssl.runs.progress import Metrics, Progress, ThroughputMeter
from lvssl.training.distributed import World, all_reduce_max, everywhere, from_first, mean_over_ranks
from lvssl.training.gradients import GradientAllReducer, clip_gradients
from lvssl.training.stopping import Interrupted, Stop
from pipelines.loader import TwoViewLoader, ViewBatch

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Pace:
    """How often a training logs and saves, and when it gives up.

    Attributes:
        batch_size: images per step, over all ranks.
        keep: number of checkpoints. non_finite_steps: this many in a row end the training.
        clip: maximum norm of all gradients together; 0 means no clipping.
        timeout_minutes: how long a rank waits for another's gradients.
        sinks: where figures are logged in addition to metrics.jsonl.
    """

    batch_size: int
    log_every: int
    checkpoint_minutes: float
    keep: int = 2
    non_finite_steps: int = 3
    clip: float = 0.0
    timeout_minutes: float = 10.0
    sinks: tuple[str, ...] = ("tensorboard",)


class Loop(ABC):
    """One resumable training in a folder, on one of `world`'s ranks.

    Attributes:
        operations: of the backbone per image, forward and backward; 0: not counted. peak: of one GPU, per
            second, if known.
        step, steps: optimiser steps done, and in total. seconds: training time, across interruptions.
        host_reads: whether the host may read a step's results before the next step; None: only on a CPU,
            because elsewhere it would wait for the device. False on a CPU takes the GPU's code path.
    """

    title: str
    remedy = "Lower --lr"  # if steps stay non-finite
    resuming = "the same command resumes it"

    def __init__(
        self,
        folder: Path,
        loader: TwoViewLoader,
        device: torch.device,
        world: World,
        pace: Pace,
        host_reads: bool | None,
    ) -> None:
        self.folder, self.loader, self.device, self.world, self.pace = folder, loader, device, world, pace
        self.host_reads = device.type == "cpu" if host_reads is None else host_reads
        self.step = self.steps = 0
        self.operations, self.peak = 0.0, peak_flops(device)
        self.seconds = 0.0
        self.saved = self.started = time.monotonic()
        self.writer = checkpoint.Writer()
        self.key = torch.zeros(1, dtype=torch.int64, device=device)  # of the step's noise

    def trains(self, network: nn.Module, optimiser: torch.optim.Optimizer, fp16: bool) -> None:
        """Set what is trained; call it before the first step."""
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimiser = optimiser
        self.averaging = GradientAllReducer(self.parameters, self.pace.timeout_minutes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.finite = NonFiniteMonitor(network)

    @abstractmethod
    def train_step(self, batch: ViewBatch) -> Figures:
        """Take one optimiser step; return its figures, with "loss", as tensors on the device."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that a resumed training needs, including "step"."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def advice(self) -> str:
        """What to change if memory runs out."""

    def note(self, row: dict[str, Any]) -> str:
        """Format a row of the log for the terminal."""
        return f"loss {row['loss']:.3f} · data {row['data_percent']:.0f} %"

    # -- the state on disk ------------------------------------------------------------------------

    def save(self) -> None:
        """Save the state on rank 0, in the background; the next call or `writer.wait()` raises its errors."""
        if self.world.first:
            self.writer.save(self.folder / "checkpoints", self.step, self.state(), self.pace.keep)

    def restore(self) -> None:
        """Load the newest checkpoint that rank 0 finds undamaged, if there is any.

        Raises InputError if all checkpoints are damaged.
        """
        found = from_first(self.world, lambda: checkpoint.latest(self.folder / "checkpoints"))
        if found is not None:
            state = checkpoint.load(found)
            self.load_state(state)
            self.step = state["step"]

    # -- the loop ---------------------------------------------------------------------------------

    def train(self, stop: Stop) -> None:
        """Train to the last step, or until any rank receives a signal.

        Raises:
            Interrupted: on all ranks, once the state is saved.
            FloatingPointError: too many non-finite steps in a row. MemoryError: names the setting to change.
        """
        log = Log(self) if self.world.first else None
        window = ThroughputMeter(self.pace.batch_size, self.device, self.loader)
        self.saved = self.started = time.monotonic()
        try:
            with self.writer:
                self.loader.set_position(*divmod(self.step, len(self.loader)))
                while self.step < self.steps:
                    self.epoch(window, log, stop)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise MemoryError(f"out of memory {self.advice()}. ({first})") from error
        finally:
            if log:
                log.close()

    def epoch(self, window: ThroughputMeter, log: Log | None, stop: Stop) -> None:
        """Train the remaining steps of an epoch, and log a row where one is due."""
        batches = iter(self.loader)
        while self.step < self.steps and (batch := next(batches, None)) is not None:
            window.steps += 1
            figures = self.train_step(batch.to(self.device))
            self.step += 1
            if self.step % self.pace.log_every == 0 or self.step == self.steps:
                row = self.row(figures) | self.speed(window)
                if log:
                    log.write(row)
            self.between_steps(stop)

    def draw_from(self, seed: int) -> None:
        """Key the noise by (seed, step), so that a resumed or repeated step draws the same."""
        self.key.fill_(key_of(seed, self.step))

    def noise(self, count: int, views: int) -> Noise:
        """Return this step's noise for `count` images of this rank, equally many of each of `views` views."""
        return Noise(self.key, rows_of(count, views, self.world.rank, self.world.size, self.device))

    def speed(self, window: ThroughputMeter) -> dict[str, float]:
        """`ThroughputMeter.speed`, and the percentage of the GPUs' peak, if all that it takes is known."""
        found = window.speed()
        if self.peak and self.operations:
            share = found["images_per_second"] * self.operations / (self.peak * self.world.size)
            found["mfu_percent"] = 100 * share
        return found

    def update(self, loss: Tensor) -> Tensor:
        """Take an optimiser step if the gradients are finite; return that as a bool on the device."""
        self.averaging.finish()
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimiser)
        norm = clip_gradients(self.parameters, self.pace.clip)
        finite = norm.isfinite()
        if scaled:
            # Overflowing gradients are part of the search for a scale, down to 1, and not a failure.
            searching = self.scaler.scale(torch.ones_like(norm)) > 1
            finite = everywhere(loss.detach().isfinite()) & (finite | searching)
            self.scaler.step(self.optimiser)
            self.scaler.update()
        elif not self.host_reads:
            self.optimiser.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimiser.step()
        elif finite:
            self.optimiser.step()
        return finite

    def between_steps(self, stop: Stop) -> None:
        """Agree on all ranks whether to go on. Rank 0 saves when it is time, at the end of the first epoch,
        so that there is an early checkpoint, and at the end of the last."""
        asked, bad = all_reduce_max(stop.signal, self.finite.in_a_row())
        if bad >= self.pace.non_finite_steps:
            raise self.diverged()
        now = time.monotonic()
        due = now - self.saved >= 60 * self.pace.checkpoint_minutes
        if due or asked or self.step in (len(self.loader), self.steps):
            self.seconds += now - self.started
            self.saved = self.started = now
            self.save()
        if asked:
            self.writer.wait()
            name = signal.Signals(asked).name
            raise Interrupted(f"{name}: stopped at step {self.step}, saved; {self.resuming}")

    def row(self, figures: Figures) -> dict[str, Any]:
        """Return a row of metrics.jsonl, over all ranks. Only here does the host wait for the device."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.step / len(self.loader)}
        if figures:
            values = mean_over_ranks(torch.stack([value.float() for value in figures.values()]))
            row.update(zip(figures, values.tolist()))
        row["lr"] = float(self.optimiser.param_groups[0]["lr"])
        return row

    def diverged(self) -> FloatingPointError:
        """Save the indices of this rank's part of the batch, and return the error to raise."""
        part = "" if self.world.first else f"_rank{self.world.rank}"
        path = self.folder / f"non_finite_batch{part}.npy"
        if self.finite.indices is not None:
            np.save(path, self.finite.indices.cpu().numpy())
        what = self.finite.reason or "the gradient is not finite"
        count = self.pace.non_finite_steps
        return FloatingPointError(
            f"step {self.step}, the last of {count} in a row: {what}; the batch's indices are in {path}. "
            f"{self.remedy}"
        )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, says so; a failed recording raises an error of its own."""
    if error is None:
        return False
    words = ("can't allocate memory", "not enough memory", "out of memory")
    here = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in words)
    return here or out_of_memory(error.__cause__ or error.__context__)


class NonFiniteMonitor:
    """Counts non-finite steps in a row without waiting for the device, and undoes their batch statistics.

    Statistics are kept and restored all together, so the number of launches doesn't grow with theirs.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.waiting: deque[tuple[Tensor, Any, Tensor]] = deque()
        self.bad = 0
        self.reason = ""
        self.indices: Tensor | None = None
        self.kept: list[Tensor] = []

    def statistics(self) -> list[list[Tensor]]:
        """Return the running statistics and the counters of batches, grouped by type."""
        running = [s for layer in self.layers for s in (layer.running_mean, layer.running_var)]
        counters = [layer.num_batches_tracked for layer in self.layers]
        groups = ([s for s in group if s is not None] for group in (running, counters))
        return [group for group in groups if group]

    def keep(self) -> None:
        """Keep the running statistics from before the step."""
        self.kept = [joined(group) for group in self.statistics()]

    def undo(self, finite: Tensor) -> None:
        """Restore the statistics from before the step, unless it was `finite`, a bool on the device."""
        for kept, group in zip(self.kept, self.statistics()):
            put(torch.where(finite, joined(group), kept), group)

    def see(self, finite: Tensor, indices: Tensor) -> None:
        """Queue a step's `finite`, a bool on the device, which `in_a_row` counts once it is computed."""
        event = None
        if finite.is_cuda:
            event, stream = torch.cuda.Event(), torch.cuda.current_stream(finite.device)
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event.record(stream)
        self.waiting.append((finite, event, indices))

    def in_a_row(self) -> int:
        """Count the last non-finite steps in a row, among those that the device has finished."""
        while self.waiting and (self.waiting[0][1] is None or self.waiting[0][1].query()):
            finite, _, indices = self.waiting.popleft()
            if finite:
                self.bad = 0
            else:
                self.bad, self.indices = self.bad + 1, indices
        return self.bad


def joined(tensors: list[Tensor]) -> Tensor:
    """Join the tensors' numbers in one tensor, [N]."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def put(numbers: Tensor, tensors: list[Tensor]) -> None:
    """Copy the numbers that `joined` has joined back into the tensors."""
    parts = numbers.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


class Log:
    """Log of a training, on rank 0: metrics.jsonl, the sinks and the terminal."""

    def __init__(self, loop: Loop) -> None:
        loop.folder.mkdir(parents=True, exist_ok=True)
        self.loop = loop
        self.metrics = Metrics(loop.folder, loop.step, loop.pace.sinks)
        self.progress = Progress(loop.title, loop.steps, loop.step, loop.pace.batch_size)

    def write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.progress.update(row["step"], self.loop.note(row))

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
