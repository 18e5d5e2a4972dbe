"""Does every command work at ImageNet's size? Runs them on a synthetic set of that size, in child processes.

    python -m benchmarks.scale --json docs/scale.json       1,281,167 training images: hours on two cores
    python -m benchmarks.scale --images 20000               everything in a few minutes
    python -m benchmarks.scale --scratch DIR                keeps DIR, where the same command resumes
    python -m benchmarks.scale --only convert verify --scratch DIR     repeats these rows
    python -m benchmarks.scale --images 100000 --kill       kill -9 in encode, linear, merge: the same bytes
    python -m benchmarks.scale --faiss                      kNN against faiss's IndexFlatIP, both exact

Images are 32 px JPEGs of 1,000 classes in parquet files, in the order of their classes, each with its own
comment, so that no two have the same bytes. Embeddings imitate those of a ResNet-50, 2,048 fp32 numbers per
image: a point of its class in 32 dimensions, mixed into 2,048, plus noise; they are read like any others, as
train.npy and test.npy. `pretrain` is stopped by SIGTERM after 10 steps, and `resume` after 10 more, both in
mid-epoch; the network is the smallest available, since only what grows with the number of images matters
here. Searches use 1,000 queries, and a probe of many images one epoch: these are rates, but memory is that of
all images.

Seconds are wall-clock and processor time of the whole process with its children. Memory is anonymous memory:
RssAnon of the process and all its children from /proc, sampled 20 times a second. Mapped files therefore
don't count, and a page shared by two processes counts twice. A row is within its bound below 4 GiB. If a row
fails or takes longer than --minutes, the reason replaces its figures, and the other rows still run.
It needs 10 GB for embeddings and 1.2 GB, up to four times, for images: 17 GB of disk.
"""

import argparse
import filecmp
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.script import in_turn, parser_of
from lvssl.commands.main import guarded
from lvssl.evaluation.embedding import LARGE_SET
from lvssl.evaluation.knn import nearest_by_cosine
from lvssl.runs.run import versions
from pipelines.cores import cores
from pipelines.decode.beton import BetonReader
from pipelines.errors import InputError
from pipelines.files import write_json
from pipelines.formats.beton import BetonWriter

IMAGES, TEST_IMAGES, CLASSES, WIDTH, RANK = 1_281_167, 50_000, 1000, 2048, 32
QUERIES = 1000  # of knn with embeddings
BOUND_MIB = 4096
IN_A_FILE, CHUNK = 50_000, 8192
PARTS = 1200  # betons in one set
STEPS = 10  # of pretraining before each interruption

# A user's own script, by name.
OPEN = "from pipelines.decode import open_reader; r = open_reader('{train}'); print(len(r), r.labels.max())"
# The same with the smallest usual limit of open files.
OPEN_PARTS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); " + OPEN
CHAIN = """name = "scale"
out = "chain"
[data]
train = "train.beton"
test = "queries.beton"
[pretrain]
preset = "digits"
[evaluate]
"""
WHOLE = """name = "whole"
out = "whole"
[convert.train]
source = "images/train"
shards = 2
[convert.test]
source = "images/test"
[pretrain]
preset = "digits"
epochs = 2
batch_size = 500
[evaluate]
[analyse]
[knn]
[linear]
probe = "streamed"
probe_epochs = 1
[finetune]
epochs = 1
min_steps = 100
lr = [0.05]
weight_decay = [0.0]
[finetune.sweep]
grid = { label_fraction = [0.1, 1.0] }
"""
LABELS = (
    "from pathlib import Path; from pipelines.formats.manifest import manifest_path, read_columns;"
    "print(len(read_columns(manifest_path(Path('{train}')), ('label', 'name'))[1]['label']))"
)


