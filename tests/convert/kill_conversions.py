"""Kills conversions at random moments, resumes each, and holds the outcome against one that was never killed.

    python kill_conversions.py SOURCE FOLDER KILLS SEED

Each trial is one to three kills in a row and a run to the end; a child is forked, so that it starts at once.
Prints a JSON object: kills, trials, how many of the last runs went on from a journal, and the seconds.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from pipelines.convert import conversion
from pipelines.convert.conversion import Settings, convert

SETTINGS = Settings(max_resolution=60, shuffle_seed=5)


def run(source: str, folder: Path) -> dict:
    return convert(
        source,
        folder / "x.beton",
        SETTINGS,
        webdataset=folder / "tars",
        images_per_tar=37,
        workers=2,
    )


def start(source: str, folder: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            manifest = run(source, folder)
            (folder / "resumed").write_text(str(manifest["resumed"]))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return child


def digest(folder: Path) -> str:
    """Of every file's name and bytes; whatever a conversion leaves behind is seen, too."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "resumed":
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def finished(folder: Path) -> bool:
    """Whether a kill came after the last step; there is nothing to repeat then."""
    return (folder / "x.beton.json").exists() and not any(path.name[0] == "." for path in folder.iterdir())


def main(source: str, root: Path, kills: int, seed: int) -> None:
    conversion.COMMIT_SECONDS = 0.01
    draw = random.Random(seed)
    reference = root / "reference"
    reference.mkdir()
    run(source, reference)  # here, so that each child has the compiled code from its start
    shutil.rmtree(reference)
    reference.mkdir()
    began = time.monotonic()
    assert os.waitpid(start(source, reference), 0)[1] == 0
    whole = time.monotonic() - began
    expected = digest(reference)

    began, done, trials, resumed = time.monotonic(), 0, 0, 0
    while done < kills:
        folder = root / "killed"
        folder.mkdir()
        for _ in range(draw.randint(1, 3)):
            child = start(source, folder)
            time.sleep(draw.random() * whole)
            os.kill(child, signal.SIGKILL)
            done += os.WIFSIGNALED(os.waitpid(child, 0)[1])  # it may have ended before
        if not finished(folder):
            assert os.waitpid(start(source, folder), 0)[1] == 0
            resumed += int((folder / "resumed").read_text()) > 0
        assert digest(folder) == expected, f"trial {trials} of seed {seed}, kept in {folder}"
        trials += 1
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(
        json.dumps({"kills": done, "trials": trials, "resumed": resumed, "seconds": seconds, "whole": whole})
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
