"""Check one GPU in four minutes: is every kernel correct, how fast are the parts, how fast is a training
step?

    python -m benchmarks.gpu                          all stages; updates docs/gpu-CARD.json as it runs
    python -m benchmarks.gpu --only exact --only times
    python -m benchmarks.gpu --only steps --case deterministic
    python -m benchmarks.gpu --doc                    the tables of docs/gpu.md from the existing files
    python -m benchmarks.gpu --dry-run                the same stages on a CPU, tiny: kernels are interpreted

Run it from the source tree. It only needs torch, Triton, torchvision, numba and timm, and no network. A
missing package (lightly, kornia, pytest-xdist ...) becomes a row that says so.

    machine   versions, nvidia-smi; the card's measured limits: copies, a matrix product
    tests     those marked `gpu`, up to eight at a time; meanwhile
    exact     every kernel against fp64, with fresh seeds; fifty repeats give the same bits; compute-sanitizer
    compile   compile the networks and losses of the following stages
    times     augmentation, NT-Xent, heads, decorrelation, optimisers: against their floors and their peers
    steps     ResNet-50 at 224 px, ResNet-18 at 32 px: bare loop, engine, loader, CUDA graph, compiled; and
              the pipeline commonly used
    decode    from JPEGs to crops on the device: by CPU threads, by nvJPEG and our kernel, by DALI
    ranks     correctness of two ranks that share the device, by gloo, and of one in an NCCL group
    commands  pretrain, evaluate, encode, search ... as a user types them: does each succeed, on the device

Each stage runs in its own processes with a deadline, so that a kernel that hangs or crashes costs one row.
The file is rewritten after each row; the processes' output, including tracebacks of failed rows, goes to the
.log next to it. The tables come last: predictions and goals next to the measurements.
Exit status 1: a row is wrong. docs/gpu.md has the measurements so far.
"""

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import predictions
from benchmarks.gpu_stages.case import Row, Setup
from benchmarks.gpu_stages.run import ROOT, Report, Stage, identify, run_stages
from benchmarks.script import parser_of
from lvssl.commands.main import guarded
from pipelines.errors import InputError
from pipelines.files import write_atomically

HERE = "benchmarks.gpu_stages."
STAGES = (
    Stage("machine", HERE + "machine", weight=30),
    Stage("tests", HERE + "suite", weight=110),
    Stage("exact", HERE + "exact", weight=75, parts=3, beside=True),
    Stage("compile", HERE + "compiled", weight=75, parts=2, beside=True),
    Stage("times", HERE + "times", weight=60),
    Stage("steps", HERE + "steps", weight=120),
    Stage("decode", HERE + "decode", weight=25),
    Stage("ranks", HERE + "ranks", weight=60),
    Stage("commands", HERE + "commands", weight=60, beside=True),
)
BEGIN, END = "<!-- python -m benchmarks.gpu --doc -->", "<!-- end -->"


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    if options.doc:
        document(options.doc)
        return 0
    device = "cpu" if options.dry_run else "cuda"
    card = identify(device)
    path = options.json or default_path(card["card"], options.dry_run)
    chosen = chosen_stages(options)
    print(
        f"{card['card']}, torch {card['torch']}, Triton {card['triton']}, driver {card['driver']}", flush=True
    )
    print(f"seed {options.seed}; rows go to {path}", flush=True)
    head = {
        "command": "python -m benchmarks.gpu " + " ".join(arguments),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "seed": options.seed,
        "dry_run": options.dry_run,
    }
    names = {stage.name for stage in chosen}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lvssl-gpu-") as scratch:
        report = Report(path, card, head, keep=lambda row: bool(options.case) or row["stage"] not in names)
        setup = Setup(
            "", "", "", device, options.dry_run, options.seed, str(path), scratch, str(options.images or ""),
            wanted=tuple(options.case),
        )  # fmt: skip
        run_stages(chosen, setup, report, 60 * options.minutes)
    if options.case and not report.new():
        raise InputError(
            f"--case {' '.join(options.case)}: no case of {', '.join(sorted(names))} is named so"
        )
    print_tables({card["card"]: predictions.newest(report.rows)})
    wrong = [row for row in report.new() if row.get("ok") is False]
    print(
        f"{len(report.new())} rows in {time.monotonic() - started:.0f} s, {len(wrong)} of them wrong: {path}"
    )
    for row in wrong:
        print(f"  {row['stage']}: {row['name']}: {row.get('failed') or 'out of its budget'}")
    return 1 if wrong else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    stages = [stage.name for stage in STAGES]
    parser.add_argument("--only", action="append", choices=stages, default=[], help="this stage; repeatable")
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help="cases so named; repeatable"
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the rows go; left out: docs/gpu-CARD.json")
    parser.add_argument("--minutes", type=float, help="for everything; 4, or 10 with --dry-run")
    parser.add_argument(
        "--images", type=Path, help="a beton or folder for the steps at 224 px; left out: made"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="left out: a fresh one")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lvssl-gpu-cache",
                        help="where compiled networks and kernels are kept")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    parser.add_argument(
        "--doc", type=Path, nargs="?", const=ROOT / "docs" / "gpu.md", help="rewrite the tables"
    )
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (10.0 if options.dry_run else 4.0)
    if options.images and not options.images.exists():
        raise InputError(f"--images {options.images}: no such beton or folder")
    made_absolute(options, "images", "json", "cache")
    return options


