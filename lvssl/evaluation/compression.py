"""Accuracy against stored bits: a run's code, beside equal-bit controls on deterministic features."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from lvssl.codes.controls import CONTROLS, Coder, LinearHash
from lvssl.codes.pack import pack_bits, unpack_bits
from lvssl.codes.statistics import compression_ratios
from lvssl.evaluation.embedding import Embedding
from lvssl.evaluation.evaluate import (
    EvaluateSettings,
    channels,
    embed_both,
    jpeg_bytes,
    labelled_pair,
    with_defaults,
)
from lvssl.evaluation.knn import hamming_knn, weighted_knn
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.retrieval import retrieval_map, similarity_map
from lvssl.latents import WITHOUT_LATENT
from lvssl.models.backbone import feature_dim
from lvssl.training.labels import sound_part
from lvssl.training.run import Run, load_run, versions
from pipelines.errors import InputError
from pipelines.files import write_atomically, write_json
from pipelines.sources import Source

COLUMNS = (
    "model", "family", "method", "bits", "compared_by", "linear", "knn", "map_over_hits", "map_over_relevant",
    "raw_pixels", "stored_jpeg", "fp32_feature",
)  # fmt: skip


@dataclass(frozen=True)
class CompressionSettings:
    """Accuracy against bits stored for each image: the run's code and its prefixes, beside sign, PCA + sign,
    ITQ, LSH, int8 and product codes of the control's features. Writes RUN/compression.json and .csv."""

    run: Positional[Path]
    """The run whose code is measured."""
    control: Path | None = None
    """The deterministic run of whose features the controls are made; left out: `control` beside the run."""
    others: tuple[Path, ...] = field(default=())
    """More runs on the same axes: other families, betas or lengths."""
    test: Path | None = None
    """The test images: the queries; left out: test.beton (or val) beside train.beton."""
    train: Path | None = None
    """Labelled training images: probes are fitted on them, and they are searched; left out: the run's."""
    bits: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    """Lengths at which the controls are made and codes cut off."""
    first: int = 1000
    """n of mAP@n."""
    seed: int = 0
    """Of the controls that draw: ITQ, LSH, PQ."""
    on_error: str | None = None
    """An image that can't be decoded: raise, or skip (leave it out); left out: as in the pretraining."""
    workers: int = 2
    """Threads that decode."""


class Point(NamedTuple):
    """One way to store the images at one length."""

    model: str
    family: str
    method: str
    bits: int
    codes: tuple[np.ndarray, np.ndarray] | None  # packed, of train and test, where Hamming distance compares
    vectors: tuple[np.ndarray, np.ndarray]  # of train and test, what a linear probe reads


def compression(settings: CompressionSettings) -> dict[str, Any]:
    """Measure, write RUN/compression.json and RUN/compression.csv, and return the former's content.

    Every row has the linear probe's and the kNN's accuracy in percent (of the 20 nearest, by Hamming distance
    for bits, by cosine for what is no bits), mAP@first of the test images among the training images under
    both denominators of `retrieval`, and how many times smaller than raw pixels, stored JPEG and fp32
    feature. Raises InputError: no such run or data, no deterministic control, an impossible setting.
    """
    if settings.first < 1 or not settings.bits or min(settings.bits) < 1:
        raise InputError("--first and --bits must be at least 1")
    run = load_run(settings.run)
    paths = with_defaults(
        EvaluateSettings(settings.run, settings.test, settings.control, settings.train), run
    )
    control = load_run(paths.control) if paths.control else run
    if control.network.family.stochastic:
        raise InputError(f"equal-bit controls need a run of family {WITHOUT_LATENT}: name it with --control")
    assert paths.test is not None
    on_error, train_path = run.on_error(settings.on_error), paths.train or run.settings.data
    train, test = labelled_pair(run, control, paths.train, paths.test)
    counts = len(train), len(test)
    rows, left_out = [], []
    runs = {run.folder: run} | {path: load_run(path) for path in settings.others} | {control.folder: control}
    bar = tqdm(desc="compression", unit="code", disable=None)
    for other in runs.values():
        sets = embed_both(other, train, test, settings.workers, on_error)
        train, test = sound_part(train_path, train, sets[0].rows), sound_part(paths.test, test, sets[1].rows)
        for point in points(settings, other, *sets, controls=other is control):
            if isinstance(point, str):
                left_out.append(point)
                continue
            rows.append(measured(settings, point, train, test) | ratios(other, point.bits, test))
            bar.update()
    bar.close()
    result = {
        "rows": rows,
        "left_out": left_out,
        "queries": len(test),
        "database": len(train),
        "skipped": {"train": counts[0] - len(train), "test": counts[1] - len(test)},
        "first": settings.first,
        "control": str(control.folder),
        "command": command(settings),
        "versions": versions(),
    }
    write_json(run.folder / "compression.json", result)
    write_atomically(run.folder / "compression.csv", as_csv(rows))
    return result


