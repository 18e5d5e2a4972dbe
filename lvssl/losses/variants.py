"""Other contrastive losses on the same tiles: any batch, any device, any number of ranks, as `ntxent`."""

import math

import torch
import torch.nn.functional as F
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
    return finite(distributed.total((denominators - positives).sum()) / sum(counts), projections)


def supervised_contrastive(projections: Tensor, labels: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Each anchor's positives are all other vectors of its class (Khosla et al. 2020, eq. 2, "out").

    The mean over an anchor's positives of v_i . v_p is v_i . (sum of its class - v_i) / (size - 1), so that
    only the denominators need a walk over all pairs.

    Args:
        projections, temperature: as for `ntxent`.
        labels: [B], classes of the images from 0 on, integers; the same for both views.
    """
    counts = checked(projections, temperature)
    if labels.shape != (len(projections) // 2,) or labels.is_floating_point():
        wanted = f"[{len(projections) // 2}] integers"
        raise ValueError(f"labels must be {wanted}, got {tuple(labels.shape)} of {labels.dtype}")
    denominators, _ = anchors(projections, temperature, counts)
    labels = labels.repeat(2)
    classes = distributed.highest(int(labels.max()) + 1 if len(labels) else 0)
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections.to(denominators.dtype), dim=1)
        sums = distributed.total(unit.new_zeros(classes, unit.shape[1]).index_add(0, labels, unit))
        sizes = distributed.total(torch.bincount(labels, minlength=classes).to(unit.dtype))
        to_class = (unit * (sums[labels] - unit)).sum(1) / ((sizes[labels] - 1) * temperature)
    return finite(distributed.total((denominators - to_class).sum()) / sum(counts), projections)


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
    return finite(distributed.total(-likelihood.sum()) / sum(counts), samples.flatten(0, 1))
