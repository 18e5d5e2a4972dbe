"""Which objective makes a good code? Compares linear layers of b bits on one pretrained run's frozen
features.

    python -m benchmarks.code_heads --run runs/study/fashion-mnist-none-s0 \\
        --train runs/study/data/fashion-mnist-train10000.beton \\
        --test runs/study/data/fashion-mnist-test.beton --json docs/code-heads.json

(The run and its data come from `python -m benchmarks.study --data fashion-mnist --arms none --seeds 0`.)

The features of the clean images and of --epochs epochs of two augmented views are computed once and kept
under --out. Each head is trained separately on the views' features: batch normalisation, a linear layer,
batch normalisation, times 4, which gives the logits l of a Bernoulli posterior. Its code is 1[u > mean of u
over the clean training images], where u is the layer's output. Only the objective differs, so heads with the
same start and seed (of layer, order and noise) are paired. The controls need no training: sign bits,
PCA-sign, ITQ, LSH. Test accuracy is in percent: linear probe, Hamming kNN (features: cosine).

With b = sign(l) as +-1 (straight-through), z a sample, m = tanh(l / 2) its mean, and w the weight:

    decorrelation     w/D sum_{i != j} C_ij^2, C the covariance of b, or of one z, over the batch's views
    self-information  NT-Xent between two samples of the same view's posterior, tau 0.1
    code, hard        NT-Xent between the views' b, without a projector; tau 0.2, also in the following
    code, each        the same for each of 4 samples separately
    code, expected    the same with similarity m.m'/D, the expected similarity of two samples
    projector, samples, hard    NT-Xent of a projector's output, from the mean of 4 samples or from b
    barlow, hard      1/D [sum_i (1 - R_ii)^2 + 0.005 sum_{i != j} R_ij^2], R the views' correlation of b

Finished rows are kept under --out: a killed command resumes there, and --only parts may run at the same time.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.script import new_file, parser_of, save
from lvssl.codes.controls import fit_itq, fit_lsh, fit_pca, fit_sign, principal_directions
from lvssl.codes.statistics import code_statistics
from lvssl.commands.main import guarded
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.knn import hamming_knn, weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.latents.bernoulli import Bernoulli, BernoulliPosterior
from lvssl.latents.noise import Noise, key_of
from lvssl.losses.ntxent import ntxent
from lvssl.losses.objective import decorrelation
from lvssl.models.inference import device_of
from lvssl.models.network import projector
from lvssl.runs.differences import interval
from lvssl.runs.labels import open_pair
from lvssl.runs.run import Run, load_run, versions
from lvssl.settings.pretrain import ModelSettings
from pipelines.errors import InputError
from pipelines.files import write_json
from pipelines.kernels.pack import pack_bits, unpack_bits
from pipelines.loader import LoaderSettings, TwoViewLoader

CONTROLS = {"sign": fit_sign, "PCA-sign": fit_pca, "ITQ": fit_itq, "LSH": fit_lsh}
INIT_SCALE, SAMPLES, TAU = 4.0, 4, 0.2


@dataclasses.dataclass(frozen=True)
class Row:
    """A code: one of CONTROLS, or a head with `weight` times decorrelation and one of TERMS."""

    name: str
    seed: int = 0
    start: str = ""  # identity, orthogonal, principal; empty: not trained
    weight: float = 0.0  # of decorrelation
    of: str = "hard"  # what is decorrelated: hard bits or one sample
    term: str = ""
    term_weight: float = 0.0

    @property
    def file(self) -> str:
        words = (self.name, self.start, self.weight if self.start else "", self.of if self.start else "")
        return "-".join(str(w) for w in (*words, f"s{self.seed}") if w != "").replace(" ", "_") + ".json"


def rows(seeds: list[int]) -> list[Row]:
    """Controls; decorrelation by start; and the terms, only for the first seed unless they compare hard bits
    with samples.

    Decorrelation alone has a single weight, since AdamW's steps hardly depend on the scale of the loss.
    """
    table = [Row("features"), Row("sign"), Row("PCA-sign")]
    table += [Row(name, seed) for name in ("ITQ", "LSH") for seed in seeds]
    table += [
        Row("decorrelation", seed, start, 1.0, of)
        for start, of in (
            ("identity", "hard"),
            ("principal", "hard"),
            ("orthogonal", "hard"),
            ("orthogonal", "sample"),
        )
        for seed in seeds
    ]
    table += [
        Row(term, seed, "orthogonal", 0.02, term=term, term_weight=1.0)
        for seed in seeds
        for term in ("projector, samples", "projector, hard")
    ]
    table += [
        Row(term, seeds[0], "orthogonal", 0.0 if term == "barlow, hard" else 0.02, term=term, term_weight=1.0)
        for term in ("code, hard", "code, each", "code, expected", "barlow, hard")
    ]
    term = "self-information"
    return [*table, Row(term, seeds[0], "orthogonal", 0.1, term=term, term_weight=0.5)]


def self_information(posterior: BernoulliPosterior, noise: Noise, _: nn.Module) -> Tensor:
    first, second = posterior.sample(2, noise)
    views = zip(first.chunk(2), second.chunk(2), strict=True)
    return 0.5 * torch.stack([ntxent(torch.cat(pair), 0.1) for pair in views]).sum()


def each_sample(posterior: BernoulliPosterior, noise: Noise, _: nn.Module) -> Tensor:
    return torch.stack([ntxent(z, TAU) for z in posterior.sample(SAMPLES, noise)]).mean()


def expected_similarity(posterior: BernoulliPosterior, *_: Any) -> Tensor:
    """NT-Xent with E[z.z']/D of independent samples, unnormalised: the length of a mean is its certainty."""
    m = posterior.mean()
    logits = (m @ m.T / m.shape[1] / TAU).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(m)).roll(len(m) // 2))


def barlow(bits: Tensor, off_diagonal: float = 0.005) -> Tensor:
    """Zbontar et al. 2021, eq. 1 divided by D, for +-1 bits [2B, D], first views then second."""
    first, second = ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-4) for x in bits.chunk(2))
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + off_diagonal * off) / bits.shape[1]


