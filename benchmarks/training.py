"""Does plain SimCLR learn the same with lvssl as with lightly, and how fast is each?

    convert-beton cifar10-jpeg train.beton --subset 10000
    convert-beton cifar10-jpeg test.beton --split test
    python -m benchmarks.training --train train.beton --test test.beton --json FILE

lightly's side is what its own benchmarks do: SimCLRTransform on PIL images in a DataLoader, both views in one
call of the network, NTXentLoss, AdamW without weight decay on biases and normalisation, and its
CosineWarmupScheduler. Both sides train the network of the preset, without a latent, for the same number of
steps with the preset's augmentation, batch size, temperature, rate and decay. For a seed the initial weights
are the same; views and order are each side's own. lightly's images are decoded once, before the clock starts,
and its convolutions are channels-last as ours are; ours are decoded from the beton in every epoch.

Features of both are judged in the same way: by lightly's kNN (k 200, temperature 0.1), in which no code of
ours takes part, and by our linear probe. Sides alternate. Seconds are those of whole trainings, without
imports and compilation; processor seconds, of all processes, hardly depend on other work on the machine.
"""

import dataclasses
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.peers import versions_of
from benchmarks.script import new_file, parser_of, save
from lvssl.commands.main import guarded
from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.probe import linear_probe
from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet
from lvssl.runs.differences import interval
from lvssl.runs.run import load_run, versions
from lvssl.settings.pretrain import LatentSettings, PretrainSettings, preset
from lvssl.training.pretrain import pretrain
from pipelines.cores import cores
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import evaluation_crops

