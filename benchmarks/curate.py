"""Does `lvssl curate` find planted duplicates, and how long does it take for a million embeddings?

    python -m benchmarks.curate RUN ... --images TRAIN --seeds 0 1 --json FILE
    python -m benchmarks.curate --count 1000000 --width 256 --json FILE

Planted: of 5,000 images, drawn by the seed, 100 are repeated at JPEG quality 50, 100 mirrored and at quality
50, and 100 cropped (80 to 95 % of each side, anywhere), enlarged again and at quality 50. Recall and
precision are for the first two kinds; crops that are found count as neither right nor wrong, and the set's
own duplicates as wrong. `confirmed`: as the command does by default. `features`, and `pixels` (grey 16 x 16,
standardised and averaged with the mirror image), use cosine alone, at the default threshold and at the best
one in hindsight.

Synthetic embeddings have 1,000 classes in RANK dimensions; a hundredth of them are repeated with noise.
Seconds are wall-clock time, `processor_seconds` the sum over all threads; memory is the process's peak.
"""

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.script import new_file, parser_of, save
from lvssl.commands.main import guarded
from lvssl.evaluation.curate import curate
from lvssl.evaluation.embedding import shrink
from lvssl.evaluation.encoder import image_set
from lvssl.runs.run import load_run, versions
from lvssl.settings.apply import CurateSettings
from pipelines.cores import cores
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import evaluation_crops

IMAGES, EACH, RANK, CLASSES = 5000, 100, 32, 1000
KINDS = ("re-encoded", "mirrored", "cropped")
Pair = tuple[str, str]


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--images", type=Path, help="that copies are planted among")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=0, help="made embeddings instead")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)
    if bool(options.count) == bool(options.runs and options.images):
        raise InputError("name runs and --images, or --count")
    with tempfile.TemporaryDirectory() as folder:
        if options.count:
            rows = [made(Path(folder), options.count, options.width)]
        else:
            rows = [
                row
                for seed in options.seeds
                for row in measured(options.runs, options.images, seed, Path(folder) / str(seed))
            ]
    save(options.json, "curate", arguments, {"cores": cores(), "versions": versions(), "rows": rows})


def plant(images: np.ndarray, labels: np.ndarray, folder: Path, seed: int) -> dict[Pair, str]:
    """Write uint8 [N, R, R, 3] as class folders of PNG files and the copies as JPEG; returns pair -> kind."""
    random, truth = np.random.default_rng(seed), {}
    names = [f"{label}/{i:05d}" for i, label in enumerate(labels.tolist())]
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.png")
    chosen = random.permutation(len(images))[: EACH * len(KINDS)].reshape(len(KINDS), EACH)
    for kind, some in zip(KINDS, chosen):
        for i in some.tolist():
            image = images[i][:, ::-1] if kind == "mirrored" else images[i]
            side = image.shape[0]
            copy = Image.fromarray(np.ascontiguousarray(image))
            if kind == "cropped":
                new = round(side * random.uniform(0.8, 0.95))
                x, y = random.integers(0, side - new + 1, 2).tolist()
                copy = copy.crop((x, y, x + new, y + new)).resize((side, side), Image.Resampling.BICUBIC)
            copy.save(folder / f"{names[i]}-copy.jpg", quality=50)
            truth[f"{names[i]}-copy.jpg", f"{names[i]}.png"] = kind
    return truth


