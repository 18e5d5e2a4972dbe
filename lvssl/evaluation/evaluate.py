"""Evaluate a run with linear probes and kNN, next to its control and to baselines that need no training."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lvssl.codes.controls import Coder
from lvssl.codes.search import hamming_search
from lvssl.codes.statistics import code_statistics
from lvssl.evaluation import streamed
from lvssl.evaluation.embedding import (
    LARGE_SET,
    SIDE,
    Embedding,
    calibrate_batch_statistics,
    embed,
    pixels,
    shrink,
)
from lvssl.evaluation.fitted import SAMPLE
from lvssl.evaluation.knn import customary, hamming_knn, nearest_by_cosine, weighted_knn
from lvssl.evaluation.measures import equal_bit_coders, equal_bit_codes, without_opq
from lvssl.evaluation.probe import ProbeResult, linear_probe
from lvssl.evaluation.sets import (
    class_names,
    embed_both,
    labelled_pair,
    picture_view,
    sides_of,
    smaller_by,
    with_defaults,
)
from lvssl.evaluation.streamed import Bits, Rows, streamed_probe
from lvssl.evaluation.uncertainty import r_auroc, risk_coverage_area
from lvssl.latents import WITHOUT_LATENT
from lvssl.models.inference import device_of, infer
from lvssl.models.network import LVNet
from lvssl.runs.features import Store
from lvssl.runs.identity import describe_set
from lvssl.runs.labels import Subset, readable, sound_part
from lvssl.runs.result import ResultFile, as_number
from lvssl.runs.rows import Point, Row, by_point, rows_of_points, stored_as
from lvssl.runs.run import Run, load_run, run_names
from lvssl.settings.measure import EvaluateSettings
from pipelines.datasets.dataset import evenly_spaced
from pipelines.datasets.parts import files_of
from pipelines.datasets.recognise import set_name
from pipelines.decode import Reader
from pipelines.errors import InputError
from pipelines.files import naming, written_aside
from pipelines.formats.manifest import content_of, manifest_path
from pipelines.kernels.pack import unpack_bits
from pipelines.loader import Replacements, evaluation_crops
from pipelines.views import ViewSettings

GALLERY = "gallery.npz"
QUERIES, NEIGHBOURS, EXTREMES = 40, 6, 12  # pictures in the gallery
CALIBRATED = 50_000  # images of a large set from which the random encoder's running statistics are computed
EXACT = "L2 logistic regression by L-BFGS, its strength chosen on held-out training images"


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a run, write evaluation.json and gallery.npz to --out (or the run's folder), and return the
    content of evaluation.json. A result that exists is not measured again.

    Raises:
        InputError: no such run or data, unfinished runs, labels that don't match, or a result for other
            settings exists there.
    """
    settings.validate()
    run = load_run(settings.run)
    settings = with_defaults(settings, run)
    assert settings.test is not None and settings.on_error is not None
    control = load_run(settings.control) if settings.control else None
    runs = [run, control] if control else [run]
    result = ResultFile.of_run("evaluate", "evaluation.json", settings, runs, GALLERY)
    if (done := result.found()) is not None:
        return done
    on_error, train_path = settings.on_error, settings.train or run.settings.data
    train, test = labelled_pair(run, control, settings.train, settings.test)
    if control and control.network.family.stochastic:
        raise InputError(
            f"{control.folder}: a control must be of family {WITHOUT_LATENT}, not "
            f"{control.settings.latent.family}; pass one with --control"
        )
    if control and control.settings.latent.objective != run.settings.latent.objective:
        print(
            f"warning: {control.folder} was trained with --objective {control.settings.latent.objective}, "
            f"{run.folder} with {run.settings.latent.objective}: a difference may be due to the objective",
            file=sys.stderr,
        )
    if len(test) < 2:
        raise InputError(f"{settings.test}: at least two test images are needed to evaluate a run")

    stages = tqdm(total=3 + bool(control), desc=f"evaluate {run.folder.name}", unit="stage", disable=None)
    sets = embed_both(run, train, test, settings.workers, on_error)
    skipped = {"train": len(train) - len(sets[0].rows), "test": len(test) - len(sets[1].rows)}
    train = sound_part(train_path, train, sets[0].rows)
    test = sound_part(settings.test, test, sets[1].rows)
    names, seed = run_names(runs), run.settings.seed
    points, wrong, _ = measure(*sets, run.network, [], settings.probe_epochs)
    points += [("code", "code", sets[1].bits, of_code(run, sets[1], test, on_error))]
    # Whether the posterior's scale tells where features and probe fail.
    score = r_auroc(sets[1].features, sets[1].labels, sets[1].uncertainty)._asdict()
    score["aurc"] = risk_coverage_area(wrong, sets[1].uncertainty)
    points += [("uncertainty", "", None, score)]
    rows = rows_of_points(names[0], seed, points)
    stages.update()
    left_out: list[str] = []
    if control:
        control_sets = embed_both(control, train, test, settings.workers, on_error)
        codes = equal_bit_codes({points[1][2] or 0})
        found, _, left_out = measure(*control_sets, control.network, codes, settings.probe_epochs)
        rows += rows_of_points(names[1], control.settings.seed, found)
        stages.update()
    random, raw = baselines(run, train, test, settings, on_error)
    rows += rows_of_points("random encoder", seed, [("features", "", None, {"linear": random})])
    rows += rows_of_points("no encoder", seed, [("pixels", "", None, {"linear": raw})])
    stages.update()
    content = {
        "run": run.described(names[0]),
        "control": control.described(names[1]) if control else None,
        "rows": rows,
        "left_out": left_out + (without_opq() if control else []),
        "protocol": protocol(train, settings.probe_epochs),
        "data": describe_data(run, settings, train, test) | {"skipped": skipped},
    }
    sources = Replacements(train, on_error), Replacements(test, on_error)
    write_gallery(result.file_beside(), *sets, *sources, run.settings.view, class_names(train))
    content = result.write(content)
    stages.update()
    stages.close()
    return content


