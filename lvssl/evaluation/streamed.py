"""A linear probe for sets that don't fit in memory, fitted by stochastic gradients on rows as they are read.

The objective is that of `lvssl.evaluation.probe`: mean cross entropy + strength / 2 * |W|^2 on standardised
features. All strengths are trained at once, on the same rows.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lvssl.evaluation.knn import WHY_NOT_FINITE
from lvssl.evaluation.probe import ProbeResult, linear_probe
from lvssl.runs.progress import with_progress
from lvssl.settings.stages import LinearSettings
from pipelines.errors import InputError
from pipelines.kernels.pack import unpack_bits

EPOCHS, STEPS = 10, 5000  # minimum of both; for a million images the epochs need more steps
BATCH, LR = 1024, 1e-2  # of Adam; the learning rate follows a cosine to 0
STRENGTHS = (1e-1, 1e-2, 1e-3)  # the same as for the exact probe
TINY = 1e-30  # limit for gradients of logits, whose sums are about 1e-7 or more
PAGE = 16  # rows that are read together: 128 KB for 2,048 features
HELD_OUT, MOST_HELD_OUT = 0.15, 50_000  # share of the pages, and maximum of rows, used to choose the strength
CHUNK = 8192  # rows at a time when all are read


def protocol(epochs: int = 0) -> str:
    """Describe how the probe is fitted, for the result."""
    length = f"{epochs} epochs" if epochs else f"{EPOCHS} epochs, {STEPS:,} steps at least,"
    return (
        f"sgd: Adam, {length} in batches of {BATCH:,}, learning rate {LR} along a cosine; L2 strength chosen "
        f"on {HELD_OUT:.0%} of the training images, {MOST_HELD_OUT:,} at most, which are not learnt from"
    )


class Rows(Protocol):
    """Features of N images of which some rows are read at a time: an array, a mapped file, or `Bits`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Bits:
    """Packed codes as float32 features: 1 for a bit that is on, `off` for one that isn't."""

    def __init__(self, packed: np.ndarray, bits: int, off: float = 0.0) -> None:
        self.packed, self.shape, self.off = packed, (len(packed), bits), off

    def __getitem__(self, rows: Any) -> np.ndarray:
        return unpack_bits(self.packed[rows], self.shape[1]).astype(np.float32) * (1 - self.off) + self.off


