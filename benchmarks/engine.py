"""How much does the training engine cost over a bare loop, and which settings make a step fast?

    python -m benchmarks.engine --json FILE              overhead, precision; matrix, exchange on two ranks
    python -m benchmarks.engine --part overhead          one of the four
    python -m benchmarks.engine --device cuda --backbone resnet50 --resolution 224 --batch 512 --json FILE

overhead: seconds per step of the engine (schedule, keyed noise, guard against non-finite values, agreement of
ranks to continue, a log line every tenth step) over those of a bare loop with the same network, loss and
optimiser on the same batches. The loops alternate step by step; the ratio is that of the medians.

precision: images per second of the engine in fp32 and in bf16, whose steps alternate, and the ratio of their
medians.

matrix: {BN, SyncBN} x {channels-last, default layout} x {eager, compiled backbone}, on --ranks ranks (on
GPUs: on all of them), in images per second over all ranks; the eight alternate. Compilation isn't timed.

exchange: gradients sent in buckets during the backward pass, over all of them sent at its end.

Batches are noise, made in advance, as a step's time doesn't depend on the content. The GPU part is untested.
"""

import argparse
import itertools
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from benchmarks.script import new_file, timing
from lvssl.commands.main import guarded
from lvssl.latents.noise import keyed
from lvssl.models.device import autocast, pick_device
from lvssl.models.network import LVNet
from lvssl.runs.run import versions
from lvssl.settings.pretrain import EngineSettings, PretrainSettings, preset
from lvssl.training.distributed import World, connected
from lvssl.training.objective import objective
from lvssl.training.optimiser import build_optimiser, learning_rate
from lvssl.training.prepare import prepared
from lvssl.training.stopping import Stop
from lvssl.training.trainer import Trainer
from pipelines.errors import InputError
from pipelines.files import write_json
from pipelines.loader import TwoViewLoader, ViewBatch

CLASSES, LOG_EVERY = 10, 10
# Parts in this process: the engine's steps by name, with their precision.
HERE = {"overhead": {"engine": "auto"}, "precision": {"fp32": "fp32", "bf16": "bf16"}}
PARTS = (*HERE, "matrix", "exchange")
Step = Callable[[ViewBatch], None]


class Batches:
    """Replaces a loader: an endless epoch."""

    def __len__(self) -> int:
        return 1_000_000


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    if options.rounds < 2:
        raise InputError("--rounds must be at least 2")
    settings = settings_of(options)
    result = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for part in options.part:
        found: Any = here(part, settings, options) if part in HERE else on_ranks(part, settings, options)
        result = with_part(result, part, found, options)
        if options.json:
            write_json(options.json, result)