def made_absolute(options: argparse.Namespace, *paths: str) -> None:
    """Make these options absolute, as the stages run in the source tree."""
    for name in paths:
        value = getattr(options, name)
        setattr(options, name, value.resolve() if value else None)


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """A stage's environment: where compiled networks and kernels are kept, and on a CPU one thread."""
    kept = {
        "TORCHINDUCTOR_CACHE_DIR": str(options.cache / "inductor"),
        "TRITON_CACHE_DIR": str(options.cache / "triton"),
    }
    return kept | ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {})


def default_path(card: str, dry: bool) -> Path:
    """docs/gpu-h100.json for an "NVIDIA H100 80GB HBM3"."""
    if dry:
        return ROOT / "runs" / "gpu-dry-run.json"
    found = re.search(r"\b[A-Z]{1,3}\d{2,4}\w*", card)
    name = found.group() if found else re.sub(r"\W+", "-", card)
    return ROOT / "docs" / f"gpu-{name.lower()}.json"


def chosen_stages(options: argparse.Namespace) -> list[Stage]:
    """The requested stages. A CPU interprets the kernels, and runs stages one at a time."""
    chosen = []
    for stage in STAGES:
        if options.only and stage.name not in options.only:
            continue
        environment = environment_of(options)
        if options.dry_run:
            environment |= {"TRITON_INTERPRET": "1"} if stage.name in ("exact", "times", "decode") else {}
            stage = dataclasses.replace(stage, parts=1, beside=False)
        chosen.append(dataclasses.replace(stage, environment=environment))
    return chosen


def commit() -> str:
    """The commit of the source tree, if it is a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def print_tables(cards: dict[str, dict[str, Row]]) -> None:
    for cells in predictions.tables(cards):
        print("\n" + predictions.plain(cells))
    print(flush=True)


def measured_files(folder: Path) -> dict[str, dict[str, Row]]:
    """The newest rows of each docs/gpu-CARD.json, by card."""
    cards: dict[str, dict[str, Row]] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        if "study" in path.stem or content.get("dry_run"):
            continue
        for row in content["rows"]:
            cards.setdefault(row["card"], {})[row["name"]] = row
    return cards


def document(path: Path) -> None:
    """Replace the text between the marks."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise InputError(f"{path} lacks the marks {BEGIN} and {END}, between which the tables go")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n\n".join(map(predictions.markdown, predictions.tables(measured_files(path.parent))))
    write_atomically(path, f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}".encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(guarded(main, sys.argv[1:]))
