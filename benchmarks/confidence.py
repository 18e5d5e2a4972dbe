"""Which score best detects poorly understood images? Compares candidates with the distance, on finished runs.

    python -m benchmarks.confidence RUN ... --unseen train12000.beton --test test.beton --foreign other.beton
    python -m benchmarks.confidence --print                    the tables, from the file --json

The database is the run's own training images. Queries are `unseen`, 2,000 training images that the run wasn't
trained on (from a larger --subset of the same set, without those whose names are in the training set), for
choosing a score, and `test`, 2,000 test images, for confirming it. Each score is higher if less certain:

    posterior, norm   the family's own; minus the norm of the features
    distance          1 - cosine of standardised features to the nearest neighbour
    distance 20       1 - mean cosine of features to the 20 nearest neighbours
    density           minus the log-density, per number, of the mean activations of all backbone stages
    density, joint    the same, by one Gaussian over all stages together
    density, first    the same, of the first stage only
    locations         of the posterior's locations; without a latent, of the features
    search, distance  squared, from the query to its nearest code, ITQ of 64 bits, as `lvssl search` prints it
    search, cosine    1 - their cosine. A wrong neighbour is that code's image
    entropy: norm     for a Bernoulli: entropy of logits scaled to the training images' median norm
    entropy: density  for a Bernoulli: of logits damped by the squared Mahalanobis distance per number
    draws, blocks, views at k 10, 50, 100
                      1 - mean Jaccard similarity, over pairs, of the k nearest neighbours by each of eight:
                      samples of the posterior; blocks of the standardised features; augmented views

Uses: a wrong neighbour (AUROC for whether the nearest other query image, `r_auroc`, or the nearest database
image, `training`, is of another class); foreign images (AUROC for each set); Spearman's correlation with the
severity of corruptions; and the share of crops that are less certain than the whole image. Rows are added to
those in --json; the rows there for the same checkpoint and images aren't measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.script import parser_of
from lvssl.codes.index import nearest_rows
from lvssl.codes.quantiser import FITS
from lvssl.commands.main import guarded
from lvssl.evaluation.corruptions import CORRUPTIONS, OUT_OF_DISTRIBUTION, SEVERITIES, corrupt
from lvssl.evaluation.density import fit_density
from lvssl.evaluation.outputs import NetworkOutputs, network_outputs
from lvssl.evaluation.scorer import Distance, severity_correlation
from lvssl.evaluation.uncertainty import auroc, r_auroc
from lvssl.latents.bernoulli import BernoulliPosterior
from lvssl.models.backbone import stage_widths
from lvssl.runs.labels import numbered_as
from lvssl.runs.run import Run, load_run, versions
from pipelines.augment import augment
from pipelines.datasets.beton import stored_names
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import open_reader
from pipelines.decode.resize import resize_crop
from pipelines.files import write_json
from pipelines.loader import evaluation_crops
from pipelines.parameters import crop_boxes, draw_parameters
from pipelines.views import ViewSettings

ASKED, FOREIGN, CORRUPTED, SETS, KS = 2000, 1000, 200, 8, (10, 50, 100)
SEARCHED = 64  # bits
SETS_OF = ("blocks", "views", "draws")
USES = ("r_auroc", "training", "foreign", "severity", "crops")


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--unseen", type=Path, help="a beton with more images of the training set")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="*", default=[], help="betons of other data")
    parser.add_argument("--sets", nargs="*", choices=SETS_OF, default=SETS_OF, help="whose agreement")
    parser.add_argument("--json", type=Path, default=Path("docs/confidence.json"))
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args(arguments)
    found = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    for folder in options.runs:
        run = load_run(folder)
        about = {"run": folder.name, "checkpoint": run.digest[:12]}
        names = {"distance", *(f"{name} 10" for name in options.sets if name != "draws")}
        wanted = {"unseen": options.unseen, "test": options.test}
        wanted = {
            asked: path
            for asked, path in wanted.items()
            if path and not names <= there(found["rows"], about | {"asked": asked}, path, options.foreign)
        }
        if not wanted:
            continue
        candidates = Candidates(run, options.sets)
        for asked, path in wanted.items():
            crops, labels = images_of(run, path, asked == "unseen")
            each = about | {"asked": asked, "images": path.stem}
            rows = [each | row for row in measured(candidates, crops, labels, options)]
            new = {(row["run"], row["asked"], row["score"]) for row in rows}
            others = [row for row in found["rows"] if (row["run"], row["asked"], row["score"]) not in new]
            found = {
                "command": "python -m benchmarks.confidence RUN ... --unseen FILE --test FILE --foreign FILE",
                "versions": versions(),
                "rows": others + rows,
            }
            write_json(options.json, found)
            print(f"{folder.name}, {asked}: {len(rows)} scores", flush=True)
    if options.print:
        print("\n\n".join(tables(found["rows"])))


def there(rows: Rows, about: dict[str, Any], path: Path, foreign: list[Path]) -> set[str]:
    """The scores of the rows that are of the same images. Older rows don't name theirs."""
    sets = {f"foreign {name}" for name in (*OUT_OF_DISTRIBUTION, *(each.stem for each in foreign))}
    return {
        row["score"]
        for row in rows
        if about.items() <= row.items()
        and row.get("images", path.stem) == path.stem
        and {use for use in row if use.startswith("foreign ")} == sets
    }


