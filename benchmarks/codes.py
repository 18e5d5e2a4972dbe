"""Which code for which budget? Measures every quantiser at every length, on a run's real features.

    python -m benchmarks.codes RUN ... --test TEST --json FILE     quality, on the runs' own training images
    python -m benchmarks.codes --count 1000000 --json FILE         time and memory with synthetic codes
    python -m benchmarks.codes --embeddings 1000000 --json FILE    `encode` on synthetic embeddings, killed

Quality compares 2,000 test images with --limit training images, on which the quantisers are also fitted; both
are evenly spaced over their sets. It reports the accuracy of a vote of the 20 nearest neighbours, mAP@1000,
the share of the 10 nearest by standardised features (`features`, unquantised) that are among a code's 10
nearest, and the accuracy of a linear probe on the dequantised codes. `real`: real-valued queries; `code`:
quantised queries (Hamming distance for bits). Rows of equal distance are in the order of the training images.

Embeddings are 256 fp16 numbers, coded to 64 bits (OPQ) by the command in its own processes: once undisturbed;
and once killed by SIGKILL when half of the codes are on disk, then resumed. The benchmark fails unless both
give the same bytes. MiB is the peak of anonymous memory (`benchmarks.scale`).

Runs that differ only in their seed have the same folder name up to its end, -sSEED; `arms` has their means:
for each length, the loss of each code against the features with real-valued queries, and the smallest length
of OPQ that reaches the kNN accuracy, and the recall, of the run's own whole code.
"""

import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.scale import measured as measured_process
from benchmarks.script import new_file, parser_of, save
from lvssl.codes.controls import standardised
from lvssl.codes.index import Index, nearest_rows
from lvssl.codes.quantiser import FITS, Quantiser
from lvssl.commands.main import guarded
from lvssl.evaluation.density import fit_density
from lvssl.evaluation.fitted import SAMPLE, TrainingImages
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.quantisers import own_bits
from lvssl.runs.run import load_run, versions
from pipelines.cores import cores
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import open_reader
from pipelines.errors import InputError

QUERIES, VOTE, TOP = 2000, 20, 1000
METRICS = ("knn", "map", "probe", "recall_at_10")
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    parser.add_argument("--count", type=int, default=0, help="made codes instead")
    parser.add_argument("--embeddings", type=int, default=0, help="made embeddings instead")
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.count, options.embeddings, options.runs and options.test))) != 1:
        raise InputError("name runs and --test, or --count, or --embeddings")
    if options.limit <= TOP:
        raise InputError(f"--limit must be above {TOP:,}, the ranks of mAP@{TOP:,}")
    found: dict[str, Any] = {}
    if options.count:
        found["rows"] = made(options.count)
    elif options.embeddings:
        with tempfile.TemporaryDirectory() as folder:
            found["rows"] = encoded(Path(folder), options.embeddings)
    else:
        found["rows"] = [row for run in options.runs for row in measured(run, options.test, options.limit)]
        found["arms"] = arms(found["rows"])
    save(options.json, "codes", arguments, {"cores": cores(), "versions": versions()} | found)


def measured(folder: Path, test: Path, limit: int) -> list[dict[str, Any]]:
    run = load_run(folder, torch.device("cpu"))
    kinds = ("features", "locations")
    images = TrainingImages(run, limit=limit)
    train = {kind: images.sample(kind) for kind in kinds}
    source = open_reader(run.settings.data)
    labels = source.labels[evenly_spaced(len(source), limit)]
    images = TrainingImages(run, test, limit=QUERIES)
    queries = {kind: images.sample(kind) for kind in kinds}
    tests = open_reader(test)
    answers = tests.labels[evenly_spaced(len(tests), len(queries["features"]))]
    x, mean, scale = standardised(train["features"])
    asked = (queries["features"] - mean) / scale
    exact = floats(x, asked)
    print(folder.name, flush=True)
    rows = [figures("features", 32 * x.shape[1], "", exact, exact, (labels, answers))]
    rows[0]["probe"] = probe(x, asked, labels, answers)
    for code, fit in FITS.items():
        kind = "locations" if code == "bits" else "features"
        most = own_bits(run) if code == "bits" else x.shape[1] * (8 if code == "opq" else 1)
        for bits in sorted({*LENGTHS, most} if code == "bits" else LENGTHS):
            if bits > most:
                continue
            quantiser = fit(train[kind], bits)
            codes, coded = quantiser.encode(train[kind]), quantiser.encode(queries[kind])
            share = probe(quantiser.decode(codes), quantiser.decode(coded), labels, answers)
            for way, some in (("real", queries[kind]), ("code", coded)):
                found, _ = nearest_rows(some, codes, TOP, quantiser)
                rows.append(figures(code, bits, way, found, exact, (labels, answers)) | {"probe": share})
                print(" ".join(f"{value!s:>9}" for value in rows[-1].values()), flush=True)
    return [{"run": folder.name, "own_bits": own_bits(run)} | row for row in rows]