def rows_of(folder: Path, images: int) -> dict[str, list[str]]:
    """The command lines by row name, in an order in which each finds its inputs."""
    lvssl, convert, python = [
        [sys.executable, *words] for words in (["-m", "lvssl"], ["-m", "pipelines.convert.command"], ["-c"])
    ]
    train, test, merged, queries = (folder / f"{n}.beton" for n in ("train", "test", "merged", "queries"))
    run, control, chain = (folder / name for name in ("run", "control", "pipeline.toml"))
    pretrain = [*lvssl, "pretrain", "--preset", "digits", "--data", train, "--log-every", 1]
    pretrain += ["--batch-size", min(1024, images // 40)]
    asked, once = ["--test", queries], ["--probe-epochs", 1] if images >= LARGE_SET else []
    search = [*lvssl, "search", run, "--query", queries, "--csv"]
    rows: dict[str, list[Any]] = {
        "convert": [*convert, folder / "images" / "train", train],
        "convert test": [*convert, folder / "images" / "test", test],
        "convert queries": [*convert, folder / "images" / "test", queries, "--subset", QUERIES],
        "convert 1/2": [*convert, folder / "images" / "train", merged, "--shard", "1/2"],
        "convert 2/2": [*convert, folder / "images" / "train", merged, "--shard", "2/2"],
        "merge": [*convert, "--merge", merged],
        "verify": [*convert, "--verify", train],
        "inspect": [*convert, "--inspect", train],
        "open": [*python, OPEN.format(train=train)],
        "open parts": [*python, OPEN_PARTS.format(train=folder / "parts" / "*.beton")],
        "labels and names": [*python, LABELS.format(train=train)],
        "pretrain": [*pretrain, "--out", run],
        "resume": [*lvssl, "pretrain", "--out", run, "--resume"],
        "pretrain control": [*pretrain, "--family", "none", "--out", control],
        "launch --dry-run": [*lvssl, "launch", chain, "--dry-run"],
        "status": [*lvssl, "status", chain],
        "encode": [*lvssl, "encode", run, "--images", train],
        "search": [*search, folder / "search.csv"],
        "search --staged": [*search, folder / "staged.csv", "--staged"],
        "knn": [*lvssl, "knn", run, *asked],
        "linear --probe streamed": [*lvssl, "linear", run, "--probe", "streamed", *once, *asked],
        "evaluate": [*lvssl, "evaluate", run, *once, *asked],
        "analyse": [*lvssl, "analyse", run, *asked],
        "compression": [*lvssl, "compression", run, "--bits", 64],
        "report": [*lvssl, "report", run],
        "export": [*lvssl, "export", run, "--out", folder / "export"],
        "knn of embeddings": [*lvssl, "knn", folder / "embeddings", "--k", 20],
        "linear of embeddings": [*lvssl, "linear", folder / "embeddings", "--probe", "streamed", *once],
    }
    if images < LARGE_SET:  # otherwise it would take days
        rows["launch --cluster local"] = [*lvssl, "launch", folder / "whole.toml", "--cluster", "local"]
    return {name: [str(word) for word in words] for name, words in rows.items()}


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="of training; test images in proportion")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="these rows alone, again")
    parser.add_argument("--minutes", type=float, default=60, help="of a row at most")
    parser.add_argument("--kill", action="store_true", help="kill -9 and resume, and no more")
    parser.add_argument("--faiss", action="store_true", help="200,000 x 512, 2,000 queries, and no more")
    parser.add_argument(
        "--scratch", type=Path, help="keep images and runs there; left out: a temporary folder"
    )
    parser.add_argument(
        "--json", type=Path, help="where the table goes; rows that it has of other sizes stay"
    )
    parser.add_argument("--page", type=Path, help="write the table of --json into this page, and no more")
    options = parser.parse_args(arguments)
    if options.page:
        if options.json is None or not options.json.exists():
            raise InputError("--page needs --json, the file with the rows")
        return into_page(options.page, json.loads(options.json.read_text())["rows"])
    if options.images < CLASSES:
        raise InputError(f"--images must be at least {CLASSES:,}, one of each class")
    if options.faiss:
        return beside_faiss(options.json)
    folder = options.scratch or Path(tempfile.mkdtemp(prefix="lvssl-scale-"))
    try:
        if options.kill:
            return killed(folder, options.images, options)
        commands = rows_of(folder, options.images)
        if unknown := set(options.only) - set(commands):
            raise InputError(f"no row {', '.join(sorted(unknown))}; known: {', '.join(commands)}")
        rows = measured_rows(folder, commands, options)
    finally:
        if not options.scratch:
            shutil.rmtree(folder, ignore_errors=True)
    if wrong := [
        row["row"] for row in rows if not row["within"] or row.get("same bytes as convert") is False
    ]:
        raise MemoryError(f"failed, above {BOUND_MIB:,} MiB, or of other bytes: {', '.join(wrong)}")


