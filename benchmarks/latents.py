"""What does the latent's code cost or gain? Latent models against deterministic controls, paired by seed.

    python -m benchmarks.latents --preset fashion-mnist --train train.beton --test test.beton --json FILE

Every arm is pretrained with the same settings, steps, order and augmentation but for its family; each seed
gives one paired difference. Codes have one bit a feature (256 with the small backbone):

    none        plain SimCLR; its code is the sign bits of its features about their training mean
    sign        the same with its sign bits decorrelated: the fair control
    bernoulli   the latent-variable model

Runs are folders below --out; what is finished there is not trained again. Accuracies in percent: linear
probe, cosine kNN on features, Hamming kNN on codes (k = 20, T = 0.07).
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from lvssl.cli import guarded
from lvssl.config import preset
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.evaluate import measure
from lvssl.training.checkpoint import write_atomically
from lvssl.training.pretrain import pretrain
from lvssl.training.run import load_run, versions
from pipelines.sources import open_source

MEASURES = ("linear", "knn", "code_linear", "code_knn")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--train", type=Path, required=True, help="training images, a beton")
    parser.add_argument("--test", type=Path, required=True, help="test images, a beton")
    parser.add_argument("--arms", nargs="+", default=["none", "sign", "bernoulli"], help="families")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--out", type=Path, default=Path("runs/latents"))
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)

    rows = [figures(options, arm, seed) for seed in options.seeds for arm in options.arms]
    compared = [arm for arm in options.arms if arm != "none"]
    differences = [paired(rows, arm, control) for arm in compared for control in ("none", "sign")]
    result = {
        "command": "python -m benchmarks.latents " + " ".join(arguments),
        "versions": versions(),
        "rows": rows,
        "differences": [d for d in differences if d],
    }
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, json.dumps(result, indent=1).encode())


def figures(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """One run, trained if need be, and what it reaches."""
    base = preset(options.preset)
    folder = options.out / f"{options.preset}-{arm}-s{seed}"
    latent = dataclasses.replace(base.latent, family=arm)
    settings = dataclasses.replace(
        base, data=options.train, out=folder, seed=seed, latent=latent, threads=options.threads
    )
    pretrain(settings, resume=True)
    run = load_run(folder)
    train, test = (embed(run.network, open_source(path), base.view) for path in (options.train, options.test))
    found, _ = measure(train, test, stochastic=run.network.family.stochastic)
    row = {"arm": arm, "seed": seed, "linear": found["linear"], "knn": found["knn"], "bits": found["bits"]}
    row["code_linear"] = found.get("code_linear", found.get("sign_linear"))
    row["code_knn"] = found.get("hamming_knn", found.get("sign_hamming_knn"))
    row["rate_bits"] = test.rate_bits
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def paired(rows: list[dict[str, Any]], arm: str, control: str) -> dict[str, Any] | None:
    """Mean and standard error over seeds of arm - control, in points."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    seeds = [seed for name, seed in of if name == arm and (control, seed) in of]
    if arm == control or not seeds:
        return None
    result: dict[str, Any] = {"arm": arm, "control": control, "seeds": seeds}
    for name in MEASURES:
        points = [of[arm, seed][name] - of[control, seed][name] for seed in seeds]
        error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else None
        result[name] = {"mean": statistics.mean(points), "standard_error": error, "each": points}
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{'arm':12}{'seed':>5}{'bits':>6}" + "".join(f"{name:>13}" for name in MEASURES))
    for row in result["rows"]:
        print(
            f"{row['arm']:12}{row['seed']:5}{row['bits']:6}"
            + "".join(f"{row[name]:13.1f}" for name in MEASURES)
        )
    for d in result["differences"]:
        print(f"\n{d['arm']} - {d['control']}, points over seeds {d['seeds']}:")
        for name in MEASURES:
            error = d[name]["standard_error"]
            spread = f" +- {error:.2f}" if error is not None else ""
            print(f"  {name:12}{d[name]['mean']:+.2f}{spread}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
