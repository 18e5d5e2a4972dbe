"""Recognise images, splits and system files by the names, in any case, and first bytes of files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".avif", ".jp2", ".j2k", ".heic", ".tga", ".pcx"),
)
UNLABELLED = "unlabeled"
_SPLIT_OF = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "validation", "valid": "validation", "validation": "validation"},
    **{"unlabeled": UNLABELLED, "unlabelled": UNLABELLED},
}
_ENDINGS = re.compile(r"(\.(beton|tar|parquet|arrow|csv|tsv|jsonl|txt))+$", re.IGNORECASE)
_OF_A_PART = re.compile(
    rf"((^|[-_.])({'|'.join(_SPLIT_OF)})([-_.]?\d+)?)?([-_.]?(\*|\[.*\]|\{{.*\}}|\d+-of-\d+))?$",
    re.IGNORECASE,
)
_LEFT_BY_A_SYSTEM = (
    *("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
    *("thumbs.db", "desktop.ini"),
)
HEAD = 32  # bytes that suffice to recognise an image
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s|DDS |8BPS|qoif"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    rb"|....ftyp(avif|avis|heic|heix|mif1|msf1)",
    re.DOTALL,
)


def left_by_a_system(name: str) -> bool:
    """Whether a file or folder is hidden, or created by an operating system or a NAS, judging by its name."""
    return name.startswith(".") or name.lower() in _LEFT_BY_A_SYSTEM


def has_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def ending_in(folder: Path, *ends: str) -> list[Path]:
    """The files of a folder whose names end so, in any case, but those left by a system; sorted."""
    named = (name for name in os.listdir(folder) if name.lower().endswith(ends))
    return sorted(folder / name for name in named if not left_by_a_system(name))


def is_image(head: bytes) -> bool:
    """Whether the first HEAD bytes of a file are those of an image."""
    return _SIGNATURES.match(head) is not None


def split_of_folder(name: str) -> str | None:
    """Train, TRAINING -> train; Val, valid -> validation; also unlabeled. None for other names."""
    return _SPLIT_OF.get(name.lower())


def split_of_file(name: str) -> str | None:
    """The split that a file's name states; the last part that states one counts:
    train-00000-of-00002.parquet, imagenet1k-validation-00.tar."""
    found = [_SPLIT_OF[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_OF]
    return found[-1] if found else None


def set_name(source: str) -> str:
    """A data set's name by its path, or by what it was converted from, without what marks a split or a part:
    cifar10/test-00000-of-00001.parquet -> cifar10; mnist-train.beton -> mnist. "" if nothing else is left."""
    names = (_ENDINGS.sub("", part) for part in reversed(source.rpartition(":")[2].split("/")))
    return next(filter(None, (_OF_A_PART.sub("", name, count=1) for name in names)), "")


def missing_shards(names: Sequence[str]) -> list[str]:
    """A note of files missing from a numbered series: train-00001-of-00003.tar; 001.tar of 000 to 009."""
    series: dict[tuple[str, str, int, int], set[int]] = {}  # by the text around the number, and its digits
    for name in names:
        if found := re.fullmatch(r"(.*?)(\d+)(-of-(\d+)\D*|\.\w+)", name, re.DOTALL):
            before, number, after, of = found.groups()
            series.setdefault((before, after, len(number), int(of or 0)), set()).add(int(number))
    missing = []
    for (before, after, digits, of), there in series.items():
        wanted = range(of) if of else range(min(there), max(there))
        if len(wanted) - len(there) < 100_000:  # otherwise not a series, but dates and the like
            missing += [f"{before}{n:0{digits}}{after}" for n in wanted if n not in there]
    return [in_short("missing files of a numbered series", missing)] if missing else []


class LeftOut:
    """Counts what is ignored and keeps the first names, for a note. `what`: such as "files of no split"."""

    def __init__(self, what: str):
        self.what, self.count = what, 0
        self.first: list[str] = []

    def add(self, *names: str) -> None:
        self.count += len(names)
        self.first += names[: 3 - len(self.first)]

    def notes(self) -> list[str]:
        """One line, or none."""
        return [in_short(f"ignored {self.what}", self.first, self.count)] if self.count else []


def by_a_system() -> LeftOut:
    return LeftOut("hidden and system files")


def in_short(what: str, names: Sequence[str], count: int | None = None) -> str:
    """`what`, its count, and up to three names: "ignored folders (5): a, b, c ..."."""
    count = len(names) if count is None else count
    shown = ", ".join(names[:3]) + (" ..." if count > 3 else "")
    return f"{what} ({count:,}): {shown}"
