"""A run's state on disk: written beside and renamed, checked by digest, the last two kept.

Kill -9 at any moment costs at most the steps since the last checkpoint: a file under its final name is whole,
and should it be damaged later, the one before it is used, with a message.
"""

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import InputError

KEPT = 2
MAGIC = b"LVSSLCK1"  # then 32 bytes SHA-256 of what follows, which is a torch.save archive


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write folder/step-<step>.pt atomically and remove all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"step-{step:09d}.pt"
    write_atomically(path, MAGIC, hashlib.sha256(payload).digest(), payload)
    for old in paths(folder)[:-KEPT]:
        old.unlink()
    return path


def write_atomically(path: Path, *parts: Any) -> None:
    """Write bytes to a temporary name beside `path`, sync, and rename; on failure nothing is left behind."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename too must survive a power cut
    finally:
        os.close(folder)


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load(path: Path) -> dict[str, Any]:
    """The state in a file; InputError if it is damaged."""
    content = memoryview(path.read_bytes())
    if len(content) < 40 or content[:8] != MAGIC or hashlib.sha256(content[40:]).digest() != content[8:40]:
        raise InputError(f"{path}: damaged checkpoint (its digest doesn't match its content)")
    return torch.load(io.BytesIO(content[40:]), map_location="cpu", weights_only=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint, or None if there is none at all.

    Raises:
        InputError: all that are there are damaged.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            return path, load(path)
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if found:
        raise InputError(f"{folder}: every checkpoint is damaged; start the run again in a new folder")
    return None


def digest(path: Path) -> str:
    """SHA-256 of a checkpoint's content, hex: the identity that codes carry."""
    with open(path, "rb") as file:
        head = file.read(40)
    if head[:8] != MAGIC:
        raise InputError(f"{path}: not a checkpoint")
    return head[8:40].hex()
