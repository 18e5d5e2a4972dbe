"""Analyse what a run's latent provides beyond accuracy: uncertainty, single bits, regression from codes.

Every figure is shown next to a control: the deterministic run's scores, its features and its sign bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lvssl.evaluation.bit_analysis import class_auroc, flip_bits, mutual_information, sparse_probe
from lvssl.evaluation.factors import known_factors, representations
from lvssl.evaluation.outputs import NetworkOutputs
from lvssl.evaluation.regression import ridge_each
from lvssl.evaluation.scorer import uncertainty
from lvssl.evaluation.sets import (
    Sampling,
    Sets,
    class_names,
    labelled_pair,
    picture_view,
    sides_of,
    with_defaults,
)
from lvssl.runs.result import ResultFile, as_number
from lvssl.runs.rows import FOREIGN, Point, Row, by_point, rows_of_points
from lvssl.runs.run import Run, load_run, run_names
from lvssl.settings.measure import FEWEST, AnalyseSettings
from pipelines.datasets.dataset import evenly_spaced
from pipelines.errors import InputError
from pipelines.files import written_aside
from pipelines.loader import Replacements, evaluation_crops

BITS = "bits.npz"
SHOWN_BITS, SHOWN_IMAGES = 48, 8  # shown in the page's bit explorer


def analyse(settings: AnalyseSettings) -> dict[str, Any]:
    """Analyse a run, write analysis.json and bits.npz to --out (or the run's folder), and return the content
    of analysis.json. A result that exists is not measured again.

    Raises:
        InputError: no such run or data, runs without labels, or a result for other settings exists there.
    """
    settings.validate()
    run = load_run(settings.run)
    settings = with_defaults(settings, run)
    if settings.alone:
        settings = replace(settings, control=None)
    assert settings.test is not None
    others = [settings.control] if settings.control else []
    models = [run, *(load_run(path) for path in (*others, *settings.others))]
    control = models[1] if settings.control else None
    written = ResultFile.of_run("analyse", "analysis.json", settings, models, BITS)
    if (done := written.found()) is not None:
        return done
    train, test = labelled_pair(run, control, settings.train, settings.test)
    if min(train.labels.min(initial=0), test.labels.min(initial=0)) < 0:
        raise InputError(
            f"{settings.train or run.settings.data}, {settings.test}: labels are needed to analyse a run"
        )
    if len(test) < FEWEST:
        raise InputError(f"{settings.test}: at least {FEWEST} test images are needed to analyse a run")
    sampling = Sampling(settings.max_images, settings.samples, settings.seed, settings.ood, settings.on_error)
    work = tqdm(total=3 * len(models) + 1, desc=f"analyse {run.folder.name}", unit="part", disable=None)
    sets = Sets.of(sampling, run, train, test)
    if len(np.unique(sets.test_labels)) < 2:
        raise InputError(f"{settings.test}: test images of at least two classes are needed to analyse a run")
    images = {"train": len(sets.train), "test": len(sets.test), "skipped": sets.skipped}
    names = run_names(models)
    rows: list[Row] = []
    result: dict[str, Any] = {
        "run": run.described(names[0]),
        "control": control.described(names[1]) if control else None,
        "rows": rows,
        "reliability": {},
        "images": images,
    }
    for name, model in zip(names, models):
        own = sets if model.settings.view == run.settings.view else Sets.of(sampling, model, train, test)
        measured, test_outputs = uncertainty(model, own, sampling)
        points: list[Point] = [("uncertainty", score, None, m) for score, m in measured["scores"].items()]
        for probe, metrics in measured["probes"].items():
            result["reliability"].setdefault(name, {})[probe] = metrics.pop("bins")
            points.append(("probe", probe, None, metrics))
        work.update()
        points += regression(model, own, sampling)
        work.update()
        rows += rows_of_points(name, model.settings.seed, points)
        if model is run:
            result["bits"], used, shown = bits(own, test_outputs, class_names(train))
            write_pictures(written.file_beside(), own, run, sampling, used, shown)
        work.update()
    result = written.write(result)
    work.update()
    work.close()
    return result


# Bits -----------------------------------------------------------------------------------------------------


def bits(
    sets: Sets, test: NetworkOutputs, names: list[str]
) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Return the analysis of single bits against the classes; the test images that `write_pictures` shows of
    the most informative ones; and what is told of these."""
    labels, classes = sets.test_labels, np.unique(sets.test_labels)
    values = test.mean if test.mean.shape == test.bits.shape else test.bits
    information = mutual_information(test.bits, labels)
    detects = class_auroc(values, labels)
    order = np.argsort(-information, kind="stable")
    by_class = np.argsort(labels, kind="stable")
    fitted, judged = by_class[::2], by_class[1::2]  # half of every class, however the set is sorted
    few = sparse_probe(test.bits[fitted], labels[fitted], test.bits[judged], labels[judged])
    shown = order[:SHOWN_BITS]
    queries = evenly_spaced(len(labels), min(200, len(labels) // 4))
    others = np.setdiff1d(np.arange(len(labels)), queries)
    flips = flip_bits(
        test.bits[queries], labels[queries], test.bits[others], labels[others], shown[:16].tolist()
    )
    best = np.nanargmax(abs(detects - 0.5), axis=1)
    table = [
        {
            "bit": int(d),
            "on": float(test.bits[:, d].mean()),
            "information_bits": float(information[d]),
            "class": names[classes[best[d]]],
            "auroc": float(detects[d, best[d]]),
        }
        for d in order
    ]
    summary = {
        "table": table,
        "information_bits": {"mean": float(information.mean()), "best": float(information[order[0]])},
        "flips": {
            name: dict(zip(map(str, shown.tolist()), map(float, v))) for name, v in flips._asdict().items()
        },
        "few": {names[label]: probe._asdict() for label, probe in few.items()},
    }
    ranking = np.argsort(values[:, shown], axis=0, kind="stable").T
    off, on = ranking[:, :SHOWN_IMAGES], ranking[:, ::-1][:, :SHOWN_IMAGES]
    used = np.unique(np.concatenate([off.ravel(), on.ravel()]))
    places = {"on": np.searchsorted(used, on), "off": np.searchsorted(used, off)}
    return summary, used, {"labels": labels[used], "class_names": np.array(names), "bits": shown} | places


def write_pictures(
    path: Path, sets: Sets, run: Run, sampling: Sampling, used: np.ndarray, shown: dict[str, Any]
) -> None:
    """Write bits.npz: for each bit, the test images where it is most confidently on, and off, as people are
    shown images (`picture_view`)."""
    source, rows = sets.sources[1], sets.test_rows[used]
    view = picture_view(run.settings.view, sides_of(source, rows))
    crops = evaluation_crops(source, view, rows, Replacements(source, run.on_error(sampling.on_error)))
    with written_aside(path) as file:
        np.savez_compressed(file, images=crops, **shown)


# Known factors --------------------------------------------------------------------------------------------


def regression(run: Run, sets: Sets, sampling: Sampling) -> list[Point]:
    """Return R^2 and MAE of ridge regression from features and code to the augmentation parameters and to the
    factors of the shapes. Each metric is named after its target: "shapes_r2: hue"."""
    points: list[Point] = []
    for kind, (train, test) in known_factors(run, sets, sampling).items():
        known = representations(test[0])
        for name, x in representations(train[0]).items():
            found = ridge_each(x, train[1], known[name], test[1])
            metrics = {f"{kind}_{m}: {t}": v for t, each in found.items() for m, v in each._asdict().items()}
            points.append((name, "", None, metrics))
    return points


# Printing -------------------------------------------------------------------------------------------------


def print_analysis(result: dict[str, Any]) -> None:
    """Print the uncertainty scores of all models; the page shows the rest."""
    print(f"{'run':12}{'score':12}{'R-AUROC':>9}{'R@1':>7}{'AURC':>7}{'OOD (mean)':>12}")
    for row in by_point(result["rows"], representation="uncertainty"):
        ood = np.mean([as_number(value) for key, value in row.items() if key.startswith(FOREIGN)])
        area, recall, aurc = (as_number(row.get(key)) for key in ("r_auroc", "recall_at_1", "aurc"))
        print(f"{row['run'][:11]:12}{row['method']:12}{area:9.3f}{recall:7.3f}{aurc:7.3f}{ood:12.3f}")