def points(
    settings: CompressionSettings, run: Run, train: Embedding, test: Embedding, controls: bool
) -> Iterator[Point | str]:
    """What is measured of a run: its features, its code and the code's prefixes, and the controls of its
    features; a line of reason in place of a control that there can't be."""
    name, family = run.folder.name, run.settings.latent.family
    features = train.features, test.features
    yield Point(name, family, "features", 32 * features[0].shape[1], None, features)
    if run.network.family.own_code:
        whole = unpack_bits(train.codes, train.bits), unpack_bits(test.codes, test.bits)
        for bits in sorted({b for b in settings.bits if b < train.bits} | {train.bits}):
            cut = whole[0][:, :bits], whole[1][:, :bits]
            codes = pack_bits(cut[0]), pack_bits(cut[1])
            method = "code" if bits == train.bits else "code, first bits"
            vectors = cut[0].astype(np.float32), cut[1].astype(np.float32)
            yield Point(name, family, method, bits, codes, vectors)
    for method, fit in CONTROLS.items() if controls else ():
        for bits in settings.bits:
            try:
                coder = fit(features[0], bits, settings.seed)
            except (ValueError, ImportError) as reason:
                yield f"{method}, {bits} bits: {reason}"
                continue
            yield control_point(name, family, method, coder, features)


def control_point(
    name: str, family: str, method: str, coder: Coder, features: tuple[np.ndarray, np.ndarray]
) -> Point:
    codes = coder.encode(features[0]), coder.encode(features[1])
    vectors = coder.decode(codes[0]), coder.decode(codes[1])
    if method == "sign" and isinstance(coder, LinearHash) and coder.directions is not None:
        method = "sign, first bits"
    return Point(name, family, method, coder.bits, codes if coder.hamming else None, vectors)


def measured(settings: CompressionSettings, point: Point, train: Source, test: Source) -> dict[str, Any]:
    labels = train.labels, test.labels
    probe = linear_probe(point.vectors[0], labels[0], point.vectors[1], labels[1])
    if point.codes is not None:
        knn = hamming_knn(point.codes[0], labels[0], point.codes[1], labels[1], point.bits)
        score = retrieval_map(point.codes[1], labels[1], point.codes[0], labels[0], settings.first)
    else:
        knn = weighted_knn(point.vectors[0], labels[0], point.vectors[1], labels[1])
        score = similarity_map(point.vectors[1], labels[1], point.vectors[0], labels[0], settings.first)
    return {
        "model": point.model,
        "family": point.family,
        "method": point.method,
        "bits": point.bits,
        "compared_by": "cosine" if point.codes is None else "Hamming",
        "linear": probe.accuracy,
        "knn": knn,
        "map_over_hits": score.over_hits,
        "map_over_relevant": score.over_relevant,
    }


def ratios(run: Run, bits: int, test: Source) -> dict[str, float]:
    return compression_ratios(
        bits,
        run.settings.view.resolution,
        channels(test),
        feature_dim=feature_dim(run.settings.model.backbone),
        jpeg_bytes=jpeg_bytes(test),
    )


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def command(settings: CompressionSettings) -> str:
    """The command that makes these rows."""
    parts = ["lvssl", "compression", str(settings.run)]
    for name in ("control", "test", "train", "on_error"):
        if getattr(settings, name):
            parts += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    if settings.others:
        parts += ["--others", *map(str, settings.others)]
    parts += ["--bits", *map(str, settings.bits)]
    parts += ["--first", str(settings.first), "--seed", str(settings.seed)]
    return shlex.join(parts)


def print_compression(result: dict[str, Any]) -> None:
    """The rows on a terminal, by bits."""
    head = f"mAP@{result['first']}, hits"
    print(f"{'model':16}{'method':18}{'bits':>7}{'linear %':>10}{'kNN %':>8}{head:>16}{'relevant':>10}")
    for row in sorted(result["rows"], key=lambda row: (row["bits"], -row["linear"])):
        print(
            f"{row['model'][:15]:16}{row['method']:18}{row['bits']:>7,}{row['linear']:>10.1f}{row['knn']:>8.1f}"
            f"{row['map_over_hits']:>16.3f}{row['map_over_relevant']:>10.3f}"
        )
    for reason in result["left_out"]:
        print(f"left out: {reason}")