def images_of(run: Run, path: Path, unseen: bool) -> tuple[np.ndarray, np.ndarray]:
    """ASKED images, uint8 [N, R, R, 3], and their labels in the training set's numbering."""
    train = open_reader(run.settings.data)
    source = numbered_as(open_reader(path), path, train.classes, str(run.settings.data))
    rows = np.arange(len(source))
    if unseen:
        seen = set(stored_names(run.settings.data) or ())
        rows = np.flatnonzero([name not in seen for name in stored_names(path) or ()])
    rows = rows[evenly_spaced(len(rows), ASKED)]
    return evaluation_crops(source, run.settings.view, rows.copy()), source.labels[rows]


def measured(
    candidates: Candidates, crops: np.ndarray, labels: np.ndarray, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each score, with its value for each use."""
    run, view = candidates.run, candidates.run.settings.view
    asked, scores = candidates(crops)
    nearest = candidates.nearest(candidates.by_cosine(asked.features), 1)[:, 0].numpy()
    wrong = candidates.labels[nearest] != labels
    found: dict[str, dict[str, Any]] = {
        name: {"r_auroc": r_auroc(asked.features, labels, score).r_auroc, "training": auroc(wrong, score)}
        for name, score in scores.items()
    }
    others = {name: make(FOREIGN, view.resolution, 0) for name, make in OUT_OF_DISTRIBUTION.items()}
    for each in options.foreign:
        reader = open_reader(each)
        others[each.stem] = evaluation_crops(reader, view, evenly_spaced(len(reader), FOREIGN))
    for name, pixels in others.items():
        far = candidates(pixels)[1]
        for key, row in found.items():
            both = np.concatenate([scores[key], far[key]])
            row[f"foreign {name}"] = auroc(np.arange(len(both)) >= len(crops), both)
    some = evenly_spaced(len(crops), CORRUPTED)
    for kind in CORRUPTIONS:
        levels = [candidates(corrupt(crops[some], kind, severity))[1] for severity in SEVERITIES]
        for key, row in found.items():
            values = np.stack([scores[key][some], *(level[key] for level in levels)])
            row[f"severity {kind}"] = severity_correlation(values)
            if kind == "crop":
                row["crops"] = float((values[1:] > values[0]).mean())
    for row in found.values():
        for use in ("foreign", "severity"):
            row[use] = statistics.mean(value for name, value in row.items() if name.startswith(f"{use} "))
    found |= of_search(candidates, asked.features, labels)
    about = {
        "family": run.settings.latent.family,
        "seed": run.settings.seed,
        "data": run.settings.data.stem.partition("-train")[0],
    }
    return [
        about | {"score": name} | {use: round(value, 4) for use, value in row.items()}
        for name, row in found.items()
    ]


def of_search(candidates: Candidates, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    quantiser = FITS["itq"](candidates.known, SEARCHED)
    codes = quantiser.encode(candidates.known)
    rows, distances = nearest_rows(features, codes, 1, quantiser)
    projected = quantiser.project(features)
    cosines = np.array([quantiser.cosines(x, codes[row])[0] for x, row in zip(projected, rows)])
    wrong = candidates.labels[rows[:, 0]] != labels
    by = {"search, distance": distances[:, 0], "search, cosine": -cosines}
    return {name: {"training": auroc(wrong, score)} for name, score in by.items()}


class Candidates:
    """All scores of a run, fitted on its training images."""

    def __init__(self, run: Run, sets: Sequence[str] = SETS_OF) -> None:
        self.run, self.sets = run, sets
        train = open_reader(run.settings.data)
        self.labels = train.labels
        known = evaluation_crops(train, run.settings.view, np.arange(len(train)))
        outputs = network_outputs(run.network, known, run.settings.view)
        self.known = outputs.features
        self.features, self.means = unit(self.known), unit(outputs.mean)
        self.distance = Distance(outputs.features)
        x, where = outputs.features, self.locations(outputs)
        self.standard = x.mean(axis=0), x.std(axis=0) + 1e-6
        self.blocks = self.in_blocks(x)
        widths, stages = stage_widths(run.settings.model.backbone), outputs.stages
        self.first = widths[0]
        self.densities = {
            "density": fit_density(stages, widths),
            "density, joint": fit_density(stages),
            "density, first": fit_density(stages[:, : self.first]),
            "locations": fit_density(where),
        }
        self.logit_norm = float(np.median(np.linalg.norm(where, axis=1)))

    def __call__(self, crops: np.ndarray) -> tuple[NetworkOutputs, dict[str, np.ndarray]]:
        """(outputs, {score: float64 [N], higher if less certain})."""
        found = network_outputs(self.run.network, crops, self.run.settings.view, SETS)
        scores = {"posterior": found.uncertainty, "norm": -np.linalg.norm(found.features, axis=1)}
        cosine = self.by_cosine(found.features)
        scores["distance"] = self.distance(found.features)
        scores["distance 20"] = 1 - cosine.topk(20, dim=1).values.mean(dim=1).numpy()
        where = self.locations(found)
        of = {"locations": where, "density, first": found.stages[:, : self.first]}
        scores |= {name: fit(of.get(name, found.stages)) for name, fit in self.densities.items()}
        if self.run.settings.latent.family == "bernoulli":
            scores |= self.bounded_entropies(where)
        for name in self.sets:
            near = [self.nearest(each, max(KS)) for each in self.similarities(name, crops, found)]
            scores |= {f"{name} {k}": 1 - mean_jaccard([each[:, :k] for each in near]) for k in KS if near}
        return found, {name: score.astype(np.float64) for name, score in scores.items()}

    def locations(self, outputs: NetworkOutputs) -> np.ndarray:
        """The posteriors' locations, float32 [N, L]."""
        network = self.run.network
        with torch.no_grad():
            parameters = network.posterior_parameters(torch.from_numpy(outputs.features))
        return parameters[:, : network.family.location_count(network.dim)].numpy()

    def similarities(self, name: str, crops: np.ndarray, found: NetworkOutputs) -> Iterator[Tensor]:
        """[N, database] for each of SETS ways to look at the images; no draws for a run without a latent."""
        if name == "blocks":
            yield from (x @ block.T for x, block in zip(self.in_blocks(found.features), self.blocks))
        elif name == "draws":
            yield from (unit(sample) @ self.means.T for sample in found.samples)
        else:
            for each in augmented(crops, self.run.settings.view, SETS):
                outputs = network_outputs(self.run.network, each, self.run.settings.view)
                yield self.by_cosine(outputs.features)

    def by_cosine(self, features: np.ndarray) -> Tensor:
        """Cosine similarities [N, database]."""
        return unit(features) @ self.features.T

    def in_blocks(self, features: np.ndarray) -> list[Tensor]:
        """Standardised features in SETS blocks, each normalised to length 1."""
        mean, scale = self.standard
        return [unit(part) for part in np.array_split((features - mean) / scale, SETS, axis=1)]

    def nearest(self, similarity: Tensor, k: int) -> Tensor:
        return similarity.topk(k, dim=1).indices

    def bounded_entropies(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Entropies for logits [N, D] whose size is kept from growing without bound."""
        norm = np.linalg.norm(logits, axis=1, keepdims=True)
        density = self.densities["locations"]
        white = (logits - density.mean) @ density.whitening
        variance = np.square(white).sum(axis=1, keepdims=True)  # per number; 1 on average in training
        damped = logits / np.sqrt(1 + np.pi / 8 * variance)  # as for the mean probability of a Gaussian logit
        by = {"entropy: norm": logits * (self.logit_norm / norm), "entropy: density": damped}
        return {
            name: BernoulliPosterior(torch.from_numpy(x), False).entropy().numpy() for name, x in by.items()
        }


def unit(x: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(np.ascontiguousarray(x, np.float32)), dim=1)


def augmented(crops: np.ndarray, view: ViewSettings, count: int) -> Iterator[Tensor]:
    """`count` views of each of crops uint8 [N, R, R, 3], drawn as in training and normalised, each float32
    [N, 3, R, R]."""
    size = np.full(len(crops), crops.shape[1])
    table = draw_parameters(view, 0, 0, np.arange(len(crops)), size, size, count)
    boxes, out = crop_boxes(table), np.empty_like(crops)
    for v in range(count):
        for crop, box, target in zip(crops, boxes[:, v], out):
            resize_crop(crop, box, target, False)
        yield augment(torch.from_numpy(out), torch.from_numpy(table[:, v].copy()), view)


def mean_jaccard(sets: list[Tensor]) -> np.ndarray:
    """Mean over pairs of sets, float64 [N] in [0, 1]; a set is k distinct numbers per row, int64 [N, k]."""
    ordered = [rows.sort(dim=1).values for rows in sets]
    k, pairs = ordered[0].shape[1], list(combinations(ordered, 2))
    total = np.zeros(len(ordered[0]))
    for one, other in pairs:
        place = torch.searchsorted(one, other).clamp(max=k - 1)
        common = (one.gather(1, place) == other).sum(dim=1).numpy()
        total += common / (2 * k - common)
    return total / len(pairs)


# Tables ---------------------------------------------------------------------------------------------------


OF_LATENT = ("posterior", "draws", "entropy")  # scores that a run without a latent lacks
WITHOUT_LATENT = ("none", "sign")
Rows = list[dict[str, Any]]


def tables(rows: Rows) -> Iterator[str]:
    """The value of each score, unseen / test, averaged over all runs; and the goals, on test images."""
    rows = [
        row
        for row in rows
        if row["family"] not in WITHOUT_LATENT or row["score"].split()[0].strip(":") not in OF_LATENT
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        lines = [f"| {data} | runs | {' | '.join(USES)} |", "| --- " * (len(USES) + 2) + "|"]
        for score in sorted({row["score"] for row in of_data}):
            found = [row for row in of_data if row["score"] == score]
            cells = [" / ".join(mean(found, use)) for use in USES]
            lines.append(f"| {score} | {len({row['run'] for row in found})} | {' | '.join(cells)} |")
        yield "\n".join(lines)
    heads = (
        "least foreign > .75 | their mean > .90 | training +.03 | r_auroc +.03 | severity +.10 | crops > .90"
    )
    lines = [f"| data | family | {heads} |", "| --- " * 8 + "|"]
    tested = [row for row in rows if row["asked"] == "test"]
    done = [(row["data"], row["family"], row["seed"]) for row in tested if row["score"] == "density"]
    for arm in dict.fromkeys(run[:2] for run in done):
        by_seed = zip(*(goals(tested, *run) for run in sorted(done) if run[:2] == arm))
        lines.append(f"| {' | '.join(arm)} | {' | '.join(', '.join(each) for each in by_seed)} |")
    yield "\n".join(lines)


def mean(rows: Rows, use: str) -> Iterator[str]:
    for asked in ("unseen", "test"):
        values = [row[use] for row in rows if row["asked"] == asked and use in row]
        yield f"{statistics.mean(values):.3f}" if values else "-"


def goals(rows: Rows, data: str, family: str, seed: int) -> list[str]:
    """One run's values of density (foreign images, severity, crops) and of distance (wrong neighbours), and
    their gains over the better of that seed's two controls by their `distance 20`."""

    def of(family: str, score: str) -> dict[str, Any]:
        wanted = {"data": data, "family": family, "seed": seed, "score": score}
        return next((row for row in rows if wanted.items() <= row.items()), {})

    density, distance = of(family, "density"), of(family, "distance")
    controls = [row for name in WITHOUT_LATENT if (row := of(name, "distance 20"))]
    sets = [value for use, value in density.items() if use.startswith("foreign ")]
    gains = [
        row[use] - max((control[use] for control in controls), default=float("nan"))
        for row, use in ((distance, "training"), (distance, "r_auroc"), (density, "severity"))
    ]
    found = [f"{min(sets):.3f}", f"{density['foreign']:.3f}", *(f"{gain:+.3f}" for gain in gains)]
    return [*found, f"{density['crops']:.3f}"]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