TERMS: dict[str, Callable[[BernoulliPosterior, Noise, nn.Module], Tensor]] = {
    "self-information": self_information,
    "code, hard": lambda p, g, _: ntxent(p.straight_through_bits(), TAU),
    "code, each": each_sample,
    "code, expected": expected_similarity,
    "projector, samples": lambda p, g, project: ntxent(project(p.sample(SAMPLES, g).mean(0)), TAU),
    "projector, hard": lambda p, g, project: ntxent(project(p.straight_through_bits()), TAU),
    "barlow, hard": lambda p, g, _: barlow(p.straight_through_bits()),
}


def objective(row: Row, posterior: BernoulliPosterior, noise: Noise, project: nn.Module) -> Tensor:
    bits = posterior.straight_through_bits() if row.of == "hard" else posterior.sample(1, noise)[0]
    loss = row.weight * decorrelation(bits)
    return loss + row.term_weight * TERMS[row.term](posterior, noise, project) if row.term else loss


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the clean images, float32 [N, F], with labels; of two-view batches, [batches, 2B, F]."""

    features: np.ndarray
    labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    views: np.ndarray


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    run = load_run(options.run)
    if run.network.family.stochastic:
        raise InputError(f"{options.run}: heads go on a run of family none, whose features no latent shaped")
    shared = {name: getattr(options, name) for name in ("epochs", "batch", "steps", "bits", "rate")}
    protocol = {
        "run": run.folder.name,
        "checkpoint": run.digest,
        "train": options.train.name,
        "test": options.test.name,
        **shared,
        "init_scale": INIT_SCALE,
        "samples": SAMPLES,
        "tau": TAU,
    }
    same_protocol(options.out, protocol)
    data = embedded(run, options)
    if options.bits > data.features.shape[1]:
        raise InputError(f"--bits: {data.features.shape[1]} features give controls of at most as many bits")
    wanted = [row for row in rows(options.seeds) if options.only in row.name]
    made = [measured(options, row, data) for row in wanted]
    show(made)
    if options.json:
        sizes = {"train_images": len(data.labels), "test_images": len(data.test_labels)}
        pretraining = {"train_epochs": run.settings.epochs, "resolution": run.settings.view.resolution}
        head = {"versions": versions(), "protocol": protocol | sizes | pretraining}
        figures = head | {"rows": made, "samples_minus_hard": paired(made)}
        save(options.json, "code_heads", arguments, figures)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    for name, what in {"run": "folder of the pretrained run", "train": "beton", "test": "beton"}.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--bits", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of layers and noise")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of augmented views; the steps go round in them"
    )
    parser.add_argument("--batch", type=int, default=256, help="images, of two views each")
    parser.add_argument("--steps", type=int, default=300, help="of AdamW, cosine after 20 steps of warm-up")
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's learning rate")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--workers", type=int, default=1, help="threads that decode")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/code-heads"), help="features and finished rows"
    )
    parser.add_argument("--json", type=new_file, help="where the figures go")
    return parser.parse_args(arguments)


def same_protocol(out: Path, protocol: dict[str, Any]) -> None:
    """Raise InputError if --out has rows made by another protocol."""
    kept = out / "protocol.json"
    if kept.exists() and json.loads(kept.read_text()) != protocol:
        raise InputError(f"{out} holds rows of another run or other settings; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(kept, protocol, indent=None)


@torch.no_grad()
def embedded(run: Run, options: argparse.Namespace) -> Features:
    """The features, read from --out if they are there already."""
    kept = options.out / "features.npz"
    if not kept.exists():
        train, test = open_pair(options.train, options.test)
        network, view = run.network.eval(), run.settings.view
        clean, unseen = (embed(network, source, view, options.workers) for source in (train, test))
        views: list[np.ndarray] = []
        with TwoViewLoader(
            train, view, LoaderSettings(options.batch, run.settings.seed, options.workers)
        ) as loader:
            for epoch in range(options.epochs):
                loader.set_epoch(epoch)
                for batch in loader:
                    images = batch.views.flatten(0, 1).to(device_of(network))
                    views.append(network.backbone(images).cpu().numpy())
        found = Features(clean.features, clean.labels, unseen.features, unseen.labels, np.stack(views))
        unfinished = kept.with_name("unfinished.npz")
        np.savez(unfinished, allow_pickle=False, **vars(found))
        unfinished.replace(kept)
    with np.load(kept) as arrays:
        return Features(**{name: arrays[name] for name in Features.__dataclass_fields__})


def measured(options: argparse.Namespace, row: Row, data: Features) -> dict[str, Any]:
    """A row's figures, computed unless they have been kept."""
    kept: Path = options.out / row.file
    if not kept.exists():
        pair: tuple[np.ndarray, ...] = (data.features, data.test_features)
        if row.start:
            pair = head_bits(row, data, options)
        elif row.name != "features":
            coder = CONTROLS[row.name](data.features, options.bits, row.seed)
            pair = tuple(unpack_bits(coder.encode(x), options.bits) for x in pair)
        found: dict[str, Any] = accuracies(pair, data.labels, data.test_labels)
        if row.name != "features":
            found["correlation"] = code_statistics(pair[0])["mean_absolute_correlation"]
        print(f"{row.file}: {found}", file=sys.stderr, flush=True)
        write_json(kept, dataclasses.asdict(row) | found, indent=None)
    return json.loads(kept.read_text())


