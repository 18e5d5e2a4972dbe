"""A run is a folder with config.json, checkpoints/, metrics.jsonl, and what later stages add."""

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import lvssl
from lvssl.models.device import DTYPES, claim, encoding_precision, pick_device
from lvssl.models.network import LVNet
from lvssl.runs import checkpoint
from lvssl.runs.exported import is_exported, read_exported
from lvssl.runs.identity import other_set
from lvssl.settings.fields import ReadsImages, difference, first_change, from_dict, to_dict
from lvssl.settings.pretrain import PretrainSettings, choice
from pipelines.datasets.parts import are_there, in_full
from pipelines.datasets.recognise import in_short
from pipelines.decode import Reader
from pipelines.errors import ON_ERROR, InputError, first_line
from pipelines.files import is_aside, write_json
from pipelines.formats import jpeg
from pipelines.lock import lock

LOCK = ".lock"
MOST_CLASSES = 10_000_000
# Version of what settings, images and seed lead to; raised when the numbers of stochastic results change.
# 1 (not written to files): noise from torch's generators, an epoch's order by sorting. 2: noise keyed by
# (seed, step, row) on every device, order by a keyed bijection.
RESULTS_VERSION = 2


def create_run(
    settings: PretrainSettings, classes: int, resume: bool, data: dict[str, Any] | None = None
) -> None:
    """Create the folder with its config.json or, to resume, check that it holds a run of the same settings.

    `data`: what `describe_set` returns for the training images.

    Raises:
        InputError: the folder exists (without resume), or holds a run of other settings or on another set.
    """
    config = settings.out / "config.json"
    if config.exists():
        if not resume:
            made = checkpoint.paths(settings.out / "checkpoints")
            lost = "" if made else " (it has no checkpoint yet: remove it to start again)"
            raise InputError(
                f"{settings.out} exists: add --resume to continue it, or choose another --out{lost}"
            )
        stored, stored_classes = read_config(settings.out)
        if (begun := results_version(config, _config(config))) != RESULTS_VERSION:
            raise InputError(
                f"{settings.out} was started with results version {begun}, but this lvssl produces version "
                f"{RESULTS_VERSION}: it can be read and measured, but not resumed; choose another --out"
            )
        # A run without a latent doesn't depend on these settings, and is the control for any values of them.
        unread = settings.latent.distribution.unread
        # So far every image could be read, so what to do with one that can't may still change.
        free = ("on_error", "max_pixels") if stored.on_error == "raise" else ()
        changed = difference(stored, settings, ("data", *free, *unread))
        if not changed and stored_classes != classes:
            changed = f"classes: {stored_classes} -> {classes}"
        if changed:
            way = ""
            if changed.startswith("epochs: "):
                way = f"; --init {settings.out} there starts from its weights"
            raise InputError(
                f"{settings.out} was started with other settings ({changed}); choose another --out{way}"
            )
        if data is not None:
            _check_set(settings, data)
        if chosen := {
            name: value for name in free if (value := getattr(settings, name)) != getattr(stored, name)
        }:
            content = _config(config)
            write_json(config, content | {"settings": content["settings"] | chosen}, indent=2)
        return
    if not is_empty_run(settings.out):
        raise InputError(f"{settings.out} exists but is not a run folder; choose another --out")
    settings.out.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, data=in_full(settings.data))  # the run may be used from another folder
    content = {"settings": to_dict(settings), "classes": classes, "data": data, "versions": versions()}
    write_json(config, content, indent=2)


def _check_set(settings: PretrainSettings, data: dict[str, Any]) -> None:
    """Raise InputError unless the run to resume was begun on these images."""
    begun = read_set(settings.out)
    if begun is None:
        said = f"{settings.out} is an older run, which doesn't record the images it was started on"
        print(f"note: {said}; they are not compared with {settings.data}", file=sys.stderr, flush=True)
    elif differs := other_set(begun, data):
        raise InputError(
            f"{settings.data} isn't the set that {settings.out} was started on ({differs}): pass that "
            "one with --data, wherever it is now, or choose another --out"
        )


def read_set(folder: Path) -> dict[str, Any] | None:
    """Read what a run's config.json says of its training images; None in older runs. InputError: damaged."""
    path = folder / "config.json"
    data = _config(path).get("data")
    return None if data is None else stored_set(path, data)


