"""Other losses of two views. Like `ntxent`, they take any batch, device and number of ranks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lvssl.losses import distributed
from lvssl.losses.anchors import anchors
from lvssl.losses.ntxent import checked, finite


def decoupled_ntxent(projections: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """NT-Xent without the positive in its anchor's denominator (Yeh et al. 2022, "DCL").

    Arguments, result and errors are as for `ntxent`; negatives take at least two images.
    """
    counts = checked(projections, temperature)
    if sum(counts) < 4:
        raise ValueError(f"projections must hold two images at least, got {sum(counts) // 2}: no negatives")
    denominators, positives = anchors(projections, temperature, counts, decoupled=True)
    return finite(distributed.all_reduce_sum((denominators - positives).sum()) / sum(counts), projections)


def mc_infonce(samples: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """InfoNCE of random vectors, with the expectation inside the logarithm (Kirchhof et al. 2023, eq. 6).

        -log 1/K sum_k exp(positive_ik - denominator_ik), averaged over the anchors i

    This is the paper's up to the constant log(2B - 1). Samples of the same k are compared with one another.

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


class Vicreg(NamedTuple):
    """The parts of VICReg, scalars in fp32 (fp64 for fp64 input); the published weights are 25, 25, 1."""

    invariance: Tensor  # mean squared difference of the two views
    variance: Tensor  # mean over dimensions and views of max(0, 1 - deviation)
    covariance: Tensor  # sum of the two views' squared covariances off the diagonal, divided by d


def vicreg(projections: Tensor) -> Vicreg:
    """Compute invariance, variance and covariance of the unnormalised vectors (Bardes et al. 2022).

    Means and covariances are over each view's vectors on all ranks; the gradient is scaled for DDP's mean, as
    in `ntxent`. 1e-4 is added to the square of a deviation. As in the authors' code, the variance is a mean
    over the two views, where their equation 6 has a sum.

    Arguments and errors are as for `ntxent`; at least two images are needed.
    """
    count = sum(checked(projections, 1.0)) // 2
    if count < 2:
        raise ValueError(f"projections must hold two images at least, got {count}: no variance")
    total = distributed.all_reduce_sum
    with torch.autocast(projections.device.type, enabled=False):
        x = projections.to(torch.promote_types(projections.dtype, torch.float32))
        x = x.unflatten(0, (2, len(x) // 2))
        apart = total((x[0] - x[1]).square().sum()) / (count * x.shape[2])
        centred = x - total(x.sum(dim=1, keepdim=True)) / count
        covariances = total(centred.mT @ centred) / (count - 1)  # [2, d, d]
        variances = covariances.diagonal(dim1=1, dim2=2)
        low = (1 - (variances + 1e-4).sqrt()).relu().mean()
        off_diagonal = (covariances.square().sum() - variances.square().sum()) / x.shape[2]
    return Vicreg(finite(apart, projections, "the distance of the views"), low, off_diagonal)
