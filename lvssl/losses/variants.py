"""Other contrastive losses on the same tiles: any batch, any device, any number of ranks, as `ntxent`."""

import math

import torch
from torch import Tensor

from lvssl.losses import distributed
from lvssl.losses.anchors import anchors
from lvssl.losses.ntxent import checked, finite


def decoupled_ntxent(projections: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """NT-Xent without the positive in its anchor's denominator (Yeh et al. 2022, "DCL").

    Arguments, result and errors as for `ntxent`; two images at least, for there to be negatives.
    """
    counts = checked(projections, temperature)
    if sum(counts) < 4:
        raise ValueError(f"projections must hold two images at least, got {sum(counts) // 2}: no negatives")
    denominators, positives = anchors(projections, temperature, counts, decoupled=True)
    return finite(distributed.all_reduce_sum((denominators - positives).sum()) / sum(counts), projections)


def mc_infonce(samples: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """InfoNCE of vectors that are random, the expectation within the logarithm (Kirchhof et al. 2023, eq. 6).

        -log 1/K sum_k exp(positive_ik - denominator_ik), averaged over the anchors i

    which is theirs up to the constant log(2B - 1). Samples of the same k are compared with one another.

    Args:
        samples: [K, 2B, d], K draws from each vector's posterior; otherwise as `ntxent`'s projections.
        temperature: 1 / kappa, above 0.
    """
    if samples.ndim != 3 or not len(samples):
        raise ValueError(f"samples must be [K, 2B, d] with K >= 1, got shape {tuple(samples.shape)}")
    counts = checked(samples[0], temperature, "samples")
    agreement = []
    for drawn in samples:
        denominators, positives = anchors(drawn, temperature, counts)
        agreement.append(positives - denominators)
    likelihood = torch.stack(agreement).logsumexp(0) - math.log(len(samples))
    return finite(distributed.all_reduce_sum(-likelihood.sum()) / sum(counts), samples.flatten(0, 1))