def linear(
    train: Rows, train_y: np.ndarray, test: Rows, test_y: np.ndarray, device: torch.device, epochs: int = 0
) -> ProbeResult:
    """Fit the exact linear probe or, from LARGE_SET training images on, the streamed one on the device."""
    if len(train_y) < LARGE_SET:
        return linear_probe(train[:], train_y, test[:], test_y)
    return streamed_probe(train, train_y, test, test_y, device=device, epochs=epochs)


def protocol(train: Reader, epochs: int) -> dict[str, Any]:
    """Describe how `measure` and `baselines` measure with this many training images."""
    k, temperature = customary(len(train))
    probe = EXACT if len(train) < LARGE_SET else streamed.protocol(epochs)
    fitted = f"fitted on {min(len(train), SAMPLE):,} of {len(train):,} training images, evenly spread"
    return {"linear": probe, "knn": {"k": k, "temperature": temperature}, "codes of the control": fitted}


def measure(
    train: Embedding, test: Embedding, network: LVNet, codes: list[tuple[str, int]], epochs: int = 0
) -> tuple[list[Point], np.ndarray, list[str]]:
    """Measure accuracies in percent on features and codes, on the network's device. Returns the accuracies,
    the feature probe's mistakes (bool [test]), and a line for each code that can't be made. The code of a run
    with a latent is its own. Without a latent, `codes` (method, bits) are made from the features, by default
    their signs.
    """
    labels, device, width = (train.labels, test.labels), device_of(network), test.features.shape[1]
    k, temperature = customary(len(labels[0]))

    def accuracies(x: Rows, test_x: Rows) -> tuple[ProbeResult, dict[str, float]]:
        probe = linear(x, labels[0], test_x, labels[1], device, epochs)
        knn = weighted_knn(x, labels[0], test_x, labels[1], k, temperature, device)
        return probe, {"linear": probe.accuracy, "knn": knn}

    def of_bits(packed: tuple[np.ndarray, np.ndarray], bits: int) -> dict[str, float]:
        x, test_x = (Bits(each, bits) for each in packed)
        found = linear(x, labels[0], test_x, labels[1], device, epochs).accuracy
        knn = hamming_knn(packed[0], labels[0], packed[1], labels[1], bits, k, temperature)
        return {"linear": found, "knn": knn}

    left_out: list[str] = []
    probe, of_features = accuracies(train.features, test.features)
    points: list[Point] = [("features", "", 32 * width, of_features)]
    if network.family.stochastic:
        points.append(("code", "code", test.bits, of_bits((train.codes, test.codes), test.bits)))
    else:
        sample = train.features[evenly_spaced(len(train.features), SAMPLE)]
        for method, bits, coder in equal_bit_coders(sample, codes or [("sign", width)], left_out):
            both = Coded.of(coder, train.features), Coded.of(coder, test.features)
            figures = of_bits((both[0].codes, both[1].codes), bits) if coder.hamming else accuracies(*both)[1]
            points.append(("code", method, bits, figures))
    return points, probe.predictions != labels[1], left_out


