"""The study on real images, both data sets, as its tables stand in docs/.

    python -m benchmarks.study --cifar10 cifar10-jpeg     all arms and seeds: under 2 hours on two cores
    python -m benchmarks.study --shard 1/2 --threads 1    half of the runs; beside it 2/2; then collect

Five arms of the same settings, steps, order and augmentation, over three seeds, with the settings of the
presets `fashion-mnist` and `cifar10-small`, 10,000 training images each:

    none, sign       the controls: plain SimCLR, and the same with its sign bits decorrelated; no latent
    bernoulli256     a bit for each feature
    gaussian         means and variances; its code: the means' signs
    mcinfonce        von Mises-Fisher at the projection by MCInfoNCE (Kirchhof et al. 2023): an uncertainty

Runs and data are those of `python -m benchmarks.latents --out DIR`: what either has trained, the other takes.
Each data set is the other's out-of-distribution set. Writes docs/study-NAME.md, .csv, .json and .png.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.latents import DATA, converted
from lvssl.cli import guarded
from lvssl.evaluation.measures import MEASURES
from lvssl.evaluation.study import StudySettings, study
from lvssl.report.study import write_study
from pipelines.files import write_atomically, write_json

ARMS = (
    "none",
    "sign",
    "bernoulli256:family=bernoulli",
    "gaussian",
    "mcinfonce:family=vmf,site=proj,objective=mcinfonce",
)
NAMES = {"fashion-mnist": "fashion-mnist", "cifar10-jpeg": "cifar10"}  # in docs/


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    data = {
        name: {split: converted(options, name, split) for split in ("train", "test")} for name in options.data
    }
    for name, splits in data.items():
        settings = StudySettings(
            train=splits["train"],
            test=splits["test"],
            preset=DATA[name],
            out=options.out / f"study-{name}",
            runs=options.out,
            prefix=name,
            arms=tuple(options.arms),
            seeds=tuple(options.seeds),
            epochs=options.epochs,
            threads=options.threads,
            max_images=options.measured,
            ood=tuple(other["test"] for key, other in data.items() if key != name),
            shard=options.shard,
        )
        result = study(settings)
        if result is not None:
            result["command"] = "python -m benchmarks.study " + " ".join(arguments)
            write_study(settings.out, result, MEASURES)
            into_docs(settings.out, options.docs, NAMES.get(name, name), result)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(NAMES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="as of `lvssl study`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--measured", type=int, default=2000, help="test images for the uncertainty; 0: all")
    parser.add_argument("--epochs", type=int, default=0, help="of each run; 0: the preset's")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--shard", default="", help="K/N, as of `lvssl study`")
    parser.add_argument("--cifar10", default="../shared/data/cifar10-jpeg", help="what convert-beton takes")
    parser.add_argument("--out", type=Path, default=Path("runs/latents"), help="where the runs go")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the tables go")
    return parser.parse_args(arguments)


def into_docs(found: Path, docs: Path, name: str, result: dict) -> None:
    """The tables and the picture of one data set, and every row behind them."""
    docs.mkdir(parents=True, exist_ok=True)
    picture = f"\n![Accuracy against bits stored](study-{name}.png)\n"
    text = (
        (found / "study.md")
        .read_text()
        .replace("\n## Codes of equal length\n", f"\n## Codes of equal length\n{picture}")
    )
    write_atomically(docs / f"study-{name}.md", text.encode())
    write_json(docs / f"study-{name}.json", result)
    shutil.copyfile(found / "study.csv", docs / f"study-{name}.csv")
    shutil.copyfile(found / "figures" / "accuracy.png", docs / f"study-{name}.png")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