def stored_set(path: Path, data: Any) -> dict[str, Any]:
    """Return what a file says of a set under `data`, see `describe_set`. InputError if that is damaged."""
    kinds = {"images": int, "classes": list | None, "digest": str, "blocks": str}
    if not isinstance(data, dict) or any(
        not isinstance(data.get(n, "" if n == "blocks" else 0), kind) for n, kind in kinds.items()
    ):
        raise InputError(f"{path}: damaged (its `data` doesn't describe a set of images)")
    return {name: data[name] for name in kinds if name in data}


def image_count(folder: Path) -> int | None:
    """Number of a run's training images; None in older runs and exports. InputError if config is damaged."""
    return (read_set(folder) or {}).get("images")


def _config(path: Path) -> dict[str, Any]:
    """Read a run's config.json. InputError if it holds no object, or is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a run's configuration ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a run's configuration (an object is expected)")
    return content


def is_empty_run(folder: Path) -> bool:
    """Whether a run can begin there: the folder has nothing but what a run killed at its start leaves."""
    if not folder.is_dir():
        return not folder.exists()
    config = folder / "config.json"
    return all(p.is_dir() or p.name == LOCK or is_aside(p.name, config) for p in folder.rglob("*"))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Context in which no other process trains in `folder`; the system releases the lock of a killed process.

    Raises:
        InputError: another process is training there.
    """
    with open(folder / LOCK, "ab") as file:
        try:
            lock(file, folder)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {folder}: wait until it has finished, or "
                "choose another --out"
            ) from error
        yield


def results_version(path: Path, content: Mapping[str, Any]) -> int:
    """Return the results version that a config.json or a result names. InputError if that is no number."""
    named = content.get("versions") or {}
    version = (named.get("results") or 1) if isinstance(named, dict) else named
    if not isinstance(version, int):
        raise InputError(f"{path}: versions.results: a number is expected, not {type(version).__name__}")
    return version


def versions() -> dict[str, Any]:
    """Versions of everything that a result depends on."""
    return {
        "results": RESULTS_VERSION,
        "lvssl": lvssl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def read_config(folder: Path) -> tuple[PretrainSettings, int]:
    """Read a run's settings and its number of classes. InputError if the folder isn't a run, or its
    config.json holds an impossible value, which is named."""
    path = folder / "config.json"
    if folder.is_file():
        raise InputError(f"{folder}: is a file, not a run folder")
    if not folder.is_dir():
        fetch = "; for one on the Hub, `hf download USER/NAME --local-dir FOLDER`, then pass FOLDER"
        raise InputError(f"{folder}: no such run folder{fetch if folder.parts[:1] == ('hf:',) else ''}")
    if not path.is_file():
        raise InputError(f"{folder} is not a run folder (it has no config.json)")
    content = _config(path)
    if "lvssl" in content:  # as `is_exported` says
        raise InputError(f"{folder} is an exported encoder, not a run: it can only encode and search")
    settings = from_dict(PretrainSettings, content.get("settings"), str(path))
    classes = content.get("classes")
    if not isinstance(classes, int) or not 0 <= classes <= MOST_CLASSES:
        raise InputError(f"{path}: classes should be a count of at most {MOST_CLASSES:,}, not {classes!r}")
    try:
        settings.validate()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return settings, classes


@dataclass(frozen=True)
class Run:
    """A trained network and where it came from."""

    folder: Path
    settings: PretrainSettings
    network: LVNet  # with the moving average of the weights, if there is one; in eval mode
    step: int
    digest: str  # of its checkpoint
    classes: list[str] | None = None  # class names of its training images, if they are known

    def on_error(self, given: str | None) -> str:
        """What to do with a damaged image, one of ON_ERROR: as given or, by default, as in pretraining."""
        chosen = given or self.settings.on_error
        choice("on_error", chosen, ON_ERROR)
        return chosen

    def reading(self, settings: ReadsImages) -> str:
        """As `on_error`, by the settings of a command. Its --max-pixels (or the pretraining's) applies from
        here on."""
        most = settings.max_pixels
        jpeg.read_up_to(self.settings.max_pixels if most is None else most)
        return self.on_error(getattr(settings, "on_error", None))

    @property
    def arithmetic(self) -> str:
        """Device and precision in which images are read, such as "cuda bf16". The last bits of features
        depend on it, and with them a few bits of codes."""
        device = next(self.network.parameters()).device
        names = {dtype: name for name, dtype in DTYPES.items()}
        return f"{device.type} {names[self.network.precision]}"

    def described(self, name: str) -> dict[str, Any]:
        """Describe this run for a result, in whose rows it has that name."""
        return {
            "name": name,
            "path": str(self.folder.absolute()),
            "family": self.settings.latent.family,
            "checkpoint": self.digest,
            "arithmetic": self.arithmetic,
            "step": self.step,
        }


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs in rows: those of their folders, or paths if two would be the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder.resolve()) for run in runs]