def measured(runs: list[Path], images: Path, seed: int, folder: Path) -> list[dict[str, Any]]:
    view = load_run(runs[0], torch.device("cpu")).settings.view
    source = open_reader(images)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:IMAGES])
    truth = plant(evaluation_crops(source, view, chosen), source.labels[chosen], folder / "set", seed)
    rows = []
    for run in runs:
        settings = CurateSettings(run, folder / "set", out=folder / run.name, subset=0, top_n=0)
        about = {"run": run.name, "images": str(images.name), "seed": seed}
        rows.append(about | {"by": "confirmed"} | figures(duplicates(settings), truth))
        by_features = duplicates(replace(settings, pixels=0, cosine=0.5))
        rows += [about | {"by": "features"} | each for each in alone(by_features, truth)]
    whole, names = image_set(folder / "set")
    pixels = torch.from_numpy(evaluation_crops(whole, view, np.arange(len(whole)))).float().mean(dim=3)
    small = shrink(pixels[:, None], 16).flatten(1, 2)
    np.save(folder / "train.npy", ((small + small.flip(2)) / 2).flatten(1).numpy())
    given = CurateSettings(folder / "train.npy", out=folder / "pixels", cosine=0.5, subset=0, top_n=0)
    pairs = duplicates(given)
    for pair in pairs:
        for name in ("name", "other_name"):
            pair[name] = names[int(pair[name])]
    about = {"run": "", "images": str(images.name), "seed": seed}
    rows += [about | {"by": "pixels"} | each for each in alone(pairs, truth)]
    for row in rows:
        print(row, flush=True)
    return rows


def duplicates(settings: CurateSettings) -> list[dict[str, Any]]:
    """The pairs in duplicates.csv, by column."""
    head, lines, _ = curate(settings).tables["duplicates"]
    return [dict(zip(head, line)) for line in lines]


def figures(pairs: list[dict[str, Any]], truth: dict[Pair, str], least: float = 0.0) -> dict[str, Any]:
    """Recall and precision of the pairs above a cosine, and the share found of each kind."""
    chosen = [pair for pair in pairs if pair["cosine"] >= least]
    kinds = [
        truth.get((min(pair["name"], pair["other_name"]), max(pair["name"], pair["other_name"])))
        for pair in chosen
    ]
    shares = {kind: kinds.count(kind) / EACH for kind in KINDS}
    right = kinds.count("re-encoded") + kinds.count("mirrored")
    wrong = kinds.count(None)
    scores = {"recall": right / (2 * EACH), "precision": right / max(right + wrong, 1)}
    return {name: round(value, 3) for name, value in (scores | shares).items()}


def alone(pairs: list[dict[str, Any]], truth: dict[Pair, str]) -> list[dict[str, Any]]:
    """The figures at the default threshold, and where the smaller of recall and precision is largest."""
    tried = [
        {"cosine": least} | figures(pairs, truth, least)
        for least in np.arange(0.5, 1, 0.002).round(3).tolist()
    ]
    best = max(tried, key=lambda one: min(one["recall"], one["precision"]))
    return [next(one for one in tried if one["cosine"] == 0.98), best | {"hindsight": True}]


def made(folder: Path, count: int, width: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLASSES, RANK), np.float32)
    mixing = random.standard_normal((RANK, width), np.float32)
    labels = np.arange(count) * CLASSES // count
    features = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float16, (count, width))
    for start in range(0, count, 50_000):
        part = slice(start, min(start + 50_000, count))
        place = centres[labels[part]] + random.standard_normal((part.stop - start, RANK), np.float32)
        features[part] = place @ mixing + random.standard_normal((part.stop - start, width), np.float32)
    twice = random.permutation(count)[: 2 * (count // 100)].reshape(-1, 2)
    noise = 0.3 * random.standard_normal((len(twice), width), np.float32)
    features[twice[:, 1]] = features[twice[:, 0]] + noise.astype(np.float16)
    np.save(folder / "train-labels.npy", labels)
    features.flush()
    began = time.perf_counter(), time.process_time()
    pairs = curate(CurateSettings(folder / "train.npy", out=folder / "out")).tables["duplicates"][1]
    seconds, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    found = {tuple(sorted((int(line[1]), int(line[4])))) for line in pairs}
    truth = {tuple(sorted(pair)) for pair in twice.tolist()}
    row: dict[str, Any] = {"embeddings": count, "width": width, "seconds": round(seconds, 1)}
    row |= {"processor_seconds": round(processor, 1)}
    row |= {"peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)}
    row |= {"recall": round(len(found & truth) / len(truth), 4), "pairs": len(pairs)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    import sys

    sys.exit(guarded(main, sys.argv[1:]))