def streamed_probe(
    train_x: Rows,
    train_y: np.ndarray,
    test_x: Rows,
    test_y: np.ndarray,
    *,
    epochs: int = 0,
    batch: int = BATCH,
    seed: int = 0,
    device: torch.device | None = None,
) -> ProbeResult:
    """Fit as `linear_probe` does on train_x [N, D] and labels int64 [N], in memory that doesn't depend on N.

    Pages of rows are drawn by `seed`, in a new order in each epoch. `epochs` = 0 means EPOCHS, or more to
    reach STEPS steps. `device` is where to compute, by default the CPU. Raises FloatingPointError for values
    that are not finite, InputError for labels of a single class, or at most PAGE images.
    """
    device = device or torch.device("cpu")
    classes, y = np.unique(train_y, return_inverse=True)
    if len(classes) < 2:
        raise InputError("a probe needs training labels of at least two classes")
    if len(y) <= PAGE:
        raise InputError(
            f"the streamed probe needs more than {PAGE} training images, not {len(y)}: use --probe logistic"
        )
    mean, scale = (part.to(device) for part in standardisation(train_x))
    learnt, held = pages(len(y), seed)
    weight = torch.zeros(train_x.shape[1], len(STRENGTHS), len(classes), device=device, requires_grad=True)
    bias = torch.zeros(len(STRENGTHS), len(classes), device=device, requires_grad=True)
    strengths = torch.tensor(STRENGTHS, device=device)

    def logits(x: Rows, rows: Any) -> Tensor:
        values = (torch.from_numpy(np.asarray(x[rows], np.float32)).to(device) - mean) * scale
        return (values @ weight.flatten(1)).unflatten(1, bias.shape) + bias

    optimiser = torch.optim.Adam([weight, bias], lr=LR)
    in_an_epoch = -(-len(learnt) // (batch // PAGE))
    epochs = epochs or max(EPOCHS, -(-STEPS // in_an_epoch))
    steps = epochs * in_an_epoch
    batches = with_progress(drawn(learnt, len(y), epochs, batch, seed), "linear probe", epochs * len(y), len)
    for step, rows in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        answers = torch.from_numpy(y[rows]).to(device).repeat_interleave(len(STRENGTHS))
        found = logits(train_x, rows).flatten(0, 1)
        found.register_hook(without_subnormals)
        entropy = torch.nn.functional.cross_entropy(found, answers, reduction="sum")
        loss = entropy / len(rows) + (strengths / 2 * weight.square().sum(dim=(0, 2))).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = torch.zeros(len(STRENGTHS), device=device)
        for rows in drawn(held, len(y), 1, CHUNK, seed):
            right += (logits(train_x, rows).argmax(2) == torch.from_numpy(y[rows]).to(device)[:, None]).sum(0)
        best = int(right.argmax())  # the stronger one if equal
        parts = [
            logits(test_x, slice(start, start + CHUNK))[:, best].softmax(1).cpu()
            for start in range(0, test_x.shape[0], CHUNK)
        ]
    probabilities = torch.cat(parts).numpy()
    predictions = classes[probabilities.argmax(axis=1)]
    accuracy = round(100 * float((predictions == test_y).mean()), 4)
    return ProbeResult(accuracy, STRENGTHS[best], classes, predictions, probabilities)


def probed(
    settings: LinearSettings,
    probe: str,
    train: tuple[Rows, np.ndarray],
    test: tuple[Rows, np.ndarray],
    device: torch.device,
) -> tuple[ProbeResult, dict[str, Any]]:
    """Fit the probe `streamed` (on the device) or `logistic` on features and labels. Returns it with entries
    for the result."""
    seed, epochs = settings.seed, settings.probe_epochs
    if probe == "streamed":
        found = streamed_probe(*train, *test, epochs=epochs, seed=seed, device=device)
        return found, {"regularisation": found.regularisation, "protocol": protocol(epochs)}
    (x, y), (test_x, test_y) = train, test
    found = linear_probe(x[:], y, test_x[:], test_y, seed=seed, title="linear: fits of the probe")
    return found, {"regularisation": found.regularisation}


def without_subnormals(gradients: Tensor) -> Tensor:
    """Replace values too small to change any sum by 0. If classes are well separated, most probabilities are
    near fp32's smallest number, and a CPU multiplies those up to twenty times as slowly: steps took 0.87 s
    instead of 0.21 (1,000 classes, 2,048 features)."""
    return torch.nn.functional.hardshrink(gradients, TINY)


def standardisation(x: Rows) -> tuple[Tensor, Tensor]:
    """Return (mean, scale) float32 [D]: (x - mean) * scale has deviation 1; a constant column becomes 0.
    Raises FloatingPointError, which names the row, for a value that isn't finite."""
    count, width = x.shape
    shift = np.asarray(x[:CHUNK], np.float64).mean(axis=0)  # near the mean, so that squares don't cancel
    total, squares = np.zeros(width), np.zeros(width)
    for start in range(0, count, CHUNK):
        part = np.asarray(x[start : start + CHUNK], np.float64)
        if not (sound := np.isfinite(part).all(axis=1)).all():
            row = start + int(sound.argmin())
            raise FloatingPointError(f"train: row {row} holds a value that isn't finite: {WHY_NOT_FINITE}")
        part -= shift
        total += part.sum(axis=0)
        squares += np.einsum("nd,nd->d", part, part)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    mean += shift
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(scale.astype(np.float32))


def pages(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the pages to train on and those to choose the strength on, by `seed`; returns their numbers."""
    everything = np.random.default_rng(seed).permutation(-(-count // PAGE))
    held = max(1, min(round(HELD_OUT * len(everything)), MOST_HELD_OUT // PAGE))
    return np.sort(everything[held:]), np.sort(everything[:held])


def drawn(which: np.ndarray, count: int, epochs: int, batch: int, seed: int) -> Any:
    """Yield batches of rows int64 [<= batch] from the pages `which`, in a new order in each epoch."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(which)
        for start in range(0, len(order), batch // PAGE):
            rows = (order[start : start + batch // PAGE, None] * PAGE + np.arange(PAGE)).ravel()
            yield rows[rows < count]