def with_part(result: dict[str, Any], part: str, found: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The file's content with a part's figures, and how that part came about: other parts in the file may be
    of other settings, machines and versions."""
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "part")}
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": options.threads}
    made = {"settings": settings, "machine": machine, "versions": versions()}
    return result | {part: found, "made": result.get("made", {}) | {part: made}}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="small")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128, help="images a step, over all ranks")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU, in each rank")
    parser.add_argument("--ranks", type=int, default=0, help="of the other two; 0: 2 on a CPU, all GPUs")
    ways = ["eager", "compile"]
    parser.add_argument("--execution", nargs="+", default=ways, choices=ways, help="of the matrix")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each form")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> PretrainSettings:
    base = preset("cifar10-small")
    return replace(
        base,
        batch_size=options.batch,
        threads=options.threads,
        device=options.device,
        log_every=LOG_EVERY,
        checkpoint_minutes=1e6,
        model=replace(base.model, backbone=options.backbone),
        view=replace(base.view, resolution=options.resolution),
    )


def batches(
    settings: PretrainSettings, device: torch.device, world: World, count: int = 4
) -> list[ViewBatch]:
    """Noise in a loader's layout."""
    share, side = settings.batch_size // world.size, settings.view.resolution
    noise = torch.Generator().manual_seed(world.rank)
    made = []
    for _ in range(count):
        views = torch.randn(2, share, side, side, 3, generator=noise).permute(0, 1, 4, 2, 3)
        labels = torch.randint(CLASSES, (share,), generator=noise)
        made.append(ViewBatch(views, labels, torch.arange(share), torch.empty(0)).to(device))
    return made


def engine_step(trainer: Trainer) -> Step:
    """The work of `Trainer.train` for one batch."""
    stop = Stop()
    trainer.network.train()
    trainer.saved = time.monotonic()

    def step(batch: ViewBatch) -> None:
        figures = trainer.train_step(batch)
        trainer.step += 1
        if trainer.step % LOG_EVERY == 0:
            trainer.row(figures)
        trainer.between_steps(stop)

    return step


def bare_step(settings: PretrainSettings, device: torch.device) -> Step:
    """A minimal hand-written loop with the same network, loss and optimiser."""
    torch.manual_seed(settings.seed)
    network = LVNet(settings.model, settings.latent, settings.view.resolution, CLASSES)
    network = prepared(network, settings.engine, device).train()
    optimiser = build_optimiser(network, settings.optimiser)
    done = 0

    def step(batch: ViewBatch) -> None:
        nonlocal done
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(done, 10**6, 10**6, settings.optimiser)
        with autocast(settings.engine, device):
            images = batch.views.flatten(0, 1)
            outputs = network(images, keyed(done, len(images), device))
            probes = network.probe_logits(outputs)
        loss = objective(outputs, settings, 0.0)["loss"]
        for logits in probes.values():
            loss = loss + F.cross_entropy(logits.float(), batch.labels.repeat(2))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        done += 1
        if done % LOG_EVERY == 0:
            loss.item()

    return step


def overhead(settings: PretrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """The part of that name, as `benchmarks.before` calls it in an earlier tree, too."""
    return here("overhead", settings, options)


def here(part: str, settings: PretrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a part's two forms, and the ratio of their medians."""
    torch.set_num_threads(options.threads)
    device, world = pick_device(options.device), World()
    with tempfile.TemporaryDirectory() as folder:
        forms = {}
        for name, precision in HERE[part].items():
            chosen = replace(settings, engine=EngineSettings(precision=precision), out=Path(folder))
            trainer = Trainer(chosen, CLASSES, cast(TwoViewLoader, Batches()), device, world)
            forms[name] = engine_step(trainer)
        if part == "overhead":
            forms["bare loop"] = bare_step(settings, device)
        times = in_turns(forms, batches(settings, device, world), options.rounds, device)
    found: dict[str, Any] = {name: timing(seconds) for name, seconds in times.items()}
    for name in forms:
        found[name]["images_per_second"] = settings.batch_size / found[name]["seconds"]
        print(f"{name:10} {1e3 * found[name]['seconds']:9.2f} ms a step", flush=True)
    first, second = forms
    ratio = f"{first}_over_{second}".replace(" ", "_")
    found[ratio] = found[first]["seconds"] / found[second]["seconds"]
    found["ratio_of_neighbouring_steps"] = timing([a / b for a, b in zip(times[first], times[second])])
    print(f"{ratio} {found[ratio]:.4f}", flush=True)
    return found


def in_turns(
    forms: dict[str, Step], data: list[ViewBatch], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step of each form; the order changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(-2, rounds):  # two rounds of warm-up
        order = list(forms) if turn % 2 else list(forms)[::-1]
        for name in order:
            start = now(device)
            forms[name](data[turn % len(data)])
            if turn >= 0:
                times[name].append(now(device) - start)
    return times


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def on_ranks(part: str, settings: PretrainSettings, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each form of that part."""
    on_gpu = options.device.startswith("cuda")
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu else 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (part, ranks, port, settings, options, folder)
        mp.start_processes(one_rank, arguments, ranks, start_method="spawn")
        rows = json.loads((Path(folder) / "rows.json").read_text())
    for found in rows:
        print(f"{found['form']:32} {found['images_per_second']:9.1f} img/s on {ranks} rank(s)", flush=True)
    return rows


def one_rank(
    rank: int,
    part: str,
    ranks: int,
    port: int,
    settings: PretrainSettings,
    options: argparse.Namespace,
    folder: str,
) -> None:
    """Run on one rank; rank 0 writes the rows."""
    torch.set_num_threads(options.threads)
    world = World(rank, ranks, rank, "127.0.0.1", port)
    device = pick_device(options.device, rank)
    with connected(world, device):

        def trainer(**engine: Any) -> Trainer:
            chosen = replace(settings, engine=EngineSettings(**engine), out=Path(folder))
            return Trainer(chosen, CLASSES, cast(TwoViewLoader, Batches()), device, world)

        forms = matrix(trainer, options.execution) if part == "matrix" else exchange(trainer)
        times = in_turns(forms, batches(settings, device, world), options.rounds, device)
    if world.first:
        rows: list[dict[str, Any]] = []
        for name, seconds in times.items():
            found = timing(seconds)
            speed = settings.batch_size // ranks * ranks / found["seconds"]  # as `batches` shares them out
            rows.append({"form": name, "ranks": ranks, "images_per_second": speed} | found)
        (Path(folder) / "rows.json").write_text(json.dumps(rows))


def matrix(trainer: Callable[..., Trainer], executions: list[str]) -> dict[str, Step]:
    forms = {}
    for sync, last, execution in itertools.product((False, True), (True, False), executions):
        layout = "channels-last" if last else "default"
        made = trainer(
            channels_last=last, compile="on" if execution == "compile" else "off", sync_batch_norm=sync
        )
        forms[f"{'SyncBN' if sync else 'BN':6} {layout:13} {execution}"] = engine_step(made)
    return forms


def exchange(trainer: Callable[..., Trainer]) -> dict[str, Step]:
    late = trainer()
    late.averaging.held = True
    return {"during the backward pass": engine_step(trainer()), "at its end": engine_step(late)}


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
