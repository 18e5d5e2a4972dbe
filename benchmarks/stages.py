"""Run every stage of the protocol on one data set, for the control and the latent model: one table, one
command.

    convert-beton cifar10-jpeg cifar/train.beton
    convert-beton cifar10-jpeg cifar/test.beton --split test
    python -m benchmarks.stages --train cifar/train.beton --test cifar/test.beton --json stages.json

It is planned for all 50,000 CIFAR-10 images in an hour on two cores (`cifar10-small`, 6 epochs). --minutes
stops it after the stage in which the time is up, and the same command resumes. Each row is a result file of a
run under --out, with its own command, settings and interval; finished stages there aren't repeated. Their
seconds are those of all calls together, without calls that were killed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.script import new_file, parser_of, save
from lvssl.commands.main import guarded
from lvssl.evaluation.finetune import finetune
from lvssl.evaluation.linear import linear
from lvssl.evaluation.nearest import knn
from lvssl.evaluation.stage import Stage, in_words
from lvssl.runs.run import versions
from lvssl.settings.pretrain import preset
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings
from lvssl.training.pretrain import pretrain
from pipelines.files import write_json


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10-small")
    parser.add_argument(
        "--arms", nargs="+", default=["none", "bernoulli"], help="families; none: the control"
    )
    parser.add_argument("--objective", default="ntxent", help="of each pretraining; SimCLR's own")
    parser.add_argument("--epochs", type=int, default=6, help="of each pretraining")
    parser.add_argument("--tune-epochs", type=int, nargs=3, default=[30, 20, 4], help="with 1, 10, 100 %%")
    parser.add_argument("--min-steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[0.02, 0.1], help="of fine-tuning, to choose from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/stages"))
    parser.add_argument("--json", type=new_file, help="where the table goes")
    options = parser.parse_args(arguments)

    end = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    for row, work in plan(options):
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over; the same command goes on", file=sys.stderr)
            break
        figures, seconds = in_all_calls(options.out / "seconds.json", row, work)
        rows += [row | found | {"wall_seconds": round(seconds, 1)} for found in figures]
    show(rows)
    save(options.json, "stages", arguments, {"versions": versions(), "rows": rows})


def in_all_calls(
    kept: Path, row: dict[str, Any], work: Callable[[], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], float]:
    """What the work returns, and the seconds that it has taken in this call and in earlier ones."""
    taken = json.loads(kept.read_text()) if kept.exists() else {}
    name, started = " ".join(map(str, row.values())), time.monotonic()
    try:
        found = work()
    finally:  # if interrupted, the next call resumes it
        taken[name] = taken.get(name, 0.0) + time.monotonic() - started
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, taken)
    return found, taken[name]


def plan(options: argparse.Namespace) -> list[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]]:
    """Each row's description and the function that makes its figures, by stage, so that arms stay level."""
    shares = (0.01, 0.1, 1.0)
    works: list[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]] = []

    def add(stage: str, labels: float, make: Callable[[Path], list[dict[str, Any]]]) -> None:
        for arm in options.arms:
            run = options.out / f"{arm}-{options.seed}"
            row = {"arm": arm, "seed": options.seed, "stage": stage, "labels": labels}
            works.append((row, partial(make, run)))

    common = {"test": options.test, "threads": options.threads}
    add("pretrain", 0.0, lambda run: pretrained(options, run))
    add("linear", 1.0, lambda run: figures(linear(LinearSettings(run, **common))))
    add("knn", 1.0, lambda run: figures(knn(KnnSettings(run, **common))))
    for share, epochs in zip(shares, options.tune_epochs):

        def tune(run: Path, share: float = share, epochs: int = epochs) -> list[dict[str, Any]]:
            settings = FinetuneSettings(
                run,
                label_fraction=share,
                epochs=epochs,
                min_steps=options.min_steps,
                lr=tuple(options.lr),
                weight_decay=(0.0,),
                **common,
            )
            return figures(finetune(settings))

        add("finetune", share, tune)
    return works


def pretrained(options: argparse.Namespace, run: Path) -> list[dict[str, Any]]:
    """Pretrain one arm's encoder; a row without accuracy."""
    base = preset(options.preset)
    family = run.name.rpartition("-")[0]
    settings = dataclasses.replace(
        base, data=options.train, out=run, epochs=options.epochs, seed=options.seed, threads=options.threads,
        latent=dataclasses.replace(base.latent, family=family, objective=options.objective),
    )  # fmt: skip
    pretrain(settings, resume=True)
    command = f"lvssl pretrain --preset {options.preset} --family {family} --objective {options.objective}"
    command += f" --data {options.train} --out {run} --epochs {options.epochs} --seed {options.seed}"
    command += f" --threads {options.threads}"
    return [{"on": "", "figures": None, "command": command}]


def figures(stage: Stage[Any]) -> list[dict[str, Any]]:
    """A row for each representation."""
    done = stage.done
    assert done is not None
    return [{"on": on, "figures": found, "command": done["command"]} for on, found in done["results"].items()]


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'stage':10}{'labels':>7}  {'on':10}{'model':11}{'seconds':>8}  test images")
    for row in sorted(rows, key=lambda r: (r["stage"] != "pretrain", r["stage"], r["labels"], r["on"])):
        share = f"{100 * row['labels']:g} %" if row["labels"] else "-"
        words = in_words(row["figures"]) if row["figures"] else ""
        line = (
            f"{row['stage']:10}{share:>7}  {row['on']:10}{row['arm']:11}{row['wall_seconds']:>8.0f}  {words}"
        )
        print(line.rstrip())


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
