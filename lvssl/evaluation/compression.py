"""Accuracy against stored bits: a run's code next to equal-bit controls made from deterministic features."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lvssl.codes.controls import CONTROLS, Coder, LinearHash
from lvssl.evaluation.embedding import Embedding
from lvssl.evaluation.measures import accuracies
from lvssl.evaluation.quantisers import own_bits
from lvssl.evaluation.sets import a_sample, embed_both, labelled_pair, smaller_by, with_defaults
from lvssl.latents import WITHOUT_LATENT
from lvssl.models.inference import device_of
from lvssl.runs.labels import sound_part
from lvssl.runs.result import ResultFile, as_number
from lvssl.runs.rows import Row, as_csv, by_point, rows_of_points
from lvssl.runs.run import Run, load_run, run_names
from lvssl.settings.measure import CompressionSettings
from lvssl.settings.pretrain import at_least
from pipelines.errors import InputError
from pipelines.files import write_atomically
from pipelines.kernels.pack import pack_bits, unpack_bits

CSV = "compression.csv"


class LeftOut(NamedTuple):
    """A control that can't be made at one length."""

    method: str
    bits: int
    reason: str


class Point(NamedTuple):
    """One way of storing the images, at one length."""

    representation: str  # features or code
    method: str
    bits: int
    codes: tuple[np.ndarray, np.ndarray] | None  # packed, of train and test; None without Hamming distance
    vectors: tuple[np.ndarray, np.ndarray]  # of train and test, the input of the linear probe


def compression(settings: CompressionSettings) -> dict[str, Any]:
    """Measure a run, write compression.json and compression.csv to --out (or the run's folder), and return
    the content of compression.json. A result that exists is not measured again.

    The rows (`lvssl.runs.rows`) hold the accuracy of the linear probe and of kNN in percent (20 neighbours,
    by Hamming distance for bits, otherwise by cosine), mAP@top_n of the test images among the training images
    under both denominators of `retrieval`, and the compression relative to raw pixels, stored JPEGs and fp32
    features. Raises InputError: no such run or data, no deterministic control, an impossible setting, or a
    result for other settings exists there.
    """
    if settings.top_n < 1 or not settings.bits or min(settings.bits) < 1:
        raise InputError("--top-n and --bits must be at least 1")
    at_least(settings, max_images=0, seed=0)
    run = load_run(settings.run)
    settings = with_defaults(settings, run)
    assert settings.test is not None and settings.on_error is not None
    control = load_run(settings.control) if settings.control else run
    if control.network.family.stochastic:
        raise InputError(f"equal-bit controls need a run of family {WITHOUT_LATENT}: pass it with --control")
    runs = {run.folder: run} | {path: load_run(path) for path in settings.others} | {control.folder: control}
    result = ResultFile.of_run("compression", "compression.json", settings, list(runs.values()), CSV)
    if (done := result.found()) is not None:
        return done
    on_error, train_path = settings.on_error, settings.train or run.settings.data
    whole = labelled_pair(run, control, settings.train, settings.test)
    train, test = a_sample(*whole, settings.max_images)
    counts = len(train), len(test)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    total = sum(1 + len(own_lengths(settings, other)) for other in runs.values())
    total += len(CONTROLS) * len(settings.bits)
    print(
        f"compression {run.folder.name}: up to {total} codes of {counts[0]:,} training and {counts[1]:,} "
        "test images, each measured by a linear probe, kNN and mAP, which can take minutes",
        file=sys.stderr,
        flush=True,
    )
    bar = tqdm(total=total, desc="compression", unit="code", disable=None)
    names = run_names(list(runs.values()))
    for name, other in zip(names, runs.values()):
        sets = embed_both(other, train, test, settings.workers, on_error)
        train = sound_part(train_path, train, sets[0].rows)
        test = sound_part(settings.test, test, sets[1].rows)
        smaller, labels = smaller_by(other, test, on_error), (train.labels, test.labels)
        for point in points(settings, other, *sets, controls=other is control):
            if isinstance(point, LeftOut):
                left_out.append(point)
                bar.update()
                continue
            figures = accuracies(*point[3:], labels, point.bits, settings.top_n, device_of(other.network))
            measured = (*point[:3], figures | smaller(point.bits))
            rows += rows_of_points(name, other.settings.seed, [measured])
            bar.update()
    bar.close()
    content = {
        "families": {name: other.settings.latent.family for name, other in zip(names, runs.values())},
        "rows": rows,
        "left_out": by_reason(left_out),
        "queries": len(test),
        "database": len(train),
        "of": {"train": len(whole[0]), "test": len(whole[1])},
        "skipped": {"train": counts[0] - len(train), "test": counts[1] - len(test)},
        "top_n": settings.top_n,
        "control": str(control.folder),
    }
    write_atomically(result.file_beside(), as_csv(rows).encode())
    return result.write(content)