@dataclass(frozen=True)
class Coded:
    """Features as represented by their codes, decoded when they are read; implements `Rows`."""

    coder: Coder
    codes: np.ndarray  # uint8 [N, bytes]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, coder: Coder, features: np.ndarray, rows: int = 8192) -> "Coded":
        """Encode features [N, F], `rows` at a time if they are mapped."""
        parts = [features[start : start + rows] for start in range(0, len(features), rows)]
        codes = np.concatenate([coder.encode(part) for part in parts])
        return cls(coder, codes, (len(codes), coder.decode(codes[:1]).shape[1]))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.coder.decode(self.codes[rows])


def baselines(
    run: Run, train: Reader, test: Reader, chosen: EvaluateSettings, on_error: str
) -> tuple[float, float]:
    """Return the probe's accuracy on what needs no training: the untrained network, and the pixels."""
    settings, how = run.settings, (chosen.workers, on_error)
    torch.manual_seed(settings.seed)
    random = LVNet(settings.model, settings.latent, settings.view.resolution)
    device = device_of(run.network)
    random = random.to(device)
    large = len(train) >= LARGE_SET
    seen = Subset(train, evenly_spaced(len(train), CALIBRATED)) if large else train
    calibrate_batch_statistics(random, seen, settings.view, *how)

    def accuracy(rows: list[Rows]) -> float:
        return linear(rows[0], train.labels, rows[1], test.labels, device, chosen.probe_epochs).accuracy

    if not large:
        sets: list[Rows] = [embed(random, each, settings.view, *how).features for each in (train, test)]
        raw: list[Rows] = [pixels(each, settings.view, *how) for each in (train, test)]
        return accuracy(sets), accuracy(raw)
    found = []
    for name, network in (("random", random), ("pixels", None)):
        with ExitStack() as stores:
            rows: list[Rows] = [
                stores.enter_context(kept_for_now(run, name, network, source, *how))
                for source in (train, test)
            ]
            found.append(accuracy(rows))
    return found[0], found[1]


