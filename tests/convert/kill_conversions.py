"""Kill conversions at random moments, resume them, and compare the results with an uninterrupted conversion.

    python kill_conversions.py SOURCE FOLDER KILLS SEED

Each trial kills one to three times in a row and then runs to the end; a child is forked, so that it starts at
once. Half of the kills come at a random time, wherever the conversion then is. The other half come once the
journal holds a random number of images, so that there is something to resume from however fast machine and
disk are. Prints a JSON object: kills, trials, the number of trials in which the conversion resumed from a
journal, and the seconds.
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
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.journal import Journal, _groups

SETTINGS = Settings(max_resolution=60, shuffle_seed=5)


def run(source: str, folder: Path) -> dict:
    return convert(
        source,
        folder / "x.beton",
        SETTINGS,
        options=ConvertOptions(
            webdataset=folder / "tars",
            images_per_tar=37,
            workers=2,
        ),
    )


def die_when_safe(images: int) -> None:
    """Kill this process as soon as its journal, read from the disk, holds this many images."""
    write = Journal._write

    def write_and_die(journal: Journal, files: list[int], group: bytes) -> None:
        write(journal, files, group)
        with open(journal.path, "rb") as file:
            file.readline()
            if sum(len(records) for records, *_ in _groups(file)) >= images:
                os.kill(os.getpid(), signal.SIGKILL)

    Journal._write = write_and_die


def start(source: str, folder: Path, images: int | None = None) -> int:
    """Start a conversion in a child; with `images`, it dies once this many are safe."""
    child = os.fork()
    if child == 0:
        try:
            if images is not None:
                die_when_safe(images)
            manifest = run(source, folder)
            (folder / "resumed").write_text(str(manifest["resumed"]))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return child


def digest(folder: Path) -> str:
    """Return a digest of every file's name and bytes, including anything left behind by a conversion."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "resumed":
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def finished(folder: Path) -> bool:
    """Return whether a kill came after the last step, so that there is nothing to repeat."""
    return (folder / "x.beton.json").exists() and not any(path.name[0] == "." for path in folder.iterdir())


def killed(source: str, folder: Path, seconds: float | None, images: int) -> bool:
    """Kill a conversion after `seconds` or once `images` are safe; return whether the kill was in time."""
    child = start(source, folder, images if seconds is None else None)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def main(source: str, root: Path, kills: int, seed: int) -> None:
    conversion.COMMIT_SECONDS = 0.01
    draw = random.Random(seed)
    reference = root / "reference"
    reference.mkdir()
    total = run(source, reference)["source_count"]  # so children start with compiled code
    shutil.rmtree(reference)
    reference.mkdir()
    began = time.monotonic()
    assert os.waitpid(start(source, reference), 0)[1] == 0
    whole = time.monotonic() - began
    expected = digest(reference)

    began, done, trials, resumed = time.monotonic(), 0, 0, 0
    while done < kills:
        folder, safe = root / "killed", 0
        folder.mkdir()
        moments = [
            (draw.choice([None, draw.random() * whole]), draw.randint(1, total))
            for _ in range(draw.randint(1, 3))
        ]
        for seconds, images in moments:
            in_time = killed(source, folder, seconds, images)
            done += in_time
            if in_time and seconds is None:
                safe = max(safe, images)
            if finished(folder):
                break
        if not finished(folder):
            in_time = False
            assert os.waitpid(start(source, folder), 0)[1] == 0
        if not in_time:  # the conversion ended, and says where it resumed
            went_on = int((folder / "resumed").read_text())
            assert went_on >= safe, f"trial {trials} of seed {seed}: {went_on} images kept of {safe}"
            resumed += went_on > 0
        assert digest(folder) == expected, f"trial {trials} of seed {seed}, kept in {folder}"
        trials += 1
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(
        json.dumps({"kills": done, "trials": trials, "resumed": resumed, "seconds": seconds, "whole": whole})
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
