"""A run in progress: one step after the other, its state on disk, its figures in the log."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lvssl.config import PretrainSettings
from lvssl.losses.distributed import equal_parts
from lvssl.losses.objective import beta_at
from lvssl.models.network import LVNet
from lvssl.training import checkpoint
from lvssl.training.average import Average
from lvssl.training.distributed import World, broadcast_state, from_first, highest, mean_over_ranks
from lvssl.training.gradients import Averaging, backward, guard
from lvssl.training.health import health, warn
from lvssl.training.objective import objective
from lvssl.training.optimiser import build_optimiser, capturable, learning_rate, restore_optimiser
from lvssl.training.prepare import accelerate, autocast, layout, precision, prepared
from lvssl.training.progress import Metrics, Progress, Window
from lvssl.training.recorded import Recorded
from lvssl.training.stopping import Interrupted, Stop
from pipelines.loader import TwoViewLoader, ViewBatch


class Trainer:
    """Network, optimiser and position of one run, on one of its ranks.

    Args:
        host_reads: whether the host may look at what a step computed before the next begins; None: on a CPU
            alone, for elsewhere it would wait for the device. False on a CPU takes the way of a GPU.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        classes: int,
        loader: TwoViewLoader,
        device: torch.device,
        world: World = World(),  # noqa: B008 (frozen)
        host_reads: bool | None = None,
    ) -> None:
        self.settings, self.loader, self.device, self.world = settings, loader, device, world
        self.host_reads = device.type == "cpu" if host_reads is None else host_reads
        engine = settings.engine
        torch.manual_seed(settings.seed)
        network = LVNet(settings.model, settings.latent, settings.view.resolution, classes)
        self.network = prepared(network, engine, device, world.size)
        broadcast_state(self.network)
        self.parameters = list(self.network.parameters())
        self.ema = Average(self.network, engine.ema) if engine.ema else None
        accelerate(self.network.backbone, engine)
        self.averaging = Averaging(self.parameters)
        self.optimiser = build_optimiser(self.network, settings.optimiser, fused=not self.host_reads)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(engine, device) == torch.float16)
        self.noise = torch.Generator(device=device)
        self.finite = Finite(self.network, self.host_reads)
        self.lr = torch.zeros((), device=device)
        self.recorded = self.recording()
        self.step = 0
        self.steps = settings.epochs * len(loader)
        self.calibrated = False
        self.folder, self.writer = settings.out / "checkpoints", checkpoint.Writer()

    # -- the state on disk ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs. The noise needs nothing, for it is keyed by (seed, step)."""
        epoch, step = divmod(self.step, len(self.loader))  # an end of an epoch is the next one's beginning
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": {"epoch": epoch, "step": step},
            "random": torch.get_rng_state(),
            "step": self.step,  # of the schedule and of the metrics, too
            "calibrated": self.calibrated,
        }

    def save(self) -> None:
        """Of rank 0, beside what follows; an error shows at the next call, or at `writer.wait()`."""
        if self.world.first:
            self.writer.save(self.folder, self.step, self.state(), self.settings.engine.keep)

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one: the one that rank 0 finds to be whole."""
        found = from_first(self.world, lambda: checkpoint.latest(self.folder))
        if found is None:
            return
        state = checkpoint.load(found)
        self.network.load_state_dict(state["network"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        restore_optimiser(self.optimiser, state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        self.step, self.calibrated = state["step"], state["calibrated"]
        self.loader.load_state_dict(state["loader"])

    # -- the loop ---------------------------------------------------------------------------------

    def train(self, stop: Stop) -> None:
        """Go on to the last step, or until a signal came to any rank.

        Raises:
            Interrupted: on all ranks, the state saved.
            FloatingPointError: too many non-finite steps in a row. MemoryError: names the setting to change.
        """
        self.network.train()
        log = Log(self.settings, self.step, self.steps) if self.world.first else None
        window = Window(self.settings.batch_size, self.device, self.loader)
        self.saved = time.monotonic()
        self.alarms: set[str] = set()
        try:
            with self.writer:
                while self.step < self.steps:
                    self.epoch(window, log, stop)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(self.advice(error)) from error
        finally:
            if log:
                log.close()

    def epoch(self, window: Window, log: Log | None, stop: Stop) -> None:
        """The steps that are left of an epoch, each with its row in the log where one is due."""
        batches = iter(self.loader)
        while (batch := window.next_batch(batches)) is not None:
            figures = self.train_step(batch.to(self.device))
            self.step += 1
            if self.step % self.settings.log_every == 0 or self.step == self.steps:
                row = self.describe(figures) | window.speed()
                if log:
                    log.write(row)
                    warn(row, self.step / self.steps, self.alarms)
            self.between_steps(stop)

    def train_step(self, batch: ViewBatch) -> dict[str, Tensor]:
        """One step of the optimiser; its figures stay tensors on the device, so that nothing waits for it."""
        settings = self.settings
        lr = learning_rate(self.step, self.steps, len(self.loader), settings.optimiser, settings.batch_size)
        # Noise keyed by (seed, step): a resumed or repeated step draws the same, whatever was drawn before.
        self.noise.manual_seed((settings.seed * 1_000_003 + self.step) % 2**63)
        logged = (self.step + 1) % settings.log_every == 0 or self.step + 1 == self.steps
        if self.recorded is not None:
            self.lr.fill_(lr)
            figures, finite = self.recorded(self.constants(), logged, batch.views, batch.labels)
        else:
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            figures, finite = self.launch(logged, batch.views, batch.labels)
        self.finite.see(finite, batch.indices)
        return figures

    def launch(self, logged: bool, views: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All of a step on its device: figures, those of the log too if it is `logged`, and its verdict."""
        settings = self.settings
        self.optimiser.zero_grad(set_to_none=True)
        images = views.flatten(0, 1).contiguous(memory_format=layout(settings.engine))
        figures: dict[str, Tensor] = {}

        def loss_of(features: Tensor) -> Tensor:
            loss, found = self.loss(features, labels, logged)
            figures.update(found)
            return loss

        self.finite.keep()
        try:
            context = partial(autocast, settings.engine, self.device)
            chunk = settings.engine.chunk
            scale, averaging = self.scaler.scale, self.averaging
            with equal_parts():
                backward(self.network.backbone, images, loss_of, context, chunk, scale, averaging)
            finite = self.update(figures["loss"])
        except FloatingPointError as error:  # on a CPU the loss itself sees it, on every rank, and says what
            self.finite.reason, finite = str(error), torch.tensor(False, device=self.device)
        self.settle(finite)
        return {name: value.detach() for name, value in figures.items()}, finite

    def recording(self) -> Recorded | None:
        """`launch` to be recorded, where settings and device allow it: the host decides nothing in it."""
        engine = self.settings.engine
        chosen = self.device.type == "cuda" and not (engine.compile or engine.chunk or engine.recompute)
        possible = not (self.host_reads or self.world.size > 1 or self.scaler.is_enabled())
        if not possible or not (chosen if engine.graph == "auto" else engine.graph == "on"):
            return None
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        return Recorded(self.launch, self.device, self.noise, partial(capturable, self.optimiser))

    def constants(self) -> tuple[float, float]:
        """The host's numbers that a step's launches depend on: the weight of the rate, and the annealing."""
        latent, fraction = self.settings.latent, self.step / self.steps
        schedule = latent.beta_warmup, latent.beta_schedule, latent.beta_cycles
        beta = beta_at(fraction, latent.final_beta, *schedule)
        annealed = latent.sharpness_start is not None or latent.estimator == "relaxed"
        return beta, min(1.0, fraction / latent.anneal) if annealed else 1.0

    def loss(
        self, features: Tensor, labels: Tensor, logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and the figures, from h [2B, F] and the labels [B] of this rank."""
        fraction = self.step / self.steps
        with autocast(self.settings.engine, self.device):
            place = self.world.rank, self.world.size
            outputs = self.network.heads(features, self.noise, fraction, *place)
            probes = self.network.probe_logits(outputs)
        figures = objective(outputs, self.settings, fraction)
        if logged:
            figures |= health(self.network, outputs)
        loss = figures["loss"]
        labels = labels.repeat(2)
        for name, logits in probes.items():
            loss = loss + F.cross_entropy(logits.float(), labels)
            figures[f"probe_{name}"] = (logits.argmax(1) == labels).float().mean() * 100
        return loss, figures

    def update(self, loss: Tensor) -> Tensor:
        """One step of the optimiser from the gradients, if these are finite; a bool on the device."""
        self.averaging.finish()
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimiser)
        norm = guard(self.parameters, self.settings.optimiser.clip)
        # With a loss scale, gradients that overflow are a part of its search and no failure.
        finite = (loss if scaled else norm).detach().isfinite()
        if scaled:
            self.scaler.step(self.optimiser)
            self.scaler.update()
        elif not self.host_reads:
            self.optimiser.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimiser.step()
        elif finite:
            self.optimiser.step()
        if self.world.size > 1 and not self.settings.engine.sync_batch_norm:
            broadcast_state(self.network, buffers_alone=True)
        return finite

    def settle(self, finite: Tensor) -> None:
        """Undo the statistics of a step that wasn't finite, and only then, if it was, take the average."""
        self.finite.undo(finite)
        if self.ema and not self.host_reads:
            self.ema.update(self.network, finite)
        elif self.ema and finite:
            self.ema.update(self.network)

    def between_steps(self, stop: Stop) -> None:
        """All ranks agree whether to go on; rank 0 saves when it is time, and at the end of the first epoch,
        so that there is something soon, and of the last."""
        asked, bad = highest(stop.signal, self.finite.in_a_row())
        if bad >= self.settings.engine.non_finite_steps:
            raise self.diverged()
        due = time.monotonic() - self.saved >= 60 * self.settings.checkpoint_minutes
        if due or asked or self.step in (len(self.loader), self.steps):
            self.save()
            self.saved = time.monotonic()
        if asked:
            self.writer.wait()
            name = signal.Signals(asked).name
            raise Interrupted(f"{name}: stopped at step {self.step}, saved; go on with --resume")

    def describe(self, figures: dict[str, Tensor]) -> dict[str, Any]:
        """One row of metrics.jsonl, over all ranks. The only place where the host waits for the device."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.step / len(self.loader)}
        if figures:
            values = mean_over_ranks(torch.stack([value.float() for value in figures.values()]))
            row.update(zip(figures, values.tolist()))
        row["lr"] = float(self.optimiser.param_groups[0]["lr"])
        if self.settings.on_error == "skip":
            row["skipped"] = self.loader.skipped
        return row

    # -- what can go wrong ------------------------------------------------------------------------

    def diverged(self) -> FloatingPointError:
        """The error to raise, once the indices of this rank's part of the batch are kept."""
        part = "" if self.world.first else f"_rank{self.world.rank}"
        path = self.settings.out / f"non_finite_batch{part}.npy"
        if self.finite.indices is not None:
            np.save(path, self.finite.indices.cpu().numpy())
        what = self.finite.reason or "the gradient is not finite"
        count = self.settings.engine.non_finite_steps
        return FloatingPointError(
            f"step {self.step}, the last of {count} in a row: {what}; the batch's indices are in {path}. "
            "Lower --lr, set --clip 1, or raise --temperature"
        )

    def advice(self, error: BaseException) -> str:
        """An out-of-memory error with the setting that makes it go away."""
        engine, views = self.settings.engine, 2 * self.settings.batch_size // self.world.size
        if not 0 < engine.chunk < views:
            change = f"--chunk {max(2, views // 4)} (the loss still sees the whole batch)"
        elif engine.chunk > 64:
            change = f"a smaller --chunk ({engine.chunk // 2})"
        else:
            change = "a smaller --batch-size"
        if not engine.recompute:
            change += ", or --recompute" + " without --compile" * engine.compile
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"out of memory with {views} views on this rank: try {change}. ({first})"


def out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error) for w in words)


