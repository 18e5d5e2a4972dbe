"""Losses of random vectors other than NT-Xent: soft matching, and samples against directions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lvssl.losses import distributed


def match_loss(samples: Tensor, match_parameters: Tensor) -> Tensor:
    """Soft contrastive loss of hedged instance embeddings (Oh et al. 2019, eq. 2-5).

    With p(match | x_i, x_j) = 1/K^2 sum_kl sigmoid(b - a |z_ik - z_jl|), the loss is -log p for the two views
    of an image and -log(1 - p) for views of two images. Both kinds have the same weight, as in the paper's
    balanced pairs. All K^2 N^2 distances are held at once. Each rank compares its own images alone.

    Args:
        samples: [K, 2B, d], K draws from each vector's posterior: first views, then second views; B >= 2.
        match_parameters: [2], learnt: a = softplus(match_parameters[0]) > 0 and b = match_parameters[1].

    Returns:
        Scalar in nats.

    Raises:
        ValueError: samples of another shape, or of one image alone.
    """
    k, n = checked(samples)
    if n < 4:
        raise ValueError(f"samples must be of two images at least, got {n // 2}: nothing to tell apart")
    with torch.autocast(samples.device.type, enabled=False):
        z = samples.float().flatten(0, 1)
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        a, b = F.softplus(match_parameters[0]), match_parameters[1]
        logits = (b - a * distances).view(k, n, k, n).transpose(1, 2).flatten(0, 1)
        # log p and log(1 - p), each a mean over K^2 inside the logarithm: [N, N].
        alike, unlike = (F.logsigmoid(sign * logits).logsumexp(dim=0) - 2 * math.log(k) for sign in (1, -1))
    first = torch.arange(n // 2, device=z.device)
    return -alike[first, first + n // 2].mean() - unlike.gather(1, other_images(n, z.device)).mean()


def other_images(n: int, device: torch.device) -> Tensor:
    """Return the other images' views for each of n = 2B views, ascending, int64 [n, n - 2]. A mask would do,
    but only the device knows how many numbers it selects, and the host would wait for it."""
    view = torch.arange(n, device=device)[:, None]
    partner = view.roll(n // 2, 0)
    found = torch.arange(n - 2, device=device) + (torch.arange(n - 2, device=device) >= view.minimum(partner))
    return found + (found >= view.maximum(partner))


def sample_infonce(samples: Tensor, directions: Tensor, kappa: float) -> Tensor:
    """InfoNCE of samples against directions: the second term of C-SimCLR (Lee et al. 2021, eq. 8).

        -log exp(kappa z_i . r_i') / (1/(N - 1) sum_{j != i} exp(kappa z_i . r_j)),  plus log(N - 1)

    averaged over K and i. r_i' is the mean direction of i's other view, and N the number of vectors of all
    ranks, whose directions are gathered with gradient. As in `ntxent`, anchors see both views of all others.

    Args:
        samples: [K, 2B, d] unit vectors drawn from the forward encoder: first views, then second views.
        directions: [2B, d] unit vectors, the means of the backward encoder b(z | y).
        kappa: concentration of the backward encoder, above 0.
    """
    _, n = checked(samples)
    with torch.autocast(samples.device.type, enabled=False):
        candidates, start = gathered(directions.float())
        logits = kappa * samples.float() @ candidates.T  # [K, N, all]
    own = start + torch.arange(n, device=logits.device)
    itself = own[:, None] == torch.arange(len(candidates), device=logits.device)
    partner = start + torch.arange(n, device=logits.device).roll(n // 2)
    losses = F.cross_entropy(
        logits.masked_fill(itself, float("-inf")).flatten(0, 1), partner.repeat(len(samples)), reduction="sum"
    )
    return distributed.all_reduce_sum(losses) / (len(samples) * len(candidates))


def gathered(vectors: Tensor) -> tuple[Tensor, int]:
    """Gather the vectors of all ranks, with gradient; also return where this rank's begin."""
    if distributed.ranks() == 1:
        return vectors, 0
    # An exchange between the hosts, which doesn't wait for a device.
    sizes = distributed.check_arguments_across_ranks(vectors, None, "directions", "")
    start = sum(sizes[: torch.distributed.get_rank()])
    return distributed.all_reduce_sum(F.pad(vectors, (0, 0, start, sum(sizes) - start - len(vectors)))), start


def checked(samples: Tensor) -> tuple[int, int]:
    """Return K and N of [K, N, d]; ValueError for another shape."""
    if samples.ndim != 3 or not len(samples) or not samples.shape[1] or samples.shape[1] % 2:
        raise ValueError(f"samples must be [K, 2B, d] with K, B >= 1, got shape {tuple(samples.shape)}")
    return samples.shape[0], samples.shape[1]
