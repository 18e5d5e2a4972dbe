"""Pretraining's network, loss and step."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvssl.losses.distributed import equal_parts
from lvssl.models.device import autocast, layout, precision
from lvssl.models.network import LVNet
from lvssl.models.utilisation import operations
from lvssl.runs.run import require_weights_of
from lvssl.settings.pretrain import PretrainSettings
from lvssl.training.average import Average
from lvssl.training.distributed import World, broadcast_state, gathered
from lvssl.training.features import figures as of_features
from lvssl.training.gradients import backward
from lvssl.training.health import health, warn
from lvssl.training.loop import Figures, Loop, Pace
from lvssl.training.objective import objective, rate_weight
from lvssl.training.optimiser import build_optimiser, capturable, learning_rate, restore_optimiser
from lvssl.training.prepare import compiles, prepared, recompute_blocks
from lvssl.training.recorded import Recorded
from lvssl.training.stopping import Stop
from pipelines.loader import TwoViewLoader, ViewBatch


class Trainer(Loop):
    """Pretraining: network, loss and step. `host_reads` as for `Loop`; `initial`: weights from which the
    backbone starts."""

    title = "pretrain"
    remedy = "Lower --lr, set --clip 1, or raise --temperature"
    resuming = "resume it with --resume"

    def __init__(
        self,
        settings: PretrainSettings,
        classes: int,
        loader: TwoViewLoader,
        device: torch.device,
        world: World = World(),  # noqa: B008 (frozen)
        host_reads: bool | None = None,
        initial: dict[str, Tensor] | None = None,
    ) -> None:
        engine = settings.engine
        pace = Pace(
            settings.batch_size, settings.log_every, settings.checkpoint_minutes, engine.keep,
            engine.non_finite_steps, settings.optimiser.clip, engine.timeout_minutes, settings.log,
        )  # fmt: skip
        super().__init__(settings.out, loader, device, world, pace, host_reads)
        self.settings = settings
        torch.manual_seed(settings.seed)
        network = LVNet(settings.model, settings.latent, settings.view.resolution, classes)
        if initial is not None:
            network.backbone.load_state_dict(initial)
        self.network = prepared(network, engine, device, world.size)
        broadcast_state(self.network)
        self.ema = Average(self.network, engine.ema) if engine.ema else None
        self.steps = settings.epochs * len(loader)
        self.compiled = compiles(settings, self.steps * settings.batch_size, device, world.size)
        if engine.recompute:  # in place, like compilation, and after the average's copy, which needs neither
            recompute_blocks(self.network.backbone)
        if self.compiled:
            self.network.backbone.compile()
        optimiser = build_optimiser(self.network, settings.optimiser, fused=not self.host_reads)
        self.trains(self.network, optimiser, precision(engine, device) == torch.float16)
        self.lr = torch.zeros((), device=device)
        self.recorded = self.recording()
        if self.peak:
            self.operations = 2 * operations(settings.model.backbone, settings.view.resolution)
        self.calibrated = False
        self.alarms: set[str] = set()

    # -- the state on disk ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs. The noise has no state: it is keyed by (seed, step)."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,  # also that of the schedule, the loader and the metrics
            "calibrated": self.calibrated,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        where = self.settings.out
        require_weights_of(self.network, state["network"], where / "checkpoints", where)
        self.network.load_state_dict(state["network"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        restore_optimiser(self.optimiser, state["optimiser"])
        self.recorded = self.recording()  # torch has replaced its groups and the rate by copies
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        self.calibrated = state["calibrated"]

    # -- a step -----------------------------------------------------------------------------------

    def train(self, stop: Stop) -> None:
        """See `Loop.train`."""
        self.network.train()
        super().train(stop)

    def train_step(self, batch: ViewBatch) -> Figures:
        """See `Loop.train_step`."""
        settings = self.settings
        lr = learning_rate(self.step, self.steps, len(self.loader), settings.optimiser, settings.batch_size)
        self.draw_from(settings.seed)
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

    def launch(self, logged: bool, views: Tensor, labels: Tensor) -> tuple[Figures, Tensor]:
        """Run a step on the device; return its figures, with the log's if `logged`, and if it was finite."""
        settings = self.settings
        self.optimiser.zero_grad(set_to_none=True)
        images = views.flatten(0, 1).contiguous(memory_format=layout(settings.engine))
        figures: Figures = {}

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
        except FloatingPointError as error:  # on a CPU the loss itself raises, on every rank, and says why
            self.finite.reason, finite = str(error), torch.tensor(False, device=self.device)
        self.settle(finite)
        return {name: value.detach() for name, value in figures.items()}, finite

    def recording(self) -> Recorded | None:
        """Return a recording of `launch`, or None if settings or device leave decisions to the host."""
        engine = self.settings.engine
        chosen = self.device.type == "cuda" and not (self.compiled or engine.chunk or engine.recompute)
        possible = not (self.host_reads or self.world.size > 1 or self.scaler.is_enabled())
        if not possible or not (chosen if engine.graph == "auto" else engine.graph == "on"):
            return None
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        return Recorded(self.launch, self.device, partial(capturable, self.optimiser))

    def constants(self) -> tuple[float, float]:
        """Host values on which a step's launches depend: the weight of the rate, and the annealing."""
        latent, fraction = self.settings.latent, self.step / self.steps
        annealed = latent.init_scale_start is not None or latent.relaxation_start is not None
        return rate_weight(latent, fraction), self.network.progress(fraction) if annealed else 1.0

    def loss(self, features: Tensor, labels: Tensor, logged: bool = False) -> tuple[Tensor, Figures]:
        """Return what is minimised and the figures, from h [2B, F] and the labels [B] of this rank."""
        fraction = self.step / self.steps
        with autocast(self.settings.engine, self.device):
            outputs = self.network.heads(features, self.noise(len(features), 2), fraction)
            probes = self.network.probe_logits(outputs)
        figures = objective(outputs, self.settings, fraction)
        if logged:
            figures |= health(self.network, outputs) | {"h": features, "labels": labels}
        loss = figures["loss"]
        labels = labels.repeat(2)
        for name, logits in probes.items():
            loss = loss + F.cross_entropy(logits.float(), labels)
            figures[f"probe_{name}"] = (logits.argmax(1) == labels).float().mean() * 100
        return loss, figures

    def update(self, loss: Tensor) -> Tensor:
        """See `Loop.update`."""
        finite = super().update(loss)
        if self.world.size > 1 and not self.settings.engine.sync_batch_norm:
            broadcast_state(self.network, buffers_alone=True)
        return finite

    def settle(self, finite: Tensor) -> None:
        """Undo the statistics of a non-finite step; after a finite step, update the average."""
        self.finite.undo(finite)
        if self.ema and not self.host_reads:
            self.ema.update(self.network, finite)
        elif self.ema and finite:
            self.ema.update(self.network)

    # -- log and messages -------------------------------------------------------------------------

    def row(self, figures: Figures) -> dict[str, Any]:
        """See `Loop.row`; adds the figures of the features at the end of each epoch."""
        row = super().row({name: figure for name, figure in figures.items() if figure.ndim == 0})
        if self.settings.on_error != "raise":
            row["skipped"] = self.loader.skipped
        ends = self.step % len(self.loader) < self.settings.log_every or self.step == self.steps
        if ends and "h" in figures:
            views = torch.cat(gathered(figures["h"].unflatten(0, (2, -1))), dim=1)
            labels = torch.cat(gathered(figures["labels"])) if self.network.probes is not None else None
            row |= of_features(views, labels)
        return row

    def note(self, row: dict[str, Any]) -> str:
        """See `Loop.note`; warns once of each alarm, such as posterior collapse."""
        warn(row, self.step / self.steps, self.alarms)
        note = f"data {row['data_percent']:.0f} % · {row['memory_gib']:.1f} GiB"
        if "mfu_percent" in row:
            note += f" · MFU {row['mfu_percent']:.0f} %"
        if math.isfinite(row.get("loss", math.nan)):
            note = f"loss {row['loss']:.3f} · rate {row['rate_bits']:.0f} bits · {note}"
        return note

    def advice(self) -> str:
        """See `Loop.advice`."""
        engine, views = self.settings.engine, 2 * self.settings.batch_size // self.world.size
        if not 0 < engine.chunk < views:
            change = f"--chunk {max(2, views // 4)} (the loss still sees the whole batch)"
        elif engine.chunk > 64:
            change = f"a smaller --chunk ({engine.chunk // 2})"
        else:
            change = "a smaller --batch-size"
        if not engine.recompute:
            change += ", or --recompute" + " with --compile off" * self.compiled
        return f"with {views} views on this rank: try {change}"