def probe(train: np.ndarray, test: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> float:
    return round(linear_probe(train, labels, test, answers).accuracy, 2)


def floats(train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The TOP nearest rows by Euclidean distance, int64 [Q, TOP]."""
    own, found = np.square(train).sum(axis=1), []
    for part in np.array_split(queries, max(1, len(queries) // 100)):
        distances = own - 2 * part @ train.T
        near = np.argpartition(distances, TOP, axis=1)[:, :TOP]
        order = np.take_along_axis(distances, near, axis=1).argsort(axis=1)
        found.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(found)


def figures(
    code: str,
    bits: int,
    way: str,
    found: np.ndarray,
    exact: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    near, answers = labels[0][found], labels[1]
    votes = np.stack([(near[:, :VOTE] == label).sum(axis=1) for label in range(near.max() + 1)], axis=1)
    hits = near == answers[:, None]
    precision = hits.cumsum(axis=1) / np.arange(1, TOP + 1)
    average = (precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found[:, :10], exact[:, :10])])
    return {
        "code": code,
        "bits": bits,
        "queries": way,
        "knn": round(100 * float((votes.argmax(axis=1) == answers).mean()), 2),
        "map": round(float(average.mean()), 4),
        "recall_at_10": round(float(recall), 3),
    }


def arms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each arm, as losses against its features, and the OPQ lengths that match."""
    found = []
    names = {row["run"]: re.sub(r"-s\d+$", "", row["run"]) for row in rows}
    for arm in dict.fromkeys(names.values()):
        mine = [row for row in rows if names[row["run"]] == arm and row["queries"] != "code"]
        means: dict[tuple[str, int], dict[str, float]] = {}
        for key in dict.fromkeys((row["code"], row["bits"]) for row in mine):
            some = [row for row in mine if (row["code"], row["bits"]) == key]
            means[key] = {name: float(np.mean([row[name] for row in some])) for name in METRICS}
        floats_of = next(values for (code, _), values in means.items() if code == "features")
        own = means["bits", mine[0]["own_bits"]]
        matching = {
            name: min(
                (b for (code, b), v in means.items() if code == "opq" and v[name] >= own[name]), default=None
            )
            for name in ("knn", "recall_at_10")
        }
        losses: list[dict[str, Any]] = [
            {"code": code, "bits": bits} | {n: round(floats_of[n] - v, 4) for n, v in values.items()}
            for (code, bits), values in means.items()
            if code != "features"
        ]
        seeds = len({row["run"] for row in mine})
        about = {"arm": arm, "seeds": seeds, "own_bits": mine[0]["own_bits"], "opq_matching_own": matching}
        found.append(about | {"features": floats_of, "losses": sorted(losses, key=lambda one: one["bits"])})
    return found


def made(count: int) -> list[dict[str, Any]]:
    """Seconds and peak MiB so far with `count` synthetic codes; queries in batches of 100, 10 neighbours."""
    generator, rows = np.random.default_rng(0), []
    width, queries = 256, 100
    sample = generator.standard_normal((SAMPLE, width), np.float32)
    began = time.perf_counter()
    density = fit_density(sample)
    rows.append(timing("density: fitted on 50,000 of 256 numbers", began))
    began = time.perf_counter()
    for _ in range(count // SAMPLE):
        density(sample)
    rows.append(timing(f"density: {count // SAMPLE * SAMPLE:,} images scored", began))
    for bits, words in ((64, 256), (256, 256), (256, 2), (2048, 2)):
        parts = bits // 8 if words == 256 else bits
        per_part = width // parts if words == 256 else 1
        book = generator.standard_normal((parts, words, per_part), np.float32)
        numbers = parts * per_part
        quantiser = Quantiser(
            np.zeros(numbers, np.float32),
            np.ones(numbers, np.float32),
            np.eye(numbers, dtype=np.float32) if words == 256 else np.empty((numbers, 0), np.float32),
            book,
        )
        codes = generator.integers(0, 256, (count, bits // 8), dtype=np.uint8)
        asked = generator.standard_normal((queries, numbers), np.float32)
        nearest_rows(asked[:1], codes[:1000], 10, quantiser)  # compiles
        name = f"{bits} bits, {'product' if words == 256 else 'binary'} code"
        began = time.perf_counter()
        nearest_rows(asked, codes, 10, quantiser)
        rows.append(timing(f"{name}: {queries} real-valued queries", began))
        if words == 2:
            began = time.perf_counter()
            nearest_rows(codes[:queries], codes, 10)
            rows.append(timing(f"{name}: {queries} queries by Hamming distance", began))
        if bits == 64:
            index = Index(codes, range(count), quantiser)
            began = time.perf_counter()
            index.delete(range(0, count, 100))
            rows.append(timing(f"{name}: {len(range(0, count, 100)):,} deleted", began))
    return rows


def encoded(folder: Path, count: int, width: int = 256) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((32, width), np.float32)
    features = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float16, (count, width))
    for start in range(0, count, SAMPLE):
        part = features[start : start + SAMPLE]
        noise = random.standard_normal(part.shape, np.float32)
        part[:] = random.standard_normal((len(part), 32), np.float32) @ mixing + noise
    features.flush()
    command = [sys.executable, "-m", "lvssl", "encode", str(folder / "train.npy"), "--images"]
    command += [str(folder / "train.npy"), "--bits", "64", "--code", "opq", "--out"]
    parts, rows = folder / ".killed.lvcodes.part", []

    def half() -> bool:
        return parts.exists() and parts.stat().st_size > 4 * count

    for name, out, stop in (
        ("quantiser and density fitted, encoded", "whole", None),
        ("encoded", "again", None),
        ("encoded, killed at half", "killed", half),
        ("resumed", "killed", None),
    ):
        asked = [*command, str(folder / f"{out}.lvcodes")]
        found = measured_process(name, asked, folder / "log", stop, signal.SIGKILL)
        rows.append({"what": f"{count:,} x {width}: {name}", **found})
        print(rows[-1], flush=True)
    for end in ("", ".uncertainty"):
        ways = {(folder / f"{out}.lvcodes{end}").read_bytes() for out in ("whole", "again", "killed")}
        if len(ways) > 1:
            raise InputError(f"resumed codes differ: .lvcodes{end}")
    return rows


def timing(what: str, began: float) -> dict[str, Any]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row = {"what": what, "seconds": round(time.perf_counter() - began, 2), "peak_mib": round(memory)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