class Finite:
    """Non-finite steps in a row, counted without waiting for the device; their batch statistics undone.

    Statistics are kept and put back all together: what that launches doesn't grow with their number.
    """

    def __init__(self, network: LVNet, host_reads: bool) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.host_reads = host_reads
        self.waiting: deque[tuple[Tensor, Any, Tensor]] = deque()
        self.bad = 0
        self.reason = ""
        self.indices: Tensor | None = None
        self.kept: list[Tensor] = []

    def statistics(self) -> list[list[Tensor]]:
        """The running statistics, and the counters of batches: those of a type together."""
        running = [s for layer in self.layers for s in (layer.running_mean, layer.running_var)]
        counters = [layer.num_batches_tracked for layer in self.layers]
        groups = ([s for s in group if s is not None] for group in (running, counters))
        return [group for group in groups if group]

    def keep(self) -> None:
        """Remember the running statistics from before the step."""
        self.kept = [joined(group) for group in self.statistics()]

    def undo(self, finite: Tensor) -> None:
        """Put back the statistics that a step has spoilt, if it wasn't `finite`, a bool on the device."""
        if not self.host_reads:
            for kept, group in zip(self.kept, self.statistics()):
                put(torch.where(finite, joined(group), kept), group)
        elif not finite:
            for kept, group in zip(self.kept, self.statistics()):
                put(kept, group)

    def see(self, finite: Tensor, indices: Tensor) -> None:
        """A step's verdict, a bool on the device, which `in_a_row` counts once the device has come to it."""
        event = None
        if finite.is_cuda:
            event, stream = torch.cuda.Event(), torch.cuda.current_stream(finite.device)
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event.record(stream)
        self.waiting.append((finite, event, indices))

    def in_a_row(self) -> int:
        """Of the steps that the device has finished."""
        while self.waiting and (self.waiting[0][1] is None or self.waiting[0][1].query()):
            finite, _, indices = self.waiting.popleft()
            if finite:
                self.bad = 0
            else:
                self.bad, self.indices = self.bad + 1, indices
        return self.bad


def joined(tensors: list[Tensor]) -> Tensor:
    """All their numbers in one tensor, [N]."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def put(numbers: Tensor, tensors: list[Tensor]) -> None:
    """What `joined` has joined, back in its places."""
    parts = numbers.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


class Log:
    """The lines of a run, on rank 0: metrics.jsonl, TensorBoard and the terminal."""

    def __init__(self, settings: PretrainSettings, step: int, steps: int) -> None:
        self.metrics = Metrics(settings.out, step)
        self.progress = Progress("pretrain", steps, step, settings.batch_size)

    def write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        note = f"data {row['data_percent']:.0f} % · {row['memory_gib']:.1f} GiB"
        if math.isfinite(row.get("loss", math.nan)):
            note = f"loss {row['loss']:.3f} · rate {row['rate_bits']:.0f} bits · {note}"
        self.progress.update(row["step"], note)

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
