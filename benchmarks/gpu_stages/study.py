"""Pretraining on small images, and its evaluation by kNN, linear probe and fine-tuning: the study's stages.

Options (`Setup.options`): data, train, test, of; arm, seed, epochs, batch, compile; for the speed, arms; and
for the time to a kNN accuracy, target and every.
"""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_stages.case import Case, Row, Setup, last_line
from benchmarks.gpu_stages.steps import Endless, now, place
from pipelines.cores import loader_threads

ARMS: dict[str, dict[str, Any]] = {  # each with its latent settings; a line adds an arm
    "plain": {"family": "none"},
    "sign": {"family": "sign", "decorrelation": 0.02},
    "bernoulli": {"family": "bernoulli", "decorrelation": 0.02},
    "plain-vc": {"family": "none", "objective": "ntxent-vc"},
    "bernoulli-vc": {"family": "bernoulli", "decorrelation": 0.02, "objective": "ntxent-vc"},
    "ceb": {  # Lee et al. 2021: kappa_e = init_scale * dimensions = 1,024, one sample, no other term
        "family": "vmf", "site": "proj", "dim": 128, "objective": "ceb", "posterior_scale": "fixed",
        "init_scale": 8.0, "samples": 1, "clean_path_weight": 0.0,
    },
}  # fmt: skip
USUAL = ("plain", "sign", "bernoulli")  # the default
TUNE_LR, TUNE_BATCH = 0.05, 256  # SimCLR's rate for a batch of 256
TUNE_EPOCHS = 10
TUNE_STEPS = 200  # minimum: 1 % of the labels make two steps per epoch


def cases(setup: Setup) -> Iterator[Case]:
    """The cases of one stage, selected by its name."""
    makers: dict[str, Callable[[Setup], Any]] = {"data": data, "speed": speed, "to-knn": to_knn}
    name = setup.options.get("name", setup.stage)
    yield Case(name, lambda: makers.get(setup.stage, arm)(setup), seconds=24 * 3600)


def data(setup: Setup) -> Row:
    """The betons of both splits, converted unless they are given."""
    from pipelines.convert.conversion import ConvertOptions, convert

    options, started = setup.options, time.monotonic()
    if options["data"]:
        for split in ("train", "test"):
            if not Path(options[split]).exists():
                convert(options["data"], options[split], options=ConvertOptions(split=split))
    else:
        made_sets(setup)
    from pipelines.decode import open_reader

    counts = {f"{split}_images": len(open_reader(options[split])) for split in ("train", "test")}
    return {"ok": True, **counts, "seconds": time.monotonic() - started}


def made_sets(setup: Setup) -> None:
    """Make images whose mean colour depends on the class, for a dry run without data."""
    from benchmarks.gpu_stages import images
    from pipelines.convert.conversion import convert

    for seed, (split, count) in enumerate({"train": 320, "test": 64}.items()):
        path = Path(setup.options[split])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files = images.made(path.with_suffix(""), count, 32, seed)
            convert(str(files), path)


def settings_of(setup: Setup, arm: str, epochs: int, out: Path) -> Any:
    """ResNet-18 with the small images' stem; only the latent differs between arms."""
    from lvssl.settings.pretrain import EngineSettings, LatentSettings, preset

    options, base = setup.options, preset("cifar10-r18")
    return replace(
        base,
        data=Path(options["train"]),
        out=out,
        epochs=epochs,
        batch_size=options["batch"],
        seed=options["seed"],
        workers=loader_threads(),
        device=setup.device,
        checkpoint_minutes=1e6,
        model=replace(base.model, backbone="tiny" if setup.dry else base.model.backbone),
        latent=LatentSettings(**ARMS[arm]),
        engine=EngineSettings(compile="on" if options["compile"] else "auto"),
    )


