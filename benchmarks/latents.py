"""Is the latent's code worth its bits? Latent models against deterministic controls, paired by seed.

    python -m benchmarks.latents --json docs/latents.json             hours on two cores: see --help for parts

Every arm is pretrained with the same settings, steps, order and augmentation but for its family; each seed
gives one paired difference. Arms:

    none        plain SimCLR; its codes are the equal-bit controls made from its features
    sign        the fair control: the same with its sign bits decorrelated, and no latent
    sign01      the same with the latent's weight of that penalty, 0.1, instead of the family's own, 0.02
    bernoulli   the latent-variable model, with a code of 64, 256 or 2,048 bits

Controls at b bits, of the features of each control, fitted on the training images: sign bits (of the
first b features), PCA-sign and ITQ (both up to the features' number), random hyperplanes (LSH). `differences`
holds, for each measure, the latent minus the best control, which is the one with the highest mean over
the same seeds; `features_probe` compares the features themselves. Accuracies in percent: linear probe, cosine
kNN on features, Hamming kNN on codes (k = 20, T = 0.07).

Runs are folders below --out, and each finished one keeps its figures there (figures.json): a command that was
killed goes on, parts may run at once (--data, --arms, --bits, --seeds), and the JSON holds all that is
finished below --out for the data sets named.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvssl.cli import guarded
from lvssl.codes.controls import fit_itq, fit_lsh, fit_pca, fit_sign
from lvssl.demo import fashion_mnist
from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.knn import hamming_knn, weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.models.backbone import feature_dim
from lvssl.models.inference import device_of
from lvssl.runs.labels import open_pair
from lvssl.runs.run import load_run, versions
from lvssl.settings.pretrain import PretrainSettings, preset
from lvssl.training.pretrain import pretrain
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.convert.conversion import Settings as ConvertSettings
from pipelines.errors import InputError
from pipelines.files import write_json
from pipelines.kernels.pack import pack_bits, unpack_bits

DATA = {
    "fashion-mnist": "fashion-mnist",
    "cifar10-jpeg": "cifar10-small",
    "digits": "digits",
}  # preset of each
ARMS = ("none", "sign", "sign01", "bernoulli")
CONTROLS = ("none", "sign", "sign01")
FIGURES = "figures.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One pretraining. Controls have no `bits` of their own: every length is made from their features."""

    data: str
    arm: str
    bits: int | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.arm}{self.bits or ''}-s{self.seed}"


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    for job in jobs(options):
        row = figures(options, job)
        print(f"{job.name}: {json.dumps(row)}", file=sys.stderr, flush=True)
    sets = {name: compared(finished(options.out, name)) for name in options.data}
    for name, result in sets.items():
        show(name, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.latents " + " ".join(arguments)
        result = {"command": command, "versions": versions(), "data": sets}
        write_json(options.json, result)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["fashion-mnist", "cifar10-jpeg"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--bits", type=int, nargs="+", default=[256, 64, 2048], help="of the codes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=0, help="of each run; 0: the preset's")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0: all cores")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument("--cifar10", default="../shared/data/cifar10-jpeg", help="what convert-beton takes")
    parser.add_argument("--out", type=Path, default=Path("runs/latents"), help="where the runs go")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args(arguments)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, so that a comparison stands early and gains seeds with time."""
    for seed in options.seeds:
        for data in options.data:
            for arm in options.arms:
                for bits in [None] if arm in CONTROLS else options.bits:
                    yield Job(data, arm, bits, seed)


def figures(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What one run reaches; it is trained and measured unless that is done."""
    folder = options.out / job.name
    kept = folder / FIGURES
    protocol = {"images": options.images, "epochs": options.epochs or preset(DATA[job.data]).epochs}
    row = (
        json.loads(kept.read_text()) if kept.exists() else dataclasses.asdict(job) | protocol | {"codes": {}}
    )
    if any(row[name] != value for name, value in protocol.items()):
        raise InputError(f"{folder} holds a run of other --images or --epochs; choose another --out")
    wanted = [str(bits) for bits in ([job.bits] if job.bits else options.bits)]
    missing = [bits for bits in wanted if bits not in row["codes"]]
    if not missing:
        return row
    train, test = (converted(options, job.data, split) for split in ("train", "test"))
    pretrain(settings_of(options, job, train, folder), resume=True)
    run = load_run(folder)
    sets = [
        embed(run.network, source, run.settings.view, options.workers) for source in open_pair(train, test)
    ]
    row["checkpoint"], row["train"], row["test"] = run.digest, len(sets[0].labels), len(sets[1].labels)
    row["width"] = sets[0].features.shape[1]
    labels = sets[0].labels, sets[1].labels
    row["features"] = accuracies(tuple(s.features for s in sets), *labels, device_of(run.network))
    for bits in missing:
        made = own_code(*sets) if job.bits else controls(int(bits), *sets)
        row["codes"][bits] = {name: accuracies(pair, *labels) for name, pair in made.items()}
    if job.bits:
        row["rate_bits"] = sets[1].rate_bits
    write_json(kept, row)
    return row


def settings_of(options: argparse.Namespace, job: Job, train: Path, folder: Path) -> PretrainSettings:
    base = preset(DATA[job.data])
    dim = job.bits if job.bits and job.bits != feature_dim(base.model.backbone) else 0
    family, weight = ("sign", 0.1) if job.arm == "sign01" else (job.arm, base.latent.decorrelation)
    return dataclasses.replace(
        base,
        data=train,
        out=folder,
        seed=job.seed,
        epochs=options.epochs or base.epochs,
        threads=options.threads,
        workers=options.workers,
        latent=dataclasses.replace(base.latent, family=family, dim=dim, decorrelation=weight),
    )


def converted(options: argparse.Namespace, data: str, split: str) -> Path:
    """The beton of a split, converted unless that is done."""
    out = options.out / "data" / f"{data}-{split}{options.images if split == 'train' else ''}.beton"
    if not out.exists():
        source = {"cifar10-jpeg": options.cifar10, "digits": "sklearn:digits"}.get(data) or fashion_mnist()
        subset = options.images if split == "train" and data != "digits" else None
        convert(
            source,
            out,
            ConvertSettings(subset=subset),
            options=ConvertOptions(split=split, root=options.out / "downloads"),
        )
    return out


def own_code(train: Embedding, test: Embedding) -> dict[str, tuple[np.ndarray, ...]]:
    return {"code": tuple(unpack_bits(s.codes, s.bits) for s in (train, test))}


def controls(bits: int, train: Embedding, test: Embedding) -> dict[str, tuple[np.ndarray, ...]]:
    """Every control's bits, fitted on the training features; the bound by the features leaves some out."""
    most = train.features.shape[1]
    fits = {"sign": fit_sign, "pca_sign": fit_pca, "itq": fit_itq} if bits <= most else {}
    coders = {name: fit(train.features, bits) for name, fit in (fits | {"lsh": fit_lsh}).items()}
    return {
        name: tuple(unpack_bits(coder.encode(s.features), bits) for s in (train, test))
        for name, coder in coders.items()
    }


def accuracies(
    pair: tuple[np.ndarray, ...], train_y: np.ndarray, test_y: np.ndarray, device: torch.device | None = None
) -> dict[str, float]:
    """probe: linear; knn: cosine on float32 features, Hamming on bits, bool or uint8 [N, b]."""
    train_x, test_x = pair
    if train_x.dtype != np.float32:
        packed = pack_bits(train_x), pack_bits(test_x)
        knn = hamming_knn(packed[0], train_y, packed[1], test_y, train_x.shape[1])
        train_x, test_x = train_x.astype(np.float32), test_x.astype(np.float32)
    else:
        knn = weighted_knn(train_x, train_y, test_x, test_y, device=device)
    return {"probe": linear_probe(train_x, train_y, test_x, test_y).accuracy, "knn": knn}


def finished(out: Path, data: str) -> list[dict[str, Any]]:
    """The figures of every finished run of that data set."""
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{data}-*/{FIGURES}"))]


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and the latent minus the best control, for the features and each length of code."""
    lengths = sorted({row["bits"] for row in rows if row["bits"]})
    wanted = [("features_probe", None, "probe")]
    wanted += [(f"code{bits}_{what}", bits, what) for bits in lengths for what in ("knn", "probe")]
    found = {name: difference(*by_seed(rows, bits, what)) for name, bits, what in wanted}
    return {"rows": rows, "differences": {name: d for name, d in found.items() if d}}


Seeds = dict[int, float]  # seed -> percent


def by_seed(rows: list[dict[str, Any]], bits: int | None, what: str) -> tuple[Seeds, dict[str, Seeds]]:
    """The latent's figures, and each control's, of codes of that length; None: of the features.

    The features of a latent with one bit a feature are compared, for no layer stands between them and it.
    """
    latent: Seeds = {}
    against: dict[str, Seeds] = {}
    for row in rows:
        found = row["codes"].get(str(bits), {}) if bits else {"features": row["features"]}
        if row["arm"] in CONTROLS:
            for method, figures in found.items():
                against.setdefault(f"{row['arm']}, {method}", {})[row["seed"]] = figures[what]
        elif found and (bits or row["bits"] == row["width"]):
            latent[row["seed"]] = next(iter(found.values()))[what]
    return latent, against


def difference(latent: Seeds, against: dict[str, Seeds]) -> dict[str, Any] | None:
    """Mean and standard error over seeds, in points, of the latent minus the best control.

    The best is the one of the highest mean over the seeds that it shares with the latent, among those that
    share the most: the best of each seed would be chosen on the test set's noise.
    """
    shared = {name: sorted(set(latent) & set(seeds)) for name, seeds in against.items()}
    most = max(map(len, shared.values()), default=0)
    if not most:
        return None
    complete = {name: seeds for name, seeds in shared.items() if len(seeds) == most}
    control = max(complete, key=lambda name: statistics.mean(against[name][seed] for seed in complete[name]))
    each = [round(latent[seed] - against[control][seed], 4) for seed in complete[control]]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return {
        "mean": statistics.mean(each),
        "standard_error": error,
        "seeds": complete[control],
        "each": each,
        "control": control,
    }


def show(data: str, result: dict[str, Any]) -> None:
    print(f"\n{data:40}{'code':>10}{'bits':>6}{'seed':>6}{'probe':>8}{'kNN':>8}")
    for row in result["rows"]:
        lines = [("features", "", row["features"])]
        lines += [(method, bits, f) for bits, made in row["codes"].items() for method, f in made.items()]
        for method, bits, f in lines:
            print(f"{row['arm']:40}{method:>10}{bits:>6}{row['seed']:6}{f['probe']:8.2f}{f['knn']:8.2f}")
    for name, d in result["differences"].items():
        spread = f" +- {d['standard_error']:.2f}" if d["standard_error"] is not None else ""
        print(f"{name:16}{d['mean']:+6.2f}{spread} against {d['control']}, seeds {d['seeds']}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