SIDES = ("lvssl", "lightly")
MEASURES = ("knn", "probe")


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train", type=Path, required=True, help="a beton of square images")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10-small")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes of lightly's DataLoader")
    parser.add_argument("--threads", type=int, default=0, help="of torch, on both sides; 0: all cores")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    parser.add_argument("--json", type=new_file, help="where the figures go")
    options = parser.parse_args(arguments)
    if min(options.epochs, options.workers) < 1 or options.threads < 0:
        raise InputError("--epochs and --workers must be at least 1, --threads at least 0")
    try:
        importlib.import_module("lightly.transforms")
    except ImportError:
        raise InputError("this benchmark needs lightly: pip install lightly") from None
    torch.set_num_threads(options.threads or cores())

    train, test = (open_reader(path) for path in (options.train, options.test))
    settings = dataclasses.replace(
        preset(options.preset),
        data=options.train,
        epochs=options.epochs,
        threads=options.threads,
        device="cpu",
        latent=LatentSettings(family="none", objective="ntxent"),
    )
    whole = dataclasses.replace(settings.view, evaluation_crop=1.0)  # of square images
    images = evaluation_crops(train, whole, np.arange(len(train)))
    train_with: dict[str, Callable[[PretrainSettings], LVNet]] = {
        "lvssl": ours,
        "lightly": lambda chosen: theirs(chosen, images, options.workers),
    }
    for side, trained in train_with.items():  # imports, compilation, page cache
        trained(dataclasses.replace(settings, epochs=1, out=options.out / f"{side}-warm-up-{os.getpid()}"))
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for side, trained in train_with.items():
            folder = options.out / f"{side}-{seed}-{os.getpid()}"  # a run that exists is not trained again
            network, clocks = timed(trained, dataclasses.replace(settings, seed=seed, out=folder))
            features = [embed(network, source, settings.view) for source in (train, test)]
            count = settings.epochs * (len(train) // settings.batch_size) * settings.batch_size
            rows.append({"side": side, "seed": seed, "images": count, **clocks, **accuracies(*features)})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    result: dict[str, Any] = {
        "versions": versions() | versions_of("lightly"),
        "cores": cores(),
        "rows": rows,
        "summary": summary(rows),
    }
    for name, value in result["summary"].items():
        print(f"{name:40}{value if isinstance(value, dict) else round(value, 2)}")
    save(options.json, "training", arguments, result)


def ours(settings: PretrainSettings) -> LVNet:
    pretrain(settings)
    return load_run(settings.out, torch.device("cpu")).network


def theirs(settings: PretrainSettings, images: np.ndarray, workers: int) -> LVNet:
    """The network that lightly's parts train on these images, uint8 [N, R, R, 3]."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.utils.scheduler import CosineWarmupScheduler

    torch.manual_seed(settings.seed)
    network = LVNet(settings.model, settings.latent, settings.view.resolution)
    network = network.to(memory_format=torch.channels_last).train()
    loader = torch.utils.data.DataLoader(
        Pairs(images, settings),
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    decayed, others = get_weight_decay_parameters([network])
    optimiser = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.optimiser.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.optimiser.lr,
    )
    schedule = CosineWarmupScheduler(
        optimiser,
        warmup_epochs=int(settings.optimiser.warmup_epochs * len(loader)),  # in steps
        max_epochs=settings.epochs * len(loader),
        end_value=0.0,
    )
    criterion = NTXentLoss(temperature=settings.temperature)
    noise = keyed(0, 2 * settings.batch_size)  # unused without a latent
    for _ in range(settings.epochs):
        for views in loader:
            joined = torch.cat(views).to(memory_format=torch.channels_last)
            loss = criterion(*network(joined, noise).projections.chunk(2))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network


class Pairs(torch.utils.data.Dataset):
    """Two views of each image by lightly's transform, from memory, like torchvision's CIFAR10."""

    def __init__(self, images: np.ndarray, settings: PretrainSettings) -> None:
        from lightly.transforms import SimCLRTransform

        view = settings.view
        self.images = images
        self.transform = SimCLRTransform(
            input_size=view.resolution,
            cj_prob=view.jitter,
            cj_bright=view.brightness,
            cj_contrast=view.contrast,
            cj_sat=view.saturation,
            cj_hue=view.hue,
            min_scale=view.scale[0],
            random_gray_scale=view.grey,
            gaussian_blur=view.blur,
            sigmas=view.sigma,
            hf_prob=view.flip,
            normalize={"mean": list(view.mean), "std": list(view.std)},
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def timed(
    trained: Callable[[PretrainSettings], LVNet], settings: PretrainSettings
) -> tuple[LVNet, dict[str, float]]:
    """The network, and (wall-clock, processor) seconds, of this process and those that it has ended."""
    start, before = time.perf_counter(), os.times()
    network = trained(settings)
    taken, after = time.perf_counter() - start, os.times()
    return network, {
        "seconds": round(taken, 2),
        "processor_seconds": round(sum(after[:4]) - sum(before[:4]), 2),
    }


def accuracies(train: Embedding, test: Embedding) -> dict[str, float]:
    """Accuracy on the test images in percent, by lightly's kNN and our linear probe."""
    from lightly.utils.benchmarking import knn_predict

    bank, queries = (
        torch.nn.functional.normalize(torch.from_numpy(each.features), dim=1) for each in (train, test)
    )
    labels = torch.from_numpy(train.labels)
    classes = int(labels.max()) + 1
    near = min(200, len(bank))
    found = torch.cat(
        [knn_predict(part, bank.T, labels, classes, near)[:, 0] for part in queries.split(1000)]
    )
    return {
        "knn": round(100 * float((found.numpy() == test.labels).mean()), 2),
        "probe": linear_probe(train.features, train.labels, test.features, test.labels).accuracy,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, differences (ours minus lightly's, paired by seed), and lightly's median seconds over
    ours."""
    of = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    found: dict[str, Any] = {}
    for measure in MEASURES:
        values = {side: [row[measure] for row in of[side]] for side in SIDES}
        found |= {f"{measure}_{side}": statistics.mean(values[side]) for side in SIDES}
        found[f"{measure}_difference"] = interval(np.subtract(values["lvssl"], values["lightly"]).tolist())
    for clock in ("seconds", "processor_seconds"):
        median = {side: statistics.median(row[clock] for row in of[side]) for side in SIDES}
        found[f"{clock}_lightly_over_lvssl"] = median["lightly"] / median["lvssl"]
    return found


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