def trainer_of(settings: Any, device: torch.device) -> tuple[Any, Any]:
    """A trainer and its loader, as in `lvssl pretrain`."""
    from lvssl.models.device import precision
    from lvssl.training.trainer import Trainer
    from pipelines.augment import augmenter_for
    from pipelines.decode import open_reader
    from pipelines.loader import LoaderSettings, TwoViewLoader

    source = open_reader(settings.data)
    augmenter = augmenter_for(device, settings.augmentation, precision(settings.engine, device))
    loader = TwoViewLoader(
        source, settings.view, LoaderSettings(settings.batch_size, settings.seed, settings.workers,
        augmenter=augmenter, device=device,
    ))  # fmt: skip
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, int(source.labels.max()) + 1, loader, device)
    trainer.network.train()
    return trainer, loader


def speed(setup: Setup) -> Iterator[Row]:
    """Images per second of each arm in `arms`; the number of epochs is computed from the slowest."""
    for name in setup.options["arms"]:
        yield {"name": f"speed, {name}", **speed_of(setup, name)}


def speed_of(setup: Setup, name: str) -> Row:
    settings = settings_of(setup, name, 1000, Path(setup.scratch) / "speed")
    settings = replace(settings, latent=replace(settings.latent, beta_schedule="constant"))  # after warm-up
    trainer, loader = trainer_of(settings, place(setup))
    warm, count = (2, 3) if setup.dry else (25, 60)
    with loader:
        source = Endless(loader)
        for number in range(warm + count):
            if number == warm:
                started = now(setup)
            trainer.train_step(next(source).to(trainer.device))
            trainer.finite.in_a_row()  # as between steps of a run; otherwise verdicts pile up
            trainer.step += 1
        seconds = (now(setup) - started) / count
        source.close()
    return {
        "ok": True,
        "images_per_second": settings.batch_size / seconds,
        "seconds_an_epoch": seconds * len(loader),
    }


