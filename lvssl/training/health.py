"""Health of the latent: figures of its posteriors in a batch, and what to do when they are bad.

    active_units     parts of the code (bits, dimensions, groups) whose KL is above 0.01 nats on average
    units            number of these parts
    dead_bits        bits of the code that are on for under 1 %, or over 99 %, of the batch
    bits_per_unit    KL of a unit in bits: for a Bernoulli, 1 - entropy
    saturated        share of logits whose gradient has vanished, or of scales at their bounds
    logit_scale      standard deviation of the locations (logits, means) over the batch, mean over dimensions
    scale_variation  the same for the scale parameters (ln s^2, ln kappa ...)

Rate and distortion are figures of the objective.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvssl.codes.statistics import DEAD_BELOW
from lvssl.losses.objective import batch_mean
from lvssl.models.network import LVNet, Outputs
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import read_config

ACTIVE_NATS = 0.01
SETTLED = 0.2  # share of the training after which a scale that doesn't vary raises an alarm
FIGURES = (
    "active_units", "units", "dead_bits", "bits_per_unit", "saturated", "logit_scale", "scale_variation",
)  # fmt: skip


@torch.no_grad()
def health(network: LVNet, outputs: Outputs) -> dict[str, Tensor]:
    """Return the figures of a batch as scalars on its device, without waiting. Empty without a latent."""
    posterior, family = outputs.posterior, network.family
    if not family.stochastic:
        return {}
    unit_kl = batch_mean(posterior.unit_kl())  # over all ranks: the figures are those of the whole batch
    on = batch_mean(posterior.code().float())
    locations, scales = outputs.parameters.float().tensor_split([family.location_count(network.dim)], dim=1)
    figures = {
        "active_units": (unit_kl > ACTIVE_NATS).sum(),
        "units": torch.full((), len(unit_kl), device=unit_kl.device),  # a copy from the host would wait
        "dead_bits": ((on < DEAD_BELOW) | (on > 1 - DEAD_BELOW)).sum(),
        "bits_per_unit": unit_kl.mean() / math.log(2),
        "saturated": posterior.saturated(),
        "logit_scale": deviation(locations).mean(),
    }
    if network.head.scale is not None:
        figures["scale_variation"] = deviation(scales).mean()
    return {name: figure.float() for name, figure in figures.items()}


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of each column of x [N, D] over the batch of all ranks, [D]."""
    return batch_mean((x - batch_mean(x)).square()).sqrt()


def alarms(row: dict[str, Any], fraction: float) -> dict[str, str]:
    """Return what a row of metrics.jsonl shows to be wrong, and a remedy; `fraction` of training is done."""
    found = {}
    units, active = row.get("units", 0), row.get("active_units", 0)
    if units and active < 0.05 * units:
        found["posterior collapse"] = (
            f"{active:.0f} of {units:.0f} units are active ({row.get('rate_bits', 0):.2f} bits per image); "
            "lower --beta, or raise --free-nats or --init-scale"
        )
    if row.get("saturated", 0) > 0.9:
        share = 100 * row["saturated"]
        found["saturation"] = (
            f"{share:.0f} % of the posteriors are at their bounds and learn nothing; lower --init-scale"
        )
    if fraction >= SETTLED and row.get("scale_variation", math.inf) < 1e-3:
        found["constant scale"] = (
            f"the scale hardly differs between images (by {row['scale_variation']:.1e} in its logarithm): "
            "it carries no uncertainty information; lower --beta or use --posterior-scale fixed"
        )
    return found


def warn(row: dict[str, Any], fraction: float, known: set[str]) -> None:
    """Print one line on stderr for each alarm that isn't in `known`, and add it."""
    for name, said in alarms(row, fraction).items():
        if name not in known:
            print(f"warning: step {row['step']}: {name}: {said}", file=sys.stderr, flush=True)
            known.add(name)


def examine(folder: Path) -> int:
    """Print a run's last figures and its alarms; return 1 if there are any, else 0.

    Raises:
        InputError: the folder is no run.
    """
    settings, _ = read_config(folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "units" in row]
    if not rows:
        latent = settings.latent.distribution.stochastic
        nothing = "no figures are logged yet" if latent else "no latent to check"
        print(f"{folder}: {nothing} (family {settings.latent.family})")
        return 0
    row = rows[-1]
    print(f"{folder}: family {settings.latent.family}, step {row['step']}")
    for name in ("rate_bits", "distortion", *FIGURES):
        if name in row:
            print(f"  {name:18}{row[name]:10.3f}")
    found = alarms(row, row.get("epoch", 0) / settings.epochs)
    for name, what in found.items():
        print(f"ALARM {name}: {what}")
    if not found:
        print("no alarms")
    return 1 if found else 0
