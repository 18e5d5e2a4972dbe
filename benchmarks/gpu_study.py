"""What can be learnt on one GPU in five minutes? CIFAR-10, ResNet-18, bf16, batch 512.

    python -m benchmarks.gpu_study --data cifar10-jpeg                anything convert-beton reads, or:
    python -m benchmarks.gpu_study --train train.beton --test test.beton --minutes 9
    python -m benchmarks.gpu_study --data cifar10-jpeg --only plain-vc --only bernoulli-vc
    python -m benchmarks.gpu_study --data cifar10-jpeg --to-knn 84.8 --minutes 9
    python -m benchmarks.gpu_study --dry-run                          on a CPU: synthetic images, a small
    network

plain          SimCLR, no latent
sign           the same with decorrelated sign bits
bernoulli      one bit for each feature, decorrelation 0.02
plain-vc       SimCLR with VICReg's variance and covariance terms (--objective ntxent-vc); only by --only,
bernoulli-vc   like the same for bernoulli,
ceb            and C-SimCLR as published (Lee et al. 2021): kappa_e 1,024, kappa_b 10

All arms have the same number of epochs, as many as fit into the time. Measured on the test images, in
percent: kNN of features (k 20, T 0.07) and of the code (Hamming), a linear probe, and fine-tuning with 1 %
and with all labels (10 epochs, one learning rate). An arm's row is written after its pretraining and again
after each measurement, so that an interrupted run keeps its rows. Rows are added to those of earlier runs in
docs/gpu-study-CARD.json; the table shows all rows of the same version of the library.

--to-knn: seconds of training until kNN of plain SimCLR's features reaches the target, evaluated every --every
epochs; evaluations aren't counted. lightly publishes 84.8 % after 200 epochs and 87 minutes on the original
images; for JPEG copies of them, as in `cifar10-jpeg`, say so in the row with --of.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import commit, default_path, environment_of, made_absolute
from benchmarks.gpu_stages.case import Row, Setup
from benchmarks.gpu_stages.predictions import plain
from benchmarks.gpu_stages.run import Report, Stage, identify, run_stages
from benchmarks.gpu_stages.study import ARMS, USUAL
from benchmarks.script import parser_of
from lvssl import __version__
from lvssl.commands.main import guarded
from pipelines.errors import InputError

MODULE = "benchmarks.gpu_stages.study"
KEPT = (*ARMS, "to-knn")  # stages whose rows are kept when another run adds its own
MEASURING = 35.0  # seconds for an arm's measurements besides its training [predicted]
START = 12.0  # seconds until a process reaches its first step [predicted]
LOOKS = 0.2  # share of --to-knn's time that is spent on evaluation


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    end = time.monotonic() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    card = identify(device)
    path = options.json or study_path(card["card"], options.dry_run)
    print(", ".join(f"{name} {value}" for name, value in card.items() if value), flush=True)
    card |= {"version": __version__, "commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M")}
    head = {"command": "python -m benchmarks.gpu_study " + " ".join(arguments), "dry_run": options.dry_run}
    report = Report(path, card, head, keep=lambda row: row["stage"] in KEPT)
    with tempfile.TemporaryDirectory(prefix="lvssl-study-") as scratch:
        folder = options.out or Path(scratch)
        setup = Setup(
            "",
            "",
            "",
            device,
            options.dry_run,
            options.seed,
            scratch=scratch,
            options=shared(options, folder),
        )
        first = [stage(options, "data", "data"), stage(options, "speed", "speed", arms=timed(options))]
        run_stages(first[: 1 if options.epochs else 2], setup, report, end - time.monotonic())
        if not any(row["stage"] == "data" and row.get("ok") for row in report.new()):
            print("error: there are no images to train on", file=sys.stderr)
            return 1
        epochs = options.epochs or epochs_that_fit(options, report.new(), end - time.monotonic())
        run_stages(study_stages(options, epochs), setup, report, end - time.monotonic())
    show(report.rows)
    wrong = [row for row in report.new() if row.get("ok") is False]
    for row in wrong:
        print(f"{row['stage']}: {row['name']}: {row.get('failed')}")
    print(f"written: {path}")
    return 1 if wrong else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--data", help="CIFAR-10 as convert-beton reads it: a folder of parquet files, ...")
    parser.add_argument("--train", type=Path, help="a beton instead")
    parser.add_argument("--test", type=Path, help="a beton instead")
    parser.add_argument("--of", default="", help="what the images are, for the rows: say, the JPEG copy")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything")
    parser.add_argument("--only", action="append", choices=ARMS, default=[], help="this arm; repeatable")
    parser.add_argument("--epochs", type=int, default=0, help="of each arm; 0: as many as fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0: 512")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    parser.add_argument("--to-knn", type=float, help="the time to this kNN accuracy in percent, nothing else")
    parser.add_argument("--every", type=int, default=10, help="epochs between two looks with --to-knn")
    parser.add_argument("--json", type=Path, help="where the rows go; left out: docs/gpu-study-CARD.json")
    parser.add_argument("--out", type=Path, help="where converted betons stay; left out: they don't")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lvssl-gpu-cache")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args(arguments)
    betons = options.train is not None and options.test is not None
    if (options.train is None) != (options.test is None):
        raise InputError("--train and --test go together")
    if not (betons or options.data or options.dry_run):
        raise InputError("name the images: --data FOLDER, or --train and --test")
    for path in (options.train, options.test):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such beton")
    if betons and options.data:
        raise InputError("--data or --train and --test, not both")
    if options.every < 1 or options.epochs < 0 or options.minutes <= 0:
        raise InputError("--every and --minutes must be above 0, --epochs not below it")
    made_absolute(options, "train", "test", "out", "json", "cache")
    if options.data and Path(options.data).exists():
        options.data = str(Path(options.data).resolve())
    options.of = options.of or (Path(options.data).name if options.data else "")
    return options


def study_path(card: str, dry: bool) -> Path:
    proof = default_path(card, dry)
    return proof.with_name(proof.name.replace("gpu-", "gpu-study-", 1))


def shared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The options common to all stages."""
    return {
        "data": str(options.data or ""),
        "train": str(options.train or folder / "train.beton"),
        "test": str(options.test or folder / "test.beton"),
        "of": options.of,
        "seed": options.seed,
        "batch": options.batch or (32 if options.dry_run else 512),
        "compile": options.compile,
    }