def measured_rows(
    folder: Path, commands: dict[str, list[str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the rows, saving each to the folder and the table when done; existing rows aren't run again."""
    make_images(folder / "images", options.images)
    (folder / "pipeline.toml").write_text(CHAIN)
    (folder / "whole.toml").write_text(WHOLE)
    kept, rows = folder / "rows.json", []
    stand = json.loads(kept.read_text())["rows"] if kept.exists() else []
    there = {row["row"]: row for row in stand if "failed" not in row}
    for name in options.only or commands:
        if name in there and not options.only:
            rows.append(there[name])
            continue
        if "embeddings" in name:
            make_embeddings(folder / "embeddings", options.images)
        if "parts" in name:
            cut(folder / "train.beton", folder / "parts")
        words = " ".join(commands[name][1:]).replace(str(folder), "SCRATCH")
        row: dict[str, Any] = {"row": name, "images": options.images, "command": words}
        stop = stopper(folder / ("control" if "control" in name else "run"), name)
        try:
            row |= measured(name, commands[name], folder / "log", stop, minutes=options.minutes)
            row["within"] = row["mib"] <= BOUND_MIB
        except InputError as error:
            row |= {"failed": str(error), "within": False}
        if name == "report" and row["within"]:
            row["page_mb"] = round((folder / "run" / "report.html").stat().st_size / 1e6, 2)
        if name == "merge" and "failed" not in row:
            both = folder / "merged.beton", folder / "train.beton"
            row["same bytes as convert"] = filecmp.cmp(*both, shallow=False)
            for path in folder.glob("merged*"):
                path.unlink()
        rows.append(row)
        print(line_of(row), flush=True)
        for path in filter(None, (kept, options.json)):
            keep(path, [row])
    return rows


def line_of(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['row']:24}{row['images']:>12,}  {row['failed']}"
    taken = f"{row['seconds']:10.1f} s{row['processor_seconds']:10.1f} s of processors{row['mib']:8,} MiB"
    return f"{row['row']:24}{row['images']:>12,}{taken}"


def into_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table in place of the page's first one: a line per row, a pair of columns per size."""
    rows = [row for row in rows if "mib" in row or "failed" in row]  # only rows that belong in the table
    sizes = sorted({row["images"] for row in rows})
    cells = {(row["row"], row["images"]): cells_of(row) for row in rows}
    heads = [f"{what}, {size:,}" for size in sizes for what in ("seconds", "CPU seconds", "MiB")]
    lines = [["row", *heads], ["---", *["--:"] * len(heads)]]
    names = [*rows_of(Path(), CLASSES)]
    for name in sorted({row["row"] for row in rows}, key=names.index):
        lines.append([name, *(cell for size in sizes for cell in cells.get((name, size), [""] * 3))])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text = page.read_text()
    start = text.index("| row |")
    after = text[start:].partition("\n\n")[2]
    page.write_text(f"{text[:start]}{table}\n{after}")


def cells_of(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["failed"].splitlines()[0], "", ""]
    used = row.get("processor_seconds")
    return [f"{row['seconds']:,.1f}", "" if used is None else f"{used:,.1f}", f"{row['mib']:,}"]


def cut(whole: Path, folder: Path) -> None:
    """Split a beton's images over PARTS betons, as they are stored."""
    if (folder / f"{PARTS - 1:04d}.beton").exists():
        return
    folder.mkdir(exist_ok=True)
    source = BetonReader(whole)
    for part, rows in enumerate(np.array_split(np.arange(len(source)), PARTS)):
        with open(folder / f"{part:04d}.beton", "wb") as file:
            writer = BetonWriter(file, len(rows))
            for row in rows.tolist():
                size = int(source.heights[row]), int(source.widths[row])
                data = source.encoded(0, row)  # all are JPEGs
                assert isinstance(data, bytes)
                writer.add(int(source.file.modes[row]), *size, data, int(source.labels[row]))
            writer.finish()


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, keeping the file's rows of other names and sizes."""
    there = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(row["row"], row["images"]) for row in rows}
    rows = [row for row in there if (row["row"], row["images"]) not in new] + rows
    command = "python -m benchmarks.scale [--images 20000] [--kill] [--faiss]"
    write_json(path, {"command": command, "versions": versions(), "cores": cores(), "rows": rows})


# ------------------------------------------------------------------------------------- what is measured


def measured(
    name: str,
    command: list[str],
    log: Path,
    stop: Callable[[], bool] | None = None,
    by: signal.Signals = signal.SIGTERM,
    minutes: float = 60,
) -> dict[str, Any]:
    """Wall-clock and processor seconds of a command, and the peak of anonymous memory, in MiB, of it and its
    children together.

    `stop`: once it returns true, the command gets the signal `by`. Raises InputError, with the command's last
    output, if it fails or isn't done after the given minutes.
    """
    log.mkdir(exist_ok=True)
    said = log / f"{name.replace(' ', '-').replace('/', '-of-')}.txt"
    started, before, most, expected = time.monotonic(), processor_seconds(), 0, 0
    with (
        open(said, "wb") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            most = max(most, sum(anonymous(pid) for pid in family(process.pid)))
            if stop is not None and stop():
                process.send_signal(by)
                stop, expected = None, 143 if by == signal.SIGTERM else -by
            if time.monotonic() - started > 60 * minutes:
                process.kill()
                raise InputError(f"ended after {minutes:g} minutes; it had {most / 1024:,.0f} MiB by then")
            time.sleep(0.05)
    if process.returncode not in (0, expected):
        last = said.read_text(errors="replace")[-2000:]
        raise InputError(f"{name} ended with status {process.returncode}: {' '.join(command)}\n{last}")
    taken = time.monotonic() - started, processor_seconds() - before
    return {
        "seconds": round(taken[0], 2),
        "processor_seconds": round(taken[1], 2),
        "mib": round(most / 1024),
    } | ({"signal": by.name} if expected and process.returncode == expected else {})


def processor_seconds() -> float:
    """Processor time of all commands that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in KiB."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


def killed(folder: Path, images: int, options: argparse.Namespace) -> None:
    """Run merge, encode and linear undisturbed, and killed twice by SIGKILL and resumed; compare bytes."""
    make_images(folder / "images", images)
    commands, log = rows_of(folder, max(images, LARGE_SET)), folder / "log"  # a probe of one epoch
    for name in ("convert", "convert queries", "convert 1/2", "convert 2/2", "pretrain"):
        if not (folder / "run" / "checkpoints").is_dir():
            measured(name, commands[name], log, stopper(folder / "run", name))
    made = {
        "merge": ["merged.beton*"],
        "encode": ["run/codes.lvcodes*"],
        "linear --probe streamed": ["run/linear.json", "run/features/*/*.npy", "run/features/*/store.json"],
    }
    rows: list[dict[str, Any]] = []
    for name, patterns in made.items():
        if options.only and name not in options.only:
            continue
        for file in contents(folder, patterns):
            (folder / file).unlink()
        seconds, kills = measured(name, commands[name], log)["seconds"], 0
        whole = contents(folder, patterns)
        for file in whole:
            (folder / file).unlink()
        for share in (0.5, 0.7):
            due = partial(after, time.monotonic() + share * seconds)
            taken = measured(name, commands[name], log, due, signal.SIGKILL)
            kills += "signal" in taken
        measured(name, commands[name], log)
        row = {"row": f"{name}, killed", "images": images, "kills": kills}
        row |= {"files": len(whole), "same bytes": contents(folder, patterns) == whole}
        print(row, flush=True)
        rows.append(row)
        if options.json:
            keep(options.json, [row])
    if wrong := [row["row"] for row in rows if not row["same bytes"] or not row["kills"]]:
        raise MemoryError(f"of other bytes, or ended before the signal: {', '.join(wrong)}")


def after(moment: float) -> bool:
    return time.monotonic() > moment


def contents(folder: Path, patterns: list[str]) -> dict[str, str]:
    """Digests of files by name; of a result, without its time and memory."""
    found = {}
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        data = file.read_bytes()
        if file.name == "linear.json":
            result = json.loads(data)
            data = repr([result[key] for key in result if key not in ("seconds", "peak_memory_mib")]).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def stopper(run: Path, name: str) -> Callable[[], bool] | None:
    """For a pretraining: a function that tells whether it has done its steps."""
    if name not in ("pretrain", "resume", "pretrain control"):
        return None
    steps = 2 * STEPS if name == "resume" else STEPS

    def stop() -> bool:
        with suppress(OSError):
            return (run / "metrics.jsonl").read_bytes().count(b"\n") >= steps
        return False

    return stop


def beside_faiss(path: Path | None, count: int = 200_000, width: int = 512, k: int = 20) -> None:
    """Exact cosine neighbours of 2,000 queries, alternating, each with as many threads as there are cores."""
    import faiss

    torch.set_num_threads(cores())
    faiss.omp_set_num_threads(cores())
    generator = np.random.default_rng(0)
    train = generator.standard_normal((count, width), np.float32)
    test = generator.standard_normal((2000, width), np.float32)
    for x in (train, test):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(width)
    index.add(train)
    forms: dict[str, Callable[[], Any]] = {
        "lvssl": lambda: nearest_by_cosine(train, test, k)[1].numpy(),
        "faiss IndexFlatIP": lambda: index.search(test, k)[1],
    }
    nearest_by_cosine(train[:CHUNK], test[:1], k)  # compiles
    times, found = in_turn(forms, 5)
    made = []
    for name, taken in times.items():
        wall, processor = np.median(taken, axis=0).round(3).tolist()
        made.append(
            {"row": f"kNN by {name}", "images": count, "seconds": wall, "processor_seconds": processor}
        )
        print(f"{made[-1]['row']:24}{wall:10.2f} s{processor:10.2f} s of processors")
    print(f"{(found['lvssl'] == found['faiss IndexFlatIP']).mean():.4%} of the neighbours are the same")
    if path:
        keep(path, made)


# ----------------------------------------------------------------------------------------- what is made


def make_images(folder: Path, count: int) -> None:
    """Write folder/train and folder/test, parquet files of JPEGs in the order of their classes."""
    for split, images in (("train", count), ("test", test_images(count))):
        if (folder / split).is_dir():
            there = sum(pq.read_metadata(path).num_rows for path in (folder / split).glob("*.parquet"))
            if there != images:
                raise InputError(
                    f"{folder / split} holds {there:,} images, not {images:,}: another --scratch"
                )
            continue
        aside = folder / f".{split}"
        aside.mkdir(parents=True, exist_ok=True)
        jpegs = [[jpeg(label, turn) for turn in range(2)] for label in range(CLASSES)]
        files = -(-images // IN_A_FILE)
        for file, start in enumerate(range(0, images, IN_A_FILE)):
            rows = np.arange(start, min(start + IN_A_FILE, images))
            labels = rows * CLASSES // images
            cells = [
                {"bytes": commented(jpegs[label][row % 2], row), "path": f"{row}.jpg"}
                for label, row in zip(labels.tolist(), rows.tolist())
            ]
            table = pa.table({"image": cells, "label": labels})
            path = aside / f"{split}-{file:05d}-of-{files:05d}.parquet"
            pq.write_table(table, path, row_group_size=5000)
        aside.rename(folder / split)


def test_images(count: int) -> int:
    return max(CLASSES, round(count * TEST_IMAGES / IMAGES))


def jpeg(label: int, turn: int) -> bytes:
    """A grid of 4 x 4 colours of the class, with noise."""
    colours = np.random.default_rng(label).integers(0, 256, (4, 4, 3))
    noise = np.random.default_rng((label, turn)).integers(-30, 31, (32, 32, 3))
    pixels = np.clip(colours.repeat(8, 0).repeat(8, 1) + noise, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def commented(data: bytes, number: int) -> bytes:
    """The JPEG with a comment after its first marker."""
    return data[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + data[2:]


def make_embeddings(folder: Path, count: int) -> None:
    """Write folder/train.npy and folder/test.npy, float32 [N, WIDTH], and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    model = np.random.default_rng(0)
    centres = model.standard_normal((CLASSES, RANK), np.float32)
    mixing = model.standard_normal((RANK, WIDTH), np.float32)
    for stream, (split, images) in enumerate((("train", count), ("test", QUERIES))):
        path = folder / f"{split}.npy"
        if path.exists():
            continue
        labels = np.arange(images) * CLASSES // images
        aside = folder / f".{split}.npy"
        array = np.lib.format.open_memmap(aside, "w+", np.float32, (images, WIDTH))
        for start in range(0, images, CHUNK):
            part = slice(start, min(start + CHUNK, images))
            generator = np.random.default_rng((stream, start))
            place = centres[labels[part]]
            place += 1.2 * generator.standard_normal(place.shape, np.float32)
            array[part] = place @ mixing + generator.standard_normal((len(place), WIDTH), np.float32)
        array.flush()
        np.save(folder / f"{split}-labels.npy", labels)
        aside.rename(path)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
