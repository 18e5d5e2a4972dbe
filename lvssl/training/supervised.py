"""Training with labels on top of a pretrained encoder: the loop that `linear` and `finetune` share.

It follows the published protocols (Chen et al. 2020, B.5 and B.6): SGD with Nesterov momentum 0.9, no
warm-up, cosine to 0, random crops and flips alone. A step is a function of (settings, step), so that a
training resumed from its newest checkpoint ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lvssl.latents.noise import Noise
from lvssl.models.device import autocast, precision
from lvssl.models.inference import infer
from lvssl.models.network import LVNet
from lvssl.runs.labels import LabelledDataset, readable, say_left_out
from lvssl.settings.pretrain import EngineSettings, OptimiserSettings
from lvssl.training.batchnorm import synchronised
from lvssl.training.distributed import World, broadcast_state
from lvssl.training.loop import Figures, Loop, Pace
from lvssl.training.optimiser import build_optimiser, restore_optimiser
from lvssl.training.stopping import Stop
from pipelines.augment import augmenter_for
from pipelines.loader import LoaderSettings, TwoViewLoader, ViewBatch
from pipelines.views import ViewSettings


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training."""

    epochs: int
    batch_size: int
    lr: float  # the peak, for this batch size
    weight_decay: float
    seed: int
    checkpoint_minutes: float
    log_every: int
    workers: int
    min_steps: int = 0  # epochs are added until this many are done
    engine: EngineSettings = EngineSettings()  # noqa: RUF009 (frozen); its precision is what counts


def scaled_lr(lr: float, batch_size: int) -> float:
    """Apply the linear scaling rule to `lr`, which is for a batch of 256."""
    return lr * batch_size / 256


def largest_batch(wanted: int, images: int, ranks: int) -> int:
    """Return the wanted batch size or, if there are fewer images, as many as the ranks can share equally."""
    return wanted if wanted <= images else images // ranks * ranks


class Classifier(nn.Module):
    """Encoder -> representation -> linear layer -> logits [N, C], or standardised targets [N, T].

    A `frozen` encoder stays as it is, in eval mode, and gets no gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: LVNet, on: str, train: LabelledDataset, frozen: bool, seed: int) -> None:
        super().__init__()
        self.network, self.on, self.frozen = network, on, frozen
        used = {id(p) for part in trained_parts(network, on) for p in part.parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(not frozen and id(parameter) in used)
        self.linear = nn.Linear(width(network, on), train.outputs)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        shape = len(train.targets) or 1
        mean, std = torch.zeros(shape), torch.ones(shape)
        if train.targets:
            mean, std = train.answers.mean(0), train.answers.std(0, correction=0).clamp_min(1e-12)
        self.register_buffer("mean", mean)  # of the training answers
        self.register_buffer("std", std)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def forward(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the outputs. `noise` is that of the latent, in training."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            representation = represent(self.network, images, self.on, noise)
        return self.linear(representation)

    def loss(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Cross-entropy of classes, or the mean squared error of standardised targets."""
        if answers.is_floating_point():
            return F.mse_loss(outputs.float(), (answers - self.mean) / self.std)
        return F.cross_entropy(outputs.float(), answers)

    def in_units(self, outputs: Tensor) -> Tensor:
        """Convert targets to their own units; logits stay as they are."""
        return outputs.float() * self.std + self.mean


def trained_parts(network: LVNet, on: str) -> list[nn.Module]:
    if on == "features":
        return [network.backbone]
    between = [network.projector] if network.latent.site == "proj" else []
    return [network.backbone, *between, network.head]


def represent(network: LVNet, images: Tensor, on: str, noise: Noise | None = None) -> Tensor:
    """Return the representation `on`, float32 [N, W]. features: h. latent: the mean of K samples with this
    noise or, without noise, the posterior's mean. code: its bits as +-1."""
    if on == "features":
        return network.features(images).float()
    _, posterior = network.encode(images)
    if on == "code":
        return posterior.code().float() * 2 - 1
    if noise is not None:
        return posterior.sample(network.latent.samples, noise, network.latent.relaxation).mean(dim=0).float()
    return posterior.mean().float()


def width(network: LVNet, on: str) -> int:
    """Length of a representation (see `represent`)."""
    if on == "features":
        return network.feature_dim
    return network.family.code_bits(network.dim) if on == "code" else network.dim


def plain(view: ViewSettings) -> ViewSettings:
    """Keep the crops and flips of the pretraining, and leave colours as they are."""
    return replace(view, jitter=0.0, grey=0.0, blur=0.0, solarise=0.0)


