"""Measure the README's ten minutes: a folder of unlabelled files with planted copies, searched and curated.

    python -m benchmarks.photos walk PARQUET FOLDER    the three steps below; walk.json: seconds of each
    python -m benchmarks.photos make PARQUET FOLDER    FOLDER/photos and truth.json, from CIFAR-10 in JPEG
    cd FOLDER; the commands of README.md               writes FOLDER/run
    python -m benchmarks.photos measure FOLDER         compare with the labels and copies in truth.json

2,000 images, 200 per class, with meaningless names, and 150 copies: 50 re-encoded, 50 mirrored, 50 cropped by
2 or 3 of 32 pixels. precision@10 is the share of an original's ten nearest other originals that are of its
class: by `lvssl search`, by squared distances of raw pixels, and by the cosine of standardised ones. A copy
is found if duplicates.csv pairs it with its original.
"""

import io
import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from benchmarks.script import parser_of
from lvssl.commands.main import guarded
from lvssl.evaluation.codes import search
from lvssl.settings.apply import SearchSettings
from pipelines.errors import InputError
from pipelines.files import write_json

ROOT = Path(__file__).resolve().parents[1]
EACH, COPIES, SIDE, TOP = 200, 50, 32, 10


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    made, walked, measured = (parts.add_parser(name) for name in ("make", "walk", "measure"))
    for part in (made, walked):
        part.add_argument("parquet", type=Path)
    for part in (made, walked, measured):
        part.add_argument("folder", type=Path)
    walked.add_argument("--epochs", type=int, help="of the training, for a trial; left out: as lvssl chooses")
    options = parser.parse_args(arguments)
    if options.part != "measure":
        make(options.parquet, options.folder)
    if options.part == "walk":
        walk(options.folder, options.epochs)
    if options.part != "make":
        measure(options.folder, options.folder / "run")


def make(parquet: Path, folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists: choose another folder")
    rng, table = random.Random(0), pq.read_table(parquet)
    labels = np.array(table["label"])
    chosen = [i for c in range(10) for i in rng.sample(np.flatnonzero(labels == c).tolist(), EACH)]
    files = [(table["image"][i].as_py()["bytes"], int(labels[i]), -1, "original") for i in chosen]
    for n, of in enumerate(rng.sample(range(len(files)), 3 * COPIES)):
        kind = ("re-encoded", "mirrored", "cropped")[n % 3]
        files.append((copied(files[of][0], kind, rng), files[of][1], of, kind))
    places = list(range(len(files)))
    rng.shuffle(places)
    names = [f"IMG_{1000 + place}.jpg" for place in places]
    (folder / "photos").mkdir(parents=True)
    for name, (data, *_) in zip(names, files):
        (folder / "photos" / name).write_bytes(data)
    truth = {
        name: {"class": label, "of": names[of] if of >= 0 else None, "kind": kind}
        for name, (_, label, of, kind) in zip(names, files)
    }
    write_json(folder / "truth.json", truth)


def walk(folder: Path, epochs: int | None) -> None:
    """Run the README's commands in the folder, as its reader would, and record how long each took."""
    text = (ROOT / "README.md").read_text().partition("## Ten minutes with your own photos")[2]
    block = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0]
    commands = [line for line in block.splitlines() if line.startswith("lvssl ")]
    rows: list[dict[str, object]] = []
    for command in commands:
        typed = f"{command} --epochs {epochs}" if epochs and command.startswith("lvssl pretrain") else command
        before, start = os.times(), time.perf_counter()
        subprocess.run(["bash", "-c", typed], cwd=folder, check=True)
        after = os.times()
        processor = sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))
        rows.append(
            {"command": typed, "seconds": time.perf_counter() - start, "processor_seconds": processor}
        )
        print(f"{rows[-1]['seconds']:.0f} s, {processor:.0f} s of processors: {typed}", flush=True)
    wall, processors = (sum(float(str(row[n])) for row in rows) for n in ("seconds", "processor_seconds"))
    print(f"{wall:.0f} s, {processors:.0f} s of processors: all {len(rows)} commands")
    write_json(folder / "walk.json", rows)


def copied(data: bytes, kind: str, rng: random.Random) -> bytes:
    image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    if kind == "mirrored":
        image = ImageOps.mirror(image)
    if kind == "cropped":
        less = rng.choice([2, 3])
        left, top = rng.randint(0, less), rng.randint(0, less)
        part = image.crop((left, top, SIDE - less + left, SIDE - less + top))
        image = part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    image.save(buffer, "JPEG", quality=rng.randint(60, 85))
    return buffer.getvalue()


def measure(folder: Path, run: Path) -> None:
    truth = json.loads((folder / "truth.json").read_text())
    names = [name for name in sorted(truth) if truth[name]["of"] is None]
    place = {name: i for i, name in enumerate(names)}
    labels = np.array([truth[name]["class"] for name in names])
    pixels = np.stack([np.asarray(Image.open(folder / "photos" / n).convert("RGB")) for n in names])
    x = pixels.reshape(len(names), -1).astype(np.float64)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    squares = np.square(x).sum(axis=1)
    distances = {
        "raw pixels, squared distance": squares[:, None] + squares - 2 * x @ x.T,
        "standardised pixels, cosine": -z @ z.T / np.outer(*2 * [np.linalg.norm(z, axis=1)]),
    }
    ways = {}
    for way, far in distances.items():
        np.fill_diagonal(far, np.inf)
        ways[way] = np.argsort(far, axis=1, kind="stable")[:, :TOP]
    near = np.empty((len(names), TOP), np.int64)
    for query, found in search(SearchSettings(run, folder / "photos", k=TOP + 1 + 3 * COPIES)):
        if query.name in place:
            nearest = [place[n.name] for n in found if n.name in place and n.name != query.name]
            near[place[query.name]] = nearest[:TOP]
    ways["lvssl search"] = near
    for way, rows in ways.items():
        print(f"precision@{TOP}, {way}: {100 * (labels[rows] == labels[:, None]).mean():.1f} %")
    lines = (run / "curate/duplicates.csv").read_text().splitlines()[1:]
    pairs = {frozenset(line.split(",")[i] for i in (1, 4)) for line in lines}
    root = {name: one["of"] or name for name, one in truth.items()}
    for kind in ("re-encoded", "mirrored", "cropped"):
        copies = [name for name in truth if truth[name]["kind"] == kind]
        print(f"{kind}: {sum(frozenset((n, root[n])) in pairs for n in copies)} of {len(copies)} found")
    wrong = sum(len({root[name] for name in pair}) > 1 for pair in pairs)
    print(f"pairs of images that aren't copies of one: {wrong} of {len(pairs)}")


if __name__ == "__main__":
    import sys

    sys.exit(guarded(main, sys.argv[1:]))