def training_set(run: Run, given: Path | None) -> Path:
    """Path of the training images, as given or of the pretraining. InputError if the latter are gone."""
    if given is None and not are_there(run.settings.data):
        raise InputError(
            f"{run.settings.data}: the training images of {run.folder} are no longer there: pass them "
            "with --train, wherever they are now"
        )
    return given or run.settings.data


def require_classes_of(run: Run, source: Reader, path: Path) -> None:
    """Raise InputError if the set at `path`, where a run's training images were, now has other classes. Their
    order may differ, as when the run is resumed."""
    if run.classes is not None and source.classes is not None and set(run.classes) != set(source.classes):
        what = in_short("differing", sorted(set(source.classes) ^ set(run.classes)))
        raise InputError(
            f"{path} isn't the set that {run.folder} was trained on: its classes differ ({what}); pass "
            "a training set with --train"
        )


def require_same_classes(run: Run, control: Run) -> None:
    """Raise InputError if a control was trained on other classes than the run, so they can't be compared."""
    if run.classes is not None and control.classes is not None and set(run.classes) != set(control.classes):
        strange = sorted(set(run.classes) ^ set(control.classes))
        what = in_short("differing", strange)
        raise InputError(
            f"{control.folder} was trained on other classes than {run.folder} ({what}): pass one of the "
            "same training images with --control"
        )


def require_weights_of(network: LVNet, weights: dict[str, torch.Tensor], path: Path, folder: Path) -> None:
    """Raise InputError unless a checkpoint's weights fit the network that a run's settings describe."""
    had = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if changed := first_change(had, wanted):
        raise InputError(
            f"{path} holds another network than {folder / 'config.json'} describes ({changed}): one of "
            "the two belongs to another run, or was changed"
        )


def load_run(folder: Path, device: torch.device | None = None) -> Run:
    """Load the newest checkpoint of a run, ready to encode on `device`, by default a GPU if there is one.

    Raises:
        InputError: there is no run, no checkpoint, or the weights don't fit the settings.
    """
    settings, classes = read_config(folder)
    found = checkpoint.load_latest(folder / "checkpoints")
    if found is None:
        raise InputError(
            f"{folder} has no checkpoint yet: let `lvssl pretrain` finish at least its first epoch"
        )
    path, state = found
    weights = state.get("ema") or state["network"]
    with torch.device("meta"):  # takes no memory, whatever the settings are
        planned = LVNet(settings.model, settings.latent, settings.view.resolution, classes)
    require_weights_of(planned, weights, path, folder)
    network = LVNet(settings.model, settings.latent, settings.view.resolution, classes)
    network.load_state_dict(weights)
    named = (read_set(folder) or {}).get("classes")
    network = ready(network, settings, device)
    return Run(folder, settings, network, state["step"], checkpoint.digest(path), named)


def load_encoder(folder: Path, device: torch.device | None = None) -> Run:
    """As `load_run`, for a run or a folder that `lvssl export` has written.

    An export is enough to encode images and to search; it names no training images and can't be evaluated.
    Raises InputError if there is no run, or the export is damaged.
    """
    if not is_exported(folder):
        return load_run(folder, device)
    settings, network, step, digest = read_exported(folder)
    return Run(folder, settings, ready(network, settings, device), step, digest)


def ready(network: LVNet, settings: PretrainSettings, device: torch.device | None) -> LVNet:
    """Move the network to the device, in eval mode, and set the precision in which it reads images there."""
    if device is None:
        device = pick_device("auto")
        claim(device)
    network = network.to(device).to(memory_format=torch.channels_last)
    network.precision = encoding_precision(settings.engine, device)
    return network.eval()
