"""Digits as files of which some are no images."""

import shutil
from pathlib import Path

from PIL import Image

from pipelines.decode import open_reader

DAMAGED = {"train": [3, 4, 77], "test": [0, 9]}  # of 200 and 60, in the order of their paths


def make_folders(digits: dict[str, Path], root: Path) -> dict[str, Path]:
    """PNG files in class folders: `train`, `test` with damaged ones, and `sound` of each without."""
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
    """The same without the damaged files."""
    return folder.parent / "sound" / folder.name
