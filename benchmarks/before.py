"""Is this checkout as fast as another one? Runs the cores of five benchmarks alternately in two processes.

    git worktree add ../before COMMIT
    python -m benchmarks.before ../before --data imagenet-1k-one-per-class.tar

Each of the two processes imports its own checkout's benchmarks, warms up, and does the same work as the other
in each round; the order alternates. The output is the speed of this checkout over the other's, by processor
time: the geometric mean over the rounds, its 95 % interval (Student's t), and the median. The other checkout
must have everything used here under the same names.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import InputError


def main(arguments: list[str]) -> None:
    from lvssl.runs.differences import interval

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--data", type=Path, required=True, help="the images of benchmarks.loader, a tar")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        raise InputError("--rounds must be at least 2: there is no interval of one round")
    here = Path(__file__).resolve().parents[1]
    processes = [started(folder, options.data.resolve()) for folder in (here, options.other.resolve())]
    names, _ = (answer(process) for process in processes)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            order = processes if turn % 2 else processes[::-1]
            seconds = {id(process): asked(process, name) for process in order}
            ours, theirs = (seconds[id(process)] for process in processes)
            found[name].append(math.log(theirs / ours))
    for name, logs in found.items():
        gain = interval(logs)
        mean, low, high, middle = map(math.exp, (gain["mean"], *gain["interval"], statistics.median(logs)))
        print(f"{name:18} {mean:.3f} ({low:.3f} to {high:.3f}), median {middle:.3f}")


def started(checkout: Path, data: Path) -> subprocess.Popen[str]:
    # Passed as text, so that this file's folder isn't on the module search path.
    command = [sys.executable, "-c", Path(__file__).read_text(), str(data)]
    environment, pipe = os.environ | {"PYTHONPATH": str(checkout)}, subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, text=True, env=environment, stdin=pipe, stdout=pipe)


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise InputError("a process ended early; what it said stands above")
    return json.loads(line)


def asked(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin
    process.stdin.write(name + "\n")
    process.stdin.flush()
    return float(answer(process))


def serve(data: Path) -> None:
    """Do the work named by each line of input, and answer with its processor time in seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the benchmarks' own output apart from the answers
    work = works(data)
    for run in work.values():
        run()
    print(json.dumps(list(work)), file=answers, flush=True)
    for line in sys.stdin:
        print(work[line.strip()](), file=answers, flush=True)


def works(data: Path) -> dict[str, Callable[[], float]]:
    import torch

    from benchmarks import augmentation, engine, loader, loss
    from lvssl.codes.search import hamming_search, staged_search

    torch.set_num_threads(1)
    wanted = argparse.Namespace(workers=2, batch_size=50, only=["augmented"])
    epochs, _ = loader.prepare(wanted, *loader.same_bytes(data, Path("data/benchmark-loader")))
    views = augmentation.FORMS["numba"](augmentation.photographs(augmentation.BATCH))
    vectors, ntxent = loss.vectors(2048), loss.FORMS["ours"]()
    generator = np.random.default_rng(0)
    database, queries = (generator.integers(0, 256, (n, 256), np.uint8) for n in (100_000, 500))
    options = engine.parsed(["--part", "overhead", "--rounds", "10"])
    settings = engine.settings_of(options)
    engine.now = lambda device: time.process_time()

    def timed(run: Callable[[], Any], times: int = 1) -> Callable[[], float]:
        def measure() -> float:
            began = time.process_time()
            for _ in range(times):
                run()
            return time.process_time() - began

        return measure

    return {
        "loader, crops": timed(epochs["two_views"]),
        "loader, augmented": timed(epochs["augmented"]),
        "augmentation": timed(views, 4),
        "loss": timed(lambda: loss.step(ntxent, vectors), 20),
        "search, exact": timed(lambda: hamming_search(queries, database, 10)),
        "search, staged": timed(
            lambda: staged_search(queries, database, 10, coarse_bits=512, candidates=0), 2
        ),
        "engine, step": lambda: engine.overhead(settings, options)["engine"]["seconds"],
    }


if __name__ == "__main__":
    if "__file__" in globals():
        from lvssl.commands.main import guarded

        sys.exit(guarded(main, sys.argv[1:]))
    else:
        serve(Path(sys.argv[1]))
