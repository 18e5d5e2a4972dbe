"""Pretraining: from a converted data set to a run folder, in one process or as one rank of many."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch

from lvssl.models.device import claim, encoding_precision, note_if_slow, pick_device, precision
from lvssl.models.inference import infer
from lvssl.runs import checkpoint
from lvssl.runs.identity import describe_set
from lvssl.runs.initial import initial_weights
from lvssl.runs.labels import numbered_as, say_notes
from lvssl.runs.run import create_run, read_set, run_lock
from lvssl.runs.sinks import require_installed
from lvssl.settings.pretrain import PretrainSettings
from lvssl.training.distributed import World, connected, from_first, gathered, world_of
from lvssl.training.optimiser import describe_groups
from lvssl.training.prepare import keep_compiled
from lvssl.training.stopping import Stop, stop_signals
from lvssl.training.trainer import Trainer
from pipelines.augment import augmenter_for, backend_for
from pipelines.datasets.dataset import evenly_spaced
from pipelines.datasets.parts import are_there
from pipelines.decode import Reader, open_reader
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.loader import LoaderSettings, Replacements, TwoViewLoader, evaluation_batches

CALIBRATION_IMAGES = 50_000


def pretrain(
    settings: PretrainSettings, resume: bool = False, check: Callable[[], None] = lambda: None
) -> None:
    """Train from scratch, or resume from the newest checkpoint, to the end of the last epoch.

    Under torchrun or Slurm every process calls it and is a rank of the same run; only rank 0 writes.
    `check` is called after the images are opened and before the network is built; it may raise.

    Raises:
        InputError: impossible settings or data (nothing has been written), or another process trains there.
        FloatingPointError: the loss stayed non-finite. MemoryError: names the setting to change.
        Interrupted: a rank received SIGTERM or SIGUSR2; the state is saved.
        ConnectionError: another rank died.
    """
    settings.validate()
    if not (resume and (settings.out / "config.json").is_file()):
        settings.require_used()
    require_installed(settings.log)
    jpeg.read_up_to(settings.max_pixels)
    world = world_of(os.environ)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device, world.local_rank)
    claim(device, precision(settings.engine, device), settings.engine.deterministic)
    with stop_signals() as stop, connected(world, device, settings.engine.timeout_minutes):
        run(settings, resume, world, device, stop, check)


def run(
    settings: PretrainSettings,
    resume: bool,
    world: World,
    device: torch.device,
    stop: Stop,
    check: Callable[[], None],
) -> None:
    """Run `pretrain` once rank and device are known."""
    if settings.engine.graph == "on" and world.size > 1:
        raise InputError(f"--graph on supports only one rank, but there are {world.size}: leave it out")
    if resume and (settings.out / "config.json").is_file() and not are_there(settings.data):
        raise InputError(
            f"{settings.data}: the images that {settings.out} was started on are no longer there: pass "
            "them with --data, wherever they are now"
        )
    source = open_reader(settings.data, settings.source, str(device))
    if world.first:
        say_notes(source)
    if resume and (settings.out / "config.json").is_file() and (begun := read_set(settings.out)):
        source = numbered_as(source, settings.data, begun["classes"], str(settings.out))
    classes = int(source.labels.max()) + 1 if len(source) and source.labels.min() >= 0 else 0
    augmenter = augmenter_for(device, settings.augmentation, precision(settings.engine, device))
    loader = TwoViewLoader(
        source,
        settings.view,
        LoaderSettings(
            settings.batch_size,
            settings.seed,
            settings.workers,
            rank=world.rank,
            ranks=world.size,
            order=settings.order,
            on_error=settings.on_error,
            augmenter=augmenter,
            device=device,
        ),
    )
    with loader, ExitStack() as held:
        check()
        fresh = not checkpoint.paths(settings.out / "checkpoints")  # a killed run may have left part of one
        begin = None
        if settings.model.init and fresh:
            begin = initial_weights(settings.model, settings.view.resolution)
        from_first(world, lambda: create_run(settings, classes, resume, describe_set(source, settings.order)))
        from_first(world, lambda: held.enter_context(run_lock(settings.out)))
        trainer = Trainer(settings, classes, loader, device, world, initial=begin)
        if trainer.compiled:
            keep_compiled(settings.out / "compiled")
        if world.first:
            form = backend_for(device, settings.augmentation) if augmenter else "numba"
            ranks = f"{world.size} ranks, " if world.size > 1 else ""
            print(f"pretrain {settings.out.name}: {ranks}on {device}, augmented by {form}", file=sys.stderr)
            print(describe_groups(trainer.network, settings.optimiser), file=sys.stderr, flush=True)
            note_if_slow(settings.device, settings.engine, device)
        trainer.restore()
        trainer.train(stop)
        if not trainer.calibrated:
            calibrate(trainer, source)
        if loader.skipped:
            print(loader.describe_skipped(), file=sys.stderr, flush=True)


def calibrate(trainer: Trainer, source: Reader) -> None:
    """Set exact statistics for the code's thresholds, from the training images without augmentation."""
    settings, world = trainer.settings, trainer.world
    count = min(len(source), CALIBRATION_IMAGES) // world.size * world.size
    chosen = evenly_spaced(len(source), count)[world.rank :: world.size]
    for network in [trainer.network, trainer.ema.module] if trainer.ema else [trainer.network]:
        network.precision = encoding_precision(settings.engine, trainer.device)
        replacements = Replacements(source, settings.on_error)  # all ranks need equally many images
        batches = evaluation_batches(source, settings.view, 256, settings.workers, chosen, replacements)
        found = infer(network, batches, settings.view, network.features)
        with torch.compiler.set_stance("force_eager"):  # as it will be loaded; compiling takes longer
            own = torch.cat([features.float() for features, _ in found])
        network.calibrate(torch.stack(gathered(own), dim=1).flatten(0, 1))
    trainer.calibrated = True
    trainer.save()
    trainer.writer.wait()
