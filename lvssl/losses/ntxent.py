"""NT-Xent (Chen et al. 2020, eq. 1): one function for any device and number of ranks, and its reference.

    form         where                                                            file
    reference    the definition; small batches on one process                     here
    chunked      larger ones on a CPU, or on a GPU without Triton                 chunked.py
    Triton       CUDA, fp32, fp16 and bf16                                        gpu.py
    distributed  one of the latter two on each rank, when a process group exists  distributed.py

The fast forms share one autograd function, in `anchors.py`, and are tested against the reference.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lvssl.losses import distributed
from lvssl.losses.anchors import EPS, anchors

# Number of vectors from which the fast form is faster on a CPU (python -m benchmarks.loss --crossover).
FAST_FROM = 512


def ntxent(projections: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Normalised-temperature cross-entropy: each of 2B anchors must pick its other view among 2B - 1.

    If a process group exists, the 2B vectors are those of all ranks: every rank passes its own (their numbers
    may differ and be 0) and gets the loss of the whole batch. The gradient is scaled for DDP's *mean* over
    ranks, so that parameter gradients equal those of one process with all the vectors.

    For second derivatives and `torch.func`, which the fast forms don't have, use `reference`.

    Args:
        projections: [2B, d], the first views of B images, then their second views; any float type, any norm
            up to 1e18 (a zero vector counts as orthogonal to all others, and gets no gradient).
        temperature: above 0; a tensor with one element can be learnt.

    Returns:
        Scalar in fp32 (fp64 for fp64 input), in nats: the mean over the 2B anchors. It certifies at most
        ln(2B - 1) nats of mutual information between the views.

    Raises:
        ValueError: an odd number of vectors, no vectors, no floats, a temperature that isn't positive, or
            ranks that disagree on d, type or temperature; raised on every rank.
        FloatingPointError: a vector is NaN or infinite (on a CPU; on a GPU, where a check would make the host
            wait for the device, the loss is NaN).
    """
    counts = checked(projections, temperature)
    if len(counts) == 1 and not fast(projections):
        loss = reference(projections, temperature)
    else:
        denominators, positives = anchors(projections, temperature, counts)
        loss = distributed.all_reduce_sum((denominators - positives).sum()) / sum(counts)
    return finite(loss, projections)


def reference(projections: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Compute NT-Xent by its definition, from the whole [2B, 2B] matrix of these vectors alone.

    Arguments are those of `ntxent`.
    """
    if projections.dtype != torch.float64:
        projections = projections.float()
    with torch.autocast(projections.device.type, enabled=False):
        without_direction = projections.norm(dim=1, keepdim=True) <= EPS
        unit = F.normalize(projections, dim=1).masked_fill(without_direction, 0)
        logits = unit @ unit.T / temperature
    count = len(logits)
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=logits.device), float("-inf"))
    positives = torch.arange(count, device=logits.device).roll(count // 2)
    return F.cross_entropy(logits, positives)


def fast(projections: Tensor) -> bool:
    """Whether the fast form is worth its fixed cost; on a GPU always, because it never holds the matrix."""
    return len(projections) >= FAST_FROM or projections.is_cuda


def checked(projections: Tensor, temperature: float | Tensor, name: str = "projections") -> list[int]:
    """Return the number of anchors of each rank; ValueError, on every rank, if one's arguments are wrong."""
    several = distributed.ranks() > 1
    problem = validation_error(projections, temperature, name, several)
    if several:
        return distributed.check_arguments_across_ranks(projections, known(temperature), name, problem)
    if problem:
        raise ValueError(problem)
    return [len(projections)]


def validation_error(projections: Tensor, temperature: float | Tensor, name: str, may_be_empty: bool) -> str:
    """Describe what is wrong with the arguments; empty if nothing is."""
    shape = tuple(projections.shape)
    if projections.ndim != 2 or shape[0] % 2 or shape[1] < 1 or (shape[0] == 0 and not may_be_empty):
        return f"{name} must be [2B, d] with B >= 1: the first views, then the second; got shape {shape}"
    if not projections.is_floating_point():
        return f"{name} must be floats, got {projections.dtype}"
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        return f"temperature must have one element, got shape {tuple(temperature.shape)}"
    value = known(temperature)
    if value is not None and not (value > 0 and math.isfinite(value)):
        return f"temperature must be positive and finite, got {value}"
    return ""


def known(temperature: float | Tensor) -> float | None:
    """Return the temperature's value, or None if reading it would make the host wait for a device."""
    if not isinstance(temperature, Tensor):
        return float(temperature)
    if temperature.is_cuda or torch.compiler.is_compiling():
        return None
    return temperature.item()


def finite(loss: Tensor, projections: Tensor, name: str = "NT-Xent") -> Tensor:
    """Return the loss; if it isn't finite, raise FloatingPointError with the vectors at fault (on a CPU)."""
    if projections.is_cuda or torch.compiler.is_compiling() or math.isfinite(loss.item()):
        return loss
    rows = (~projections.detach().isfinite()).any(dim=1).nonzero().flatten().tolist()
    where = f"{len(rows)} of {len(projections)} vectors are not finite"
    where += f", the first in row {rows[0]}: {projections[rows[0]].tolist()[:4]}" if rows else ""
    if distributed.ranks() > 1:
        where = f"rank {torch.distributed.get_rank()}: {where}"
    raise FloatingPointError(f"{name} is {loss.item()}; projections: {where}")