def arm(setup: Setup) -> Iterator[Row]:
    """One arm: a row, to which each measurement adds its figures."""
    from lvssl.runs.progress import read_metrics
    from lvssl.runs.run import load_run
    from lvssl.training.pretrain import pretrain

    options = setup.options
    settings = settings_of(setup, options["arm"], options["epochs"], Path(setup.scratch) / options["arm"])
    head = {"update": True, "arm": options["arm"], "seed": options["seed"], "epochs": options["epochs"]}
    head |= {"batch": settings.batch_size, "device": setup.device, "images_of": options["of"], "ok": True}
    started = time.monotonic()
    pretrain(settings)
    rows = read_metrics(settings.out / "metrics.jsonl")
    row: Row = {"seconds": time.monotonic() - started, "loss": rows[-1]["loss"]}
    speeds = sorted(found["images_per_second"] for found in rows)
    yield head | row | {"images_per_second": speeds[len(speeds) // 2]}

    run, failures = load_run(settings.out), []
    run.network.to(place(setup))
    with ThreadPoolExecutor(1) as pool:
        for name, measure in measures(setup, run, pool).items():
            try:
                found = measure()
            except Exception as error:
                failures.append(f"{name}: {last_line(error)}")
                found = {}
            yield head | found | {"ok": not failures, "failed": "; ".join(failures) or None}


def measures(setup: Setup, run: Any, pool: ThreadPoolExecutor) -> dict[str, Callable[[], Row]]:
    """Measurements of a run, in percent of the test images. The probe is fitted in its own thread on the CPU,
    while the device does the fine-tuning."""
    from lvssl.evaluation.embedding import embed
    from lvssl.evaluation.knn import hamming_knn, weighted_knn
    from lvssl.evaluation.probe import linear_probe
    from pipelines.decode import open_reader

    options, view, waiting = setup.options, run.settings.view, {}

    def neighbours() -> Row:
        train, test = (
            embed(run.network, open_reader(options[split]), view, loader_threads())
            for split in ("train", "test")
        )
        pair = (train.features, train.labels, test.features, test.labels)
        waiting["linear"] = pool.submit(linear_probe, *pair)
        x, y = (torch.from_numpy(a).to(setup.device) for a in (train.features, test.features))
        codes = train.codes, train.labels, test.codes, test.labels, test.bits
        knn = weighted_knn(x, train.labels, y, test.labels)
        return {"knn": knn, "code_knn": hamming_knn(*codes), "bits": test.bits}

    def linear() -> Row:
        return {"linear": waiting["linear"].result().accuracy}

    return {
        "kNN": neighbours,
        "1 % of the labels": lambda: {"tuned_1": tuned(setup, run, 0.1 if setup.dry else 0.01)},
        "all labels": lambda: {"tuned_all": tuned(setup, run, 1.0)},
        "linear": linear,
    }


def tuned(setup: Setup, run: Any, share: float) -> float:
    """Top-1 after fine-tuning the encoder and a linear layer with a share of the labels, at a fixed rate."""
    from lvssl.evaluation.score import score
    from lvssl.runs.labels import labelled_rows, open_labelled
    from lvssl.training.stopping import Stop
    from lvssl.training.supervised import (
        Classifier,
        Recipe,
        SupervisedTrainer,
        largest_batch,
        predict,
        scaled_lr,
    )

    options, device = setup.options, place(setup)
    train, test = (open_labelled(Path(options[split])) for split in ("train", "test"))
    labelled = train.only(labelled_rows(train, share, None, options["seed"]))
    batch = largest_batch(TUNE_BATCH, len(labelled), 1)
    recipe = Recipe(
        epochs=1 if setup.dry else TUNE_EPOCHS,
        batch_size=batch,
        lr=scaled_lr(TUNE_LR, batch),
        weight_decay=0.0,
        seed=options["seed"],
        checkpoint_minutes=1e6,
        log_every=50,
        workers=loader_threads(),
        min_steps=2 if setup.dry else TUNE_STEPS,
    )
    view, folder = run.settings.view, Path(setup.scratch) / f"{options['arm']}-tuned-{share}"
    torch.backends.cudnn.benchmark = True
    model = Classifier(copy.deepcopy(run.network), "features", labelled, frozen=False, seed=options["seed"])
    SupervisedTrainer(folder, model, labelled, view, recipe, device).run(Stop(), folder.name)
    return score(*predict(model, test, view, loader_threads()))["top1"]


def to_knn(setup: Setup) -> Iterator[Row]:
    """Seconds of training until kNN reaches the target, without evaluations, whose time is given apart."""
    options, device = setup.options, place(setup)
    settings = settings_of(setup, options["arm"], options["epochs"], Path(setup.scratch) / "to-knn")
    begun = time.monotonic()
    trainer, loader = trainer_of(settings, device)
    head = {"update": True, "arm": options["arm"], "seed": options["seed"], "epochs": options["epochs"]}
    head |= {"target": options["target"], "device": setup.device, "images_of": options["of"]}
    seconds, looks, history = 0.0, 0.0, []
    with loader:
        for epoch in range(1, settings.epochs + 1):
            started = now(setup)
            for batch in loader:
                trainer.train_step(batch.to(device))
                trainer.finite.in_a_row()
                trainer.step += 1
            seconds += now(setup) - started
            if epoch % options["every"] and epoch < settings.epochs:
                continue
            started = now(setup)
            knn = knn_so_far(setup, trainer)
            looks += now(setup) - started
            history.append([epoch, round(seconds, 2), knn])
            reached = knn >= options["target"]
            yield {
                **head,
                "ok": True if reached else None,
                "epochs_done": epoch,
                "seconds": seconds,
                "seconds_with_looks": seconds + looks,
                "seconds_of_process": time.monotonic() - begun,
                "knn": knn,
                "history": list(history),
            }
            if reached:
                return


def knn_so_far(setup: Setup, trainer: Any) -> float:
    """kNN of a network in training, which reads the images in the training's precision, uncompiled."""
    from lvssl.evaluation.embedding import embed
    from lvssl.evaluation.knn import weighted_knn
    from lvssl.models.device import precision
    from pipelines.decode import open_reader

    trainer.network.precision = precision(trainer.settings.engine, trainer.device)
    with torch.compiler.set_stance("force_eager"):
        train, test = (
            embed(trainer.network, open_reader(setup.options[split]), trainer.settings.view, loader_threads())
            for split in ("train", "test")
        )
    trainer.network.train()
    x, y = (torch.from_numpy(a).to(trainer.device) for a in (train.features, test.features))
    return weighted_knn(x, train.labels, y, test.labels)