def accuracies(pair: tuple[np.ndarray, ...], train_y: np.ndarray, test_y: np.ndarray) -> dict[str, Any]:
    """probe: linear; knn: by cosine for float32 features, by Hamming distance for bits [N, b]. Percent."""
    train_x, test_x = pair
    if train_x.dtype == np.float32:
        knn = weighted_knn(train_x, train_y, test_x, test_y)
    else:
        knn = hamming_knn(pack_bits(train_x), train_y, pack_bits(test_x), test_y, train_x.shape[1])
    probe = linear_probe(train_x.astype(np.float32), train_y, test_x.astype(np.float32), test_y)
    return {"probe": probe.accuracy, "knn": knn}


def head_bits(row: Row, data: Features, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Train the head; returns the bits of the clean images, bool [N, b], for train and test."""
    torch.manual_seed(row.seed)
    width = data.features.shape[1]
    layer = nn.Linear(width, options.bits, bias=False)
    started(layer.weight, row.start, data)
    normalised = nn.BatchNorm1d(width, affine=False)
    head = nn.Sequential(normalised, layer, nn.BatchNorm1d(options.bits, affine=False))
    project = projector(options.bits, ModelSettings(hidden=256, projection=128))
    parameters = [*head.parameters(), *project.parameters()]
    order = np.random.default_rng(row.seed).permutation(len(data.views))
    optimiser = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=1e-4)
    for step in range(options.steps):
        warm, left = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimiser.param_groups[0]["lr"] = options.rate * warm * left
        views = torch.from_numpy(data.views[order[step % len(order)]])
        noise = Noise(torch.tensor([key_of(row.seed, step)]), torch.arange(len(views)))
        loss = objective(row, Bernoulli().posterior(INIT_SCALE * head(views)), noise, project)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    with torch.no_grad():
        train, test = (head[:2](torch.from_numpy(x)) for x in (data.features, data.test_features))
    threshold = train.mean(dim=0)
    return (train > threshold).numpy(), (test > threshold).numpy()


@torch.no_grad()
def started(weight: Tensor, start: str, data: Features) -> None:
    """Set the layer's initial weights [b, F], for features that are normalised over the views."""
    if start == "principal":
        axes = torch.from_numpy(principal_directions(data.features, len(weight)).T)
        deviation = torch.from_numpy(data.views.reshape(-1, data.views.shape[-1]).std(axis=0))
        weight.copy_(F.normalize(axes * deviation, dim=1))
    else:
        {"identity": nn.init.eye_, "orthogonal": nn.init.orthogonal_}[start](weight)


def paired(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples minus hard bits, in percentage points, paired by seed."""
    trained = {((m["name"], m["of"]), m["seed"]): m for m in made if m["start"] == "orthogonal"}
    pairs = {
        "decorrelation": (("decorrelation", "sample"), ("decorrelation", "hard")),
        "projector": (("projector, samples", "hard"), ("projector, hard", "hard")),
    }
    found = {}
    for name, (samples, hard) in pairs.items():
        seeds = sorted({seed for kind, seed in trained if kind == hard and (samples, seed) in trained})
        for what in ("probe", "knn") if seeds else ():
            each = [round(trained[samples, s][what] - trained[hard, s][what], 4) for s in seeds]
            found[f"{name}_{what}"] = interval(each) | {"seeds": seeds, "each": each}
    return found


def show(made: list[dict[str, Any]]) -> None:
    print(f"{'code':22}{'start':12}{'weight':>7} {'of':8}{'seed':>5}{'probe':>8}{'kNN':>8}{'corr.':>8}")
    for m in made:
        trained = f"{m['start']:12}{m['weight']:7} {m['of']:8}" if m["start"] else f"{'-':12}{'':16}"
        correlation = f"{m['correlation']:8.3f}" if "correlation" in m else ""
        print(f"{m['name']:22}{trained}{m['seed']:5}{m['probe']:8.2f}{m['knn']:8.2f}{correlation}")
    for name, d in paired(made).items():
        error = f" +- {d['standard_error']:.2f}" if d["standard_error"] is not None else ""
        print(f"samples minus hard bits, {name}: {d['mean']:+.2f}{error}, seeds {d['seeds']}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
