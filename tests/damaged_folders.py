"""Folders of digits in which some files are not images."""

import shutil
from pathlib import Path

from PIL import Image

from pipelines.decode import open_reader

DAMAGED = {"train": [3, 4, 77], "test": [0, 9]}  # of 200 and 60 files, in the order of their paths


def make_folders(digits: dict[str, Path], root: Path) -> dict[str, Path]:
    """Write PNG files in class folders: `train` and `test` with damaged files, and `sound` without these."""
    for split, count in (("train", 200), ("test", 60)):
        source = open_reader(digits[split])
        for i in range(count):
            path = root / split / str(source.labels[i]) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.encoded(0, i)).save(path)
        shutil.copytree(root / split, root / "sound" / split)
        files = sorted(path.relative_to(root) for path in (root / split).glob("*/*.png"))
        for row in DAMAGED[split]:
            (root / files[row]).write_bytes(b"\x89PNG\r\n\x1a\n, and nothing of the kind")
            (root / "sound" / files[row]).unlink()
    return {split: root / split for split in DAMAGED}


def sound(folder: Path) -> Path:
    """Return the same folder without the damaged files."""
    return folder.parent / "sound" / folder.name