def points(
    settings: CompressionSettings, run: Run, train: Embedding, test: Embedding, controls: bool
) -> Iterator[Point | LeftOut]:
    """Yield what is measured of a run: its features, its code, the code's prefixes, and the controls made
    from its features."""
    features = train.features, test.features
    yield Point("features", "", 32 * features[0].shape[1], None, features)
    if lengths := own_lengths(settings, run):
        whole = unpack_bits(train.codes, train.bits), unpack_bits(test.codes, test.bits)
        for bits in lengths:
            cut = whole[0][:, :bits], whole[1][:, :bits]
            codes = pack_bits(cut[0]), pack_bits(cut[1])
            method = "code" if bits == train.bits else "code, first bits"
            vectors = cut[0].astype(np.float32), cut[1].astype(np.float32)
            yield Point("code", method, bits, codes, vectors)
    for method, fit in CONTROLS.items() if controls else ():
        for bits in settings.bits:
            try:
                coder = fit(features[0], bits, settings.seed)
            except (ValueError, ImportError) as reason:
                missing = "needs faiss: pip install 'lvssl[faiss]'"
                yield LeftOut(method, bits, missing if isinstance(reason, ImportError) else str(reason))
                continue
            yield control_point(method, coder, features)


def own_lengths(settings: CompressionSettings, run: Run) -> list[int]:
    """Return the lengths at which the run's own code is measured, the whole one last; none without one."""
    if not run.network.family.own_code:
        return []
    whole = own_bits(run)
    return [*sorted({bits for bits in settings.bits if bits < whole}), whole]


def by_reason(left_out: list[LeftOut]) -> list[str]:
    """Return a line for each method and reason, with all lengths that it concerns."""
    lengths: dict[tuple[str, str], list[str]] = {}
    for method, bits, reason in left_out:
        lengths.setdefault((method, reason), []).append(str(bits))
    return [f"{method} of {', '.join(bits)} bits: {reason}" for (method, reason), bits in lengths.items()]


def control_point(method: str, coder: Coder, features: tuple[np.ndarray, np.ndarray]) -> Point:
    codes = coder.encode(features[0]), coder.encode(features[1])
    vectors = coder.decode(codes[0]), coder.decode(codes[1])
    if method == "sign" and isinstance(coder, LinearHash) and coder.directions is not None:
        method = "sign, first bits"
    return Point("code", method, coder.bits, codes if coder.hamming else None, vectors)


def print_compression(result: dict[str, Any]) -> None:
    """Print the rows, sorted by bits."""
    head = f"mAP@{result['top_n']}, hits"
    print(f"{'run':16}{'method':18}{'bits':>7}{'linear %':>10}{'kNN %':>8}{head:>16}{'relevant':>10}")
    for row in sorted(
        by_point(result["rows"]), key=lambda row: (row["bits"] or 0, -as_number(row.get("linear")))
    ):
        found = [as_number(row.get(n)) for n in ("linear", "knn", "map_over_hits", "map_over_relevant")]
        start = f"{row['run'][:15]:16}{row['method'] or 'features':18}{row['bits'] or 0:>7,}"
        print(start + "{:>10.1f}{:>8.1f}{:>16.3f}{:>10.3f}".format(*found))
    if (of := (result.get("of") or {}).get("train", 0)) > result["database"]:
        print(f"of {result['database']:,} of {of:,} training images and {result['queries']:,} test images")
    for reason in result["left_out"]:
        print(f"left out: {reason}")