class SupervisedTrainer(Loop):
    """Training with labels: model, images and step. `host_reads` as for `Loop`."""

    def __init__(
        self,
        folder: Path,
        model: Classifier,
        train: LabelledDataset,
        view: ViewSettings,
        recipe: Recipe,
        device: torch.device,
        world: World = World(),  # noqa: B008 (frozen)
        host_reads: bool | None = None,
    ) -> None:
        loader = TwoViewLoader(
            train.source,
            plain(view),
            LoaderSettings(
                recipe.batch_size,
                recipe.seed,
                recipe.workers,
                rank=world.rank,
                ranks=world.size,
                on_error=train.on_error,
                augmenter=augmenter_for(device),
                device=device,
                views=1,
            ),
        )
        pace = Pace(recipe.batch_size, recipe.log_every, recipe.checkpoint_minutes)
        super().__init__(folder, loader, device, world, pace, host_reads)
        self.recipe = recipe
        self.model = model.to(device).to(memory_format=torch.channels_last)
        if world.size > 1 and not model.frozen:
            synchronised(self.model)
        broadcast_state(self.model)
        self.answers = train.answers.to(device)
        self.steps = max(recipe.epochs * len(self.loader), recipe.min_steps)
        sgd = OptimiserSettings("sgd", recipe.lr, "given", recipe.weight_decay, momentum=0.9, nesterov=True)
        optimiser = build_optimiser(model, sgd, fused=not self.host_reads)
        self.trains(self.trained(), optimiser, precision(recipe.engine, device) == torch.float16)

    def run(self, stop: Stop, title: str) -> None:
        """Train to the end, from the newest checkpoint or from the beginning.

        Raises:
            Interrupted: SIGTERM or SIGUSR2 was received; the state is saved.
            FloatingPointError: too many non-finite steps in a row. MemoryError: names the setting to change.
        """
        self.title = title
        self.restore()
        with self.loader:
            if self.step < self.steps:
                self.train(stop)
            if self.loader.skipped:
                print(self.loader.describe_skipped(), file=sys.stderr, flush=True)

    def train_step(self, batch: ViewBatch) -> Figures:
        """Take one step of SGD."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.model.train()
        self.draw_from(self.recipe.seed)
        self.finite.keep()
        with autocast(self.recipe.engine, self.device):
            outputs = self.model(batch.views[0], self.noise(len(batch.views[0]), 1))
        loss = self.model.loss(outputs, self.answers[batch.indices])
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        finite = self.update(loss)
        self.finite.undo(finite)
        self.finite.see(finite, batch.indices)
        return {"loss": loss.detach()}

    def advice(self) -> str:
        """See `Loop.advice`."""
        images = self.recipe.batch_size // self.world.size
        return f"with {images} images on this rank: try a smaller --batch-size"

    def describe(self) -> dict[str, Any]:
        """Describe the training, for its result."""
        images = self.steps * self.recipe.batch_size
        speed = images / max(self.seconds, 1e-9)
        return {
            "steps": self.steps,
            "batch_size": self.recipe.batch_size,
            "peak_lr": self.recipe.lr,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(speed, 1),
        }

    def trained(self) -> nn.Module:
        """Return only what is trained: a frozen encoder is in the run's checkpoint already."""
        return self.model.linear if self.model.frozen else self.model

    def state(self) -> dict[str, Any]:
        """See `Loop.state`."""
        return {
            "model": self.trained().state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.trained().load_state_dict(state["model"])
        restore_optimiser(self.optimiser, state["optimiser"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.seconds = state["seconds"]


def predict(
    model: Classifier,
    data: LabelledDataset,
    view: ViewSettings,
    workers: int,
    world: World = World(),  # noqa: B008 (frozen)
    title: str = "",
    engine: EngineSettings = EngineSettings(),  # noqa: B008 (frozen)
) -> tuple[Tensor, Tensor]:
    """Return logits or targets of each image's centre crop, float32 [N, C], and the true answers, on the CPU.

    They are in the set's order, without the images that are skipped. Each rank reads its part of the images,
    each image once, and gets all predictions.
    """
    own = np.arange(world.rank, len(data), world.size)
    predictions = torch.zeros(len(data), model.linear.out_features)
    seen = torch.zeros(len(data))

    def answered(images: Tensor) -> Tensor:
        with autocast(engine, images.device):
            return model.in_units(model(images))

    batches = readable(data.source, view, workers, data.on_error, own, title if world.first else "")
    for outputs, indices in infer(model, batches, view, answered):
        rows = torch.from_numpy(indices)
        predictions[rows], seen[rows] = outputs.cpu(), 1.0
    if world.size > 1:
        for mine in (predictions, seen):
            dist.all_reduce(mine)  # the other ranks' rows are 0
    rows = seen.nonzero()[:, 0]
    if world.first:
        say_left_out(data.path, len(data), rows.numpy())
    return predictions[rows], data.answers[rows]
