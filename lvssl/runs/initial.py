"""Weights from which a pretraining starts (`--init`): of a run, an export or a file, or those that
torchvision or timm offers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping

import torch
import torch.nn as nn
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from lvssl.models.backbone import RESNETS, SMALL, build_backbone, timms
from lvssl.runs.exported import is_exported
from lvssl.runs.hub import PREFIX, local_folder
from lvssl.runs.run import load_encoder
from lvssl.settings.pretrain import ModelSettings
from pipelines.errors import InputError, first_line

PRETRAINED = "pretrained"
WITHIN = ("state_dict", "model", "network", "teacher", "student")  # where training programs keep weights
BEFORE = ("", "module.", "backbone.", "encoder.", "model.", "module.backbone.", "module.encoder.")


def initial_weights(model: ModelSettings, resolution: int) -> dict[str, Tensor]:
    """Load the backbone's state that `model.init` names, checked against the backbone at that resolution.

    Anything else in a file, such as a classifier or a projector, is left out.
    Raises InputError if there is no such file, run or repository, or it is of another network.
    """
    with torch.device("meta"):
        network = build_backbone(model.backbone, resolution)[0]
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    what = f"--init {model.init}"
    found = with_positions_of(network, best_prefix(_read(model, resolution, what), wanted))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{what} doesn't fit {model.backbone}: it lacks {len(missing)} of {len(wanted)} tensors, such as "
            f"{missing[0]}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            stem = " (up to 64 px ResNets have another stem)" if name == "conv1.weight" else ""
            raise InputError(
                f"{what} doesn't fit {model.backbone} at {resolution} px: {name} is "
                f"{list(found[name].shape)}, not {list(shape)}{stem}"
            )
    return {name: found[name].detach().cpu() for name in wanted}


def best_prefix(weights: Mapping[str, Tensor], wanted: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the weights whose names have a prefix of BEFORE, by their names without it. Of these prefixes,
    the one that gives most of the wanted names is taken."""
    forms = (
        {name.removeprefix(before): value for name, value in weights.items() if name.startswith(before)}
        for before in BEFORE
    )
    return max(forms, key=lambda form: len(form.keys() & wanted.keys()))


def with_positions_of(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resample a transformer's position embeddings if they are for another resolution, as timm does."""
    own, given = getattr(network, "pos_embed", None), weights.get("pos_embed")
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if own is None or given is None or grid is None or given.ndim != 3 or given.shape == own.shape:
        return weights
    from timm.layers import resample_abs_pos_embed

    before = own.shape[1] - math.prod(grid)  # those of the class token and the like
    if not math.isqrt(max(given.shape[1] - before, 0)) ** 2 == given.shape[1] - before > 0:
        return weights
    return weights | {"pos_embed": resample_abs_pos_embed(given, list(grid), num_prefix_tokens=before)}


def _read(model: ModelSettings, resolution: int, what: str) -> Mapping[str, Tensor]:
    if model.init == PRETRAINED:
        return _pretrained(model.backbone, resolution)
    try:
        path = local_folder(model.init)
        if path.is_dir():
            if is_exported(path) or not (path / "model.safetensors").exists():
                return load_encoder(path, torch.device("cpu")).network.backbone.state_dict()
            path = path / "model.safetensors"
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        for key in WITHIN:
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                found = found[key]
        if not isinstance(found, Mapping):
            raise InputError(
                f"{what}: holds a {type(found).__name__}, not a dictionary of tensors by name; "
                "save the state_dict()"
            )
        return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{what}: not a file of weights, or damaged, or it holds objects other than tensors, which "
            "aren't loaded because they may run code; save only the state_dict"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{what}: no such file; or {PREFIX}USER/NAME, or {PRETRAINED}") from None
    except Exception as error:  # torch, safetensors, timm and huggingface_hub have their own kinds
        raise InputError(f"{what}: {first_line(error)}") from error


def _pretrained(backbone: str, resolution: int) -> Mapping[str, Tensor]:
    if backbone in SMALL:
        raise InputError(
            f"--init {PRETRAINED}: there are no pretrained weights of {backbone}, which is lvssl's own"
        )
    try:
        if backbone in RESNETS:
            return torchvision.models.get_model(backbone, weights="DEFAULT").state_dict()
        return timms(backbone, resolution, pretrained=True).state_dict()
    except Exception as error:  # torch, timm, huggingface_hub and the network have their own kinds
        raise InputError(
            f"--init {PRETRAINED}: weights of {backbone} could not be loaded or downloaded "
            f"({first_line(error)}): check the network, or pass a file of weights"
        ) from error
