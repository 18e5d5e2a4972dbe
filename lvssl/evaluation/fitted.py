"""The training images for density and quantisers, which are fitted once per run and kept with it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lvssl.models.inference import encode, locations
from lvssl.runs.embeddings import Embeddings
from lvssl.runs.exported import is_exported
from lvssl.runs.identity import describe_set, other_set
from lvssl.runs.labels import readable, say_notes
from lvssl.runs.run import Run, image_count, read_set, versions
from pipelines.datasets.dataset import evenly_spaced
from pipelines.datasets.parts import are_there
from pipelines.decode import DamagedSample, Reader, open_reader
from pipelines.errors import InputError
from pipelines.files import write_atomically

VERSION = 1
SAMPLE = 50_000  # maximum number of training images


@dataclass(frozen=True)
class TrainingEmbeddings:
    """Embeddings for fitting density and quantisers."""

    run: Embeddings

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def about(self) -> dict[str, Any]:
        return {"train": self.path.resolve()}

    def same_as(self, found: dict[str, str]) -> bool:
        """As `TrainingImages.same_as`; the run's digest is that of the embeddings."""
        return found.get("train") == _text(self.path.resolve())

    def sample(self, kind: str) -> np.ndarray:
        """Return M <= SAMPLE embeddings, evenly spaced, float32 [M, D], whatever the kind.

        Raises InputError: fewer than two.
        """
        features = self.run.features
        if len(features) < 2:
            raise InputError(f"{self.path}: at least two embeddings are needed to fit density and quantiser")
        return np.asarray(features[evenly_spaced(len(features), SAMPLE)], np.float32)


@dataclass(frozen=True)
class TrainingImages:
    """A run's training images, or others in their place, for fitting density and quantisers; read once."""

    run: Run
    train: Path | None = None
    workers: int = 0
    on_error: str = "raise"  # for an image that can't be decoded
    limit: int = SAMPLE
    noted: Path | None = None  # a set whose notes are printed elsewhere

    @property
    def path(self) -> Path:
        return self.train or self.run.settings.data

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the training images."""
        return {"train": self.path.resolve(), "set": self.described["digest"]}

    def same_as(self, found: dict[str, str]) -> bool:
        """Whether what has this metadata was fitted on these images, or on those that the run was trained on
        if there are others now in their place. They are recognised as `lvssl.runs.identity` does; by path if
        they are gone, or in a file of an earlier version. An export has no training images: any will do."""
        if self.train is None and is_exported(self.run.folder):
            return True
        if "set" not in found or not are_there(self.path):
            return found.get("train") == _text(self.path.resolve())
        own = self.trained_on
        return bool(own and own["digest"] == found["set"]) or self.described["digest"] == found["set"]

    def sample(self, kind: str) -> np.ndarray:
        """Return "locations", "features" or "stages" of M <= `limit` images, float32 [M, L]. The images are
        evenly spaced in the set, which may be sorted by class.

        Raises InputError: no such images, fewer than two, or a damaged one with on_error="raise".
        """
        return self._read[kind]

    @property
    def count(self) -> int | None:
        """Number of images, by the run's records unless `train` is given; None if they don't say. Raises
        InputError: no such images."""
        return image_count(self.run.folder) if self.train is None else len(self.source)

    @cached_property
    def source(self) -> Reader:
        try:
            return open_reader(self.path)
        except InputError as error:
            raise InputError(
                f"{error} (density and quantiser are fitted on the training images: pass them with --train, "
                "or pass --no-fit)"
            ) from error

    @cached_property
    def described(self) -> dict[str, Any]:
        return describe_set(self.source)

    @property
    def trained_on(self) -> dict[str, Any] | None:
        """What the run recorded of its training images; None if `train` is given, or in older runs."""
        return read_set(self.run.folder) if self.train is None else None

    @cached_property
    def _read(self) -> dict[str, np.ndarray]:
        run, source = self.run, self.source
        if self.noted is None or self.noted.resolve() != self.path.resolve():
            say_notes(source)
        if (own := self.trained_on) and (differs := other_set(own, self.described)):
            said = f"{self.path} isn't the set that {run.folder} was trained on ({differs})"
            print(f"note: {said}: density and quantisers are fitted on what is there now", file=sys.stderr)
        rows = evenly_spaced(len(source), self.limit)
        view = run.settings.view
        batches = readable(
            source, view, self.workers, self.on_error, rows, title="fit on the training images"
        )
        features, where, stages = [], [], []
        try:
            for part in encode(run.network, batches, view):
                features.append(part.features.float().cpu().numpy())
                stages.append(part.stages.cpu().numpy())
                where.append(locations(run.network, part).float().cpu().numpy())
        except DamagedSample as sample:
            raise InputError(f"{self.path}: {sample}; --on-error skip leaves such images out") from None
        if sum(map(len, features)) < 2:
            raise InputError(f"{self.path}: at least two training images are needed to fit on")
        parts = {"features": features, "locations": where, "stages": stages}
        return {kind: np.concatenate(arrays) for kind, arrays in parts.items()}


Origin = Run | Embeddings  # what density and quantisers are fitted for
FittedOn = TrainingImages | TrainingEmbeddings


def keep(path: Path, arrays: dict[str, np.ndarray], run: Origin, about: dict[str, Any]) -> None:
    """Write the arrays as safetensors, atomically, with what identifies their origin. If the folder can't be
    written to, print a note instead."""
    origin = {"device": run.arithmetic, "lvssl": versions()["lvssl"]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, in_order(save(arrays, _texts(run, about) | origin)))
    except OSError as error:
        said = f"{path} could not be saved ({error.strerror}): the next call fits it again"
        print(f"note: {said}", file=sys.stderr)


def in_order(written: bytes) -> bytes:
    """Sort the metadata in the header of a safetensors file. The library writes it in any order, so equal
    arrays would not give equal bytes."""
    end = 8 + int.from_bytes(written[:8], "little")
    head = json.dumps(json.loads(written[8:end]), sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + written[end:]


def kept(
    path: Path,
    run: Origin,
    about: dict[str, Any],
    images: FittedOn | None = None,
    advice: str = "remove it to fit it again",
) -> dict[str, np.ndarray] | None:
    """Return the saved arrays; None if there are none, or if they belong to another checkpoint, to other
    settings or, if `images` are given, to others. Raises InputError, with the advice, if the file is
    damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            found = file.metadata() or {}
            wanted = _texts(run, about)
            if {name: found.get(name) for name in wanted} != wanted:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); {advice}") from error
    return arrays if images is None or images.same_as(found) else None


def _texts(run: Origin, about: dict[str, Any]) -> dict[str, str]:
    """Return the metadata as UTF-8 texts, the only type that safetensors stores."""
    fields = {"version": VERSION, "checkpoint": run.digest} | about
    return {name: _text(value) for name, value in fields.items()}


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()