@contextmanager
def kept_for_now(
    run: Run, name: str, network: LVNet | None, source: Reader, workers: int, on_error: str
) -> Iterator[np.ndarray]:
    """Yield features of an untrained network, or pixels without a network, memory-mapped, [N, F]. The files
    lie in RUN/features until they have been used; an interrupted call is resumed."""
    view = run.settings.view

    def compute(at: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        crops = readable(source, view, workers, on_error, at, f"evaluate: {name}")
        if network is not None:
            for x, rows in infer(network, crops, view, network.features):
                yield rows, {"x": x.float().cpu().numpy()}
        else:
            for images, rows in crops:
                small = shrink(images.permute(0, 3, 1, 2) / 255, SIDE)
                yield rows, {"x": small.flatten(1).half().numpy()}

    key = {"floor": name, "seed": run.settings.seed, "checkpoint": run.digest, "set": describe_set(source)}
    store = Store.beside(run.folder / "features", key, len(source))
    with naming(store.folder):
        store.fill(compute)
    yield store.open()["x"]
    shutil.rmtree(store.folder, ignore_errors=True)


def of_code(run: Run, test: Embedding, source: Reader, on_error: str) -> dict[str, float | int | None]:
    """Return statistics of the run's codes, and their compression relative to pixels, JPEGs and features."""
    ratios = smaller_by(run, source, on_error)(test.bits)
    rate = {"rate_bits": test.rate_bits} if run.network.family.stochastic else {}
    return ratios | code_statistics(unpack_bits(test.codes, test.bits), test.bit_means) | rate


def describe_data(run: Run, settings: EvaluateSettings, train: Reader, test: Reader) -> dict[str, Any]:
    assert settings.test is not None
    source = manifest(settings.test).get("source", str(settings.test))
    return {
        "name": set_name(str(source)) or set_name(str(settings.test.resolve())),
        "train": len(train),
        "test": len(test),
        "resolution": run.settings.view.resolution,
    }


def manifest(data: Path) -> dict[str, Any]:
    """Return the manifest of a beton (of the first of several) or of tars; empty if there is none."""
    try:
        return content_of(manifest_path(files_of(data)[0]))
    except InputError:
        return {}


def write_gallery(
    path: Path,
    train: Embedding,
    test: Embedding,
    train_source: Replacements,
    test_source: Replacements,
    view: ViewSettings,
    names: list[str],
) -> None:
    """Write the report's pictures: test images with their neighbours, and the least and most certain.

    Queries are spread over the classes and chosen by position, regardless of how well they do.
    """
    queries = spread_over_classes(test.labels, QUERIES)
    by_code, _ = hamming_search(test.codes[queries], train.codes, min(NEIGHBOURS, len(train.codes)))
    most = min(NEIGHBOURS, len(train.features))
    by_feature = nearest_by_cosine(train.features, test.features[queries], most)[1].numpy()
    ranking = np.argsort(test.uncertainty, kind="stable")
    certain, uncertain = ranking[:EXTREMES], ranking[::-1][:EXTREMES]

    from_test = np.unique(np.concatenate([queries, certain, uncertain]))
    from_train = np.unique(np.concatenate([by_code.ravel(), by_feature.ravel()]))
    shown = ((test_source, from_test), (train_source, from_train))
    view = picture_view(view, [side for given, rows in shown for side in sides_of(given.source, rows)])
    images = [evaluation_crops(given.source, view, rows, given) for given, rows in shown]

    def in_test(rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(from_test, rows)

    def in_train(rows: np.ndarray) -> np.ndarray:
        return len(from_test) + np.searchsorted(from_train, rows)

    content = {
        "images": np.concatenate(images),
        "labels": np.concatenate([test.labels[from_test], train.labels[from_train]]),
        "class_names": np.array(names),
        "query": in_test(queries),
        "neighbours_code": in_train(by_code),
        "neighbours_feature": in_train(by_feature),
        "most_certain": in_test(certain),
        "least_certain": in_test(uncertain),
        "uncertainty": np.concatenate([test.uncertainty[from_test], train.uncertainty[from_train]]),
    }
    with written_aside(path) as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Return `count` positions, taking the classes in turn and the first images of each class first."""
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn))[:count]


def print_table(rows: list[Row]) -> None:
    """Print the accuracies."""
    print(f"{'run':16}{'representation':16}{'bits':>8}{'linear %':>10}{'kNN %':>8}")
    for point in by_point(rows):
        if "linear" in point:
            bits, knn = (point.get(name) for name in ("bits", "knn"))
            print(f"{point['run'][:15]:16}{stored_as(point):16}{f'{bits:,}' if bits else '-':>8}", end="")
            print(f"{as_number(point['linear']):>10.1f}{'-' if knn is None else f'{knn:.1f}':>8}")
