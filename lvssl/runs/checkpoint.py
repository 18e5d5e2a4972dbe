"""Checkpoints: a run's state on disk, written atomically and checked by digest; the last few are kept.

Kill -9 at any moment costs at most the steps since the last checkpoint. A file under its final name is
complete; if it is damaged later, the one before it is used, with a message.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipelines.amounts import size_text
from pipelines.errors import InputError
from pipelines.files import NO_SPACE, write_atomically

MAGIC = b"LVSSLCK1"  # followed by the SHA-256 (32 bytes) of a torch.save archive, and the archive


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write folder/step-<step>.pt atomically, and remove all checkpoints but the last `keep`.

    Raises:
        OSError: no space is left (says how much is needed); existing checkpoints are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{step:09d}.pt"
    # Release the view before an error propagates: Python 3.12.1 may crash on one that a traceback holds.
    with buffer.getbuffer() as payload:
        try:
            write_atomically(path, MAGIC, hashlib.sha256(payload).digest(), payload)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            needed, free = size_text(payload.nbytes), size_text(shutil.disk_usage(folder).free)
            before = paths(folder)
            stands = f"; {before[-1].name} still stands" if before else ""
            raise OSError(
                f"{path}: no space left for a checkpoint of {needed}, {free} are free{stands}: "
                "free some space and resume"
            ) from error
    for old in paths(folder)[:-keep]:
        old.unlink()
    return path


class Writer:
    """Writes checkpoints in the background: the state is copied at once, then written, hashed and synced by a
    thread, one after the other.

    As a context it waits for the last one at its end. An error is raised by the call that follows it.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[Path] | None = None

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> None:
        """As `save`, of the state as it is now. Waits for the one before; at most one copy is held."""
        self.wait()
        copied = on_host(state)
        event: torch.cuda.Event | None = None
        device = -1
        if torch.cuda.is_initialized():
            event, device = torch.cuda.Event(), torch.cuda.current_device()
            event.record()

        def write() -> Path:
            if event is not None:
                torch.cuda.set_device(device)  # a thread starts on the first GPU, and would take memory there
                event.synchronize()  # the copies have arrived
            return save(folder, step, copied, keep)

        self.under_way = self.thread.submit(write)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: no space is left; existing checkpoints are kept.
        """
        written, self.under_way = self.under_way, None
        if written is not None:
            written.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            print(f"warning: no checkpoint was written: {error}", file=sys.stderr, flush=True)


def on_host(state: Any) -> Any:
    """Copy a state to the CPU; copies from a GPU are asynchronous, queued behind what was launched."""
    if isinstance(state, torch.Tensor):
        pinned = state.is_cuda
        return torch.empty_like(state, device="cpu", pin_memory=pinned).copy_(state, non_blocking=pinned)
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(on_host(value) for value in state)
    return state


def paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load(path: Path) -> dict[str, Any]:
    """Load the state from a file; InputError if it is damaged."""
    return torch.load(io.BytesIO(checked(path)), map_location="cpu", weights_only=True)


def checked(path: Path) -> memoryview:
    """Return a file's content, a torch.save archive; InputError if it doesn't match its digest."""
    content = memoryview(path.read_bytes())
    if len(content) < 40 or content[:8] != MAGIC or hashlib.sha256(content[40:]).digest() != content[8:40]:
        raise InputError(f"{path}: damaged checkpoint (its digest doesn't match its content)")
    return content[40:]


def latest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there is no checkpoint.

    Raises:
        InputError: all checkpoints are damaged.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            checked(path)
            return path
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if found:
        raise InputError(f"{folder}: every checkpoint is damaged; start the run again in a new folder")
    return None


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its state, or None; errors as for `latest`."""
    path = latest(folder)
    return None if path is None else (path, load(path))


def digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's content, in hex; code files store it to identify the model.
    InputError if it isn't a checkpoint."""
    with open(path, "rb") as file:
        head = file.read(40)
    if head[:8] != MAGIC:
        raise InputError(f"{path}: not a checkpoint")
    return head[8:40].hex()
