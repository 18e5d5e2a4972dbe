"""Read an exported encoder: the files that `lvssl export` writes are enough to encode without the run."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from lvssl.models.network import LVNet
from lvssl.settings.fields import from_dict
from lvssl.settings.pretrain import EngineSettings, LatentSettings, ModelSettings, PretrainSettings
from pipelines.errors import InputError, first_line
from pipelines.views import ViewSettings


class Exported(NamedTuple):
    settings: PretrainSettings  # model, latent, view and precision are the run's, all others defaults
    network: LVNet  # backbone and head are the run's; so is the projector if the head follows it
    step: int
    checkpoint: str  # digest of the checkpoint that was exported


def is_exported(folder: Path) -> bool:
    """Whether a folder was written by `lvssl export` and isn't a run."""
    try:
        return "lvssl" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_exported(folder: Path) -> Exported:
    """Read the encoder in a folder of `lvssl export`. InputError if it is damaged, or of another version."""
    path = folder / "config.json"
    try:
        ours = json.loads(path.read_text())["lvssl"]
        settings = PretrainSettings(
            data=folder / "training-images",  # an export neither has nor names them
            model=from_dict(ModelSettings, ours["model"], f"{path}: model"),
            latent=from_dict(LatentSettings, ours["latent"], f"{path}: latent"),
            view=from_dict(ViewSettings, ours["view"], f"{path}: view"),
            engine=EngineSettings(precision=ours["precision"]),
        )
        network = LVNet(settings.model, settings.latent, settings.view.resolution)
        network.backbone.load_state_dict(load_file(folder / "model.safetensors"))
        head = load_file(folder / "head.safetensors")
        before = {name: head.pop(name) for name in list(head) if name.startswith("projector.")}
        if before:
            network.projector.load_state_dict({k.removeprefix("projector."): v for k, v in before.items()})
        network.head.load_state_dict(head)
        return Exported(settings, network, int(ours["step"]), str(ours["checkpoint"]))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: not a complete export of this version of lvssl ({type(error).__name__}: "
            f"{first_line(error)}); export the run again"
        ) from error
