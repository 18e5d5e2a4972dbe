"""Images with exactly known factors: augmented views with their parameters, and procedural shapes."""

from __future__ import annotations

import numpy as np
import torch

from lvssl.evaluation.outputs import NetworkOutputs, network_outputs
from lvssl.evaluation.sets import Sampling, Sets
from lvssl.evaluation.shapes import make_shapes, regression_targets
from lvssl.runs.run import Run
from pipelines.decode import Reader
from pipelines.loader import LoaderSettings, TwoViewLoader
from pipelines.parameters import COLUMNS


def representations(outputs: NetworkOutputs) -> dict[str, np.ndarray]:
    return {"features": outputs.features, "code": 2 * outputs.bits.astype(np.float32) - 1}


Factors = tuple[NetworkOutputs, dict[str, np.ndarray]]  # outputs, and known factors: [N] or [N, T]


def known_factors(run: Run, sets: Sets, sampling: Sampling) -> dict[str, tuple[Factors, Factors]]:
    """Return a training and a test part of augmented views and of procedural shapes. Factors that never
    change, such as those of an augmentation that is switched off, are left out."""
    count = sampling.max_images or 2000
    on_error = run.on_error(sampling.on_error)
    views = [
        augmented(run, source, n, sampling.seed, on_error)
        for source, n in zip(sets.sources, (2 * count, count))
    ]
    shapes = [shape_outputs(run, n, sampling.seed + i) for i, n in enumerate((2 * count, count))]
    found = {}
    for kind, (train, test) in {"augmentation": views, "shapes": shapes}.items():
        varied = [name for name, values in train[1].items() if values.std() >= 1e-9]
        parts = [(outputs, {name: targets[name] for name in varied}) for outputs, targets in (train, test)]
        found[kind] = parts[0], parts[1]
    return found


def augmented(
    run: Run, source: Reader, count: int, seed: int, on_error: str = "raise"
) -> tuple[NetworkOutputs, dict[str, np.ndarray]]:
    """Return the outputs for `count` augmented views, and their parameters as regression targets."""
    batch_size = min(250, len(source))
    views: list[torch.Tensor] = []
    parameters, indices = [], []
    settings = LoaderSettings(batch_size, seed + 1, on_error=on_error)
    with TwoViewLoader(source, run.settings.view, settings) as loader:
        while len(views) * batch_size < count:
            for batch in loader:
                views.append(batch.views[0].clone())
                parameters.append(batch.parameters[:, 0].numpy())
                indices.append(batch.indices.numpy())
                if len(views) * batch_size >= count:
                    break
    table = dict(zip(COLUMNS, np.concatenate(parameters)[:count].T.astype(np.float64)))
    heights, widths = source.sizes(np.concatenate(indices)[:count])
    targets = {
        "crop area": table["height"] * table["width"] / (heights * widths),
        "crop x": (table["left"] + table["width"] / 2) / widths,
        "crop y": (table["top"] + table["height"] / 2) / heights,
    }
    names = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "sigma")
    outputs = network_outputs(run.network, torch.cat(views)[:count], run.settings.view)
    return outputs, targets | {name: table[name] for name in names}


def shape_outputs(run: Run, count: int, seed: int) -> tuple[NetworkOutputs, dict[str, np.ndarray]]:
    made = make_shapes(count, run.settings.view.resolution, seed)
    return network_outputs(run.network, made.images, run.settings.view), regression_targets(made.factors)