def timed(options: argparse.Namespace) -> list[str]:
    """The arms whose speed decides how many epochs fit: of the usual arms, bernoulli is the slowest."""
    if options.to_knn:
        return [(options.only or ["plain"])[0]]
    return options.only or ["bernoulli"]


def epochs_that_fit(options: argparse.Namespace, rows: list[Row], seconds: float) -> int:
    """Epochs, equal for all arms, that fit into the remaining time with their measurements; at least 1."""
    found = [row["seconds_an_epoch"] for row in rows if row["stage"] == "speed" and row.get("ok")]
    if not found or options.dry_run:
        return 1
    if options.to_knn:
        return max(1, int(((1 - LOOKS) * seconds - START) / max(found)))
    each = seconds / len(options.only or USUAL) - START - MEASURING
    return max(1, int(each / max(found)))


def study_stages(options: argparse.Namespace, epochs: int) -> list[Stage]:
    """One stage for each arm, or the one that trains to a kNN accuracy."""
    if options.to_knn:
        (arm,) = timed(options)
        name = f"{arm}, seed {options.seed}, {epochs} epochs, to {options.to_knn:g} %"
        more = {"target": options.to_knn, "every": options.every}
        return [stage(options, "to-knn", name, arm=arm, epochs=epochs, **more)]
    return [
        stage(options, arm, f"{arm}, seed {options.seed}, {epochs} epochs", arm=arm, epochs=epochs)
        for arm in options.only or USUAL
    ]


def stage(options: argparse.Namespace, kind: str, name: str, **more: Any) -> Stage:
    return Stage(kind, MODULE, 1.0, environment=environment_of(options), options={"name": name, **more})


COLUMNS = (
    "arm", "seed", "epochs", "seconds", "images_per_second",
    "linear", "knn", "code_knn", "tuned_1", "tuned_all",
)  # fmt: skip


def show(rows: list[Row]) -> None:
    """Print all rows of this version, the newest last, and the times to a kNN accuracy."""
    cells = [[*COLUMNS, "card", "images"]]
    for row in rows:
        if row["stage"] in ARMS and row.get("version") == __version__:
            cells.append(
                [*(figure(row.get(name)) for name in COLUMNS), row["card"], row.get("images_of", "")]
            )
    print("\n" + plain(cells))
    for row in rows:
        if row["stage"] == "to-knn" and "knn" in row:
            reached = "reached" if row.get("ok") else f"not reached, {row['knn']:.2f} %"
            after = f"{row['epochs_done']} of {row['epochs']} epochs, {row['seconds']:.0f} s of training"
            print(f"{row['target']:g} % kNN by {row['arm']} on {row['card']}: {reached} after {after}")


def figure(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(guarded(main, sys.argv[1:]))
