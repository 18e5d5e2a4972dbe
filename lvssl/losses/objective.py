"""The parts of the objective besides the contrastive loss: rate, its weight, and decorrelation of bits."""

import torch
from torch import Tensor

from lvssl.losses.distributed import all_reduce_sum, ranks


def rate(kl: Tensor, free_nats: float = 0.0) -> Tensor:
    """Return mean_b max(KL_b, free_nats) over all views' posteriors, a scalar in nats.

    For the concatenated KL of both views ([2B]) this is 1/2 sum_v mean_b max(KL_vb, free).
    """
    return kl.clamp(min=free_nats).mean()


def beta_at(
    fraction: float, beta: float, warmup: float = 0.1, schedule: str = "warmup", cycles: int = 4
) -> float:
    """Return beta(t), the weight of the rate.

    Args:
        fraction: share of the training that is done, in [0, 1].
        schedule: constant; warmup, linear from 0 over the first `warmup` share of the training; or cyclical,
            linear from 0 over the first half of each of `cycles`, then constant (Fu et al. 2019).
    """
    if schedule == "cyclical":
        within = fraction * cycles % 1.0 if fraction < 1 else 1.0
        return beta * min(1.0, 2 * within)
    if schedule == "constant" or warmup <= 0:
        return beta
    return beta * min(1.0, fraction / warmup)


def batch_mean(x: Tensor) -> Tensor:
    """Mean over the batch of all ranks, [N, D] -> [D], N on each; the gradient is scaled for DDP's mean."""
    return all_reduce_sum(x.sum(dim=0)) / (len(x) * ranks())


def decorrelation(bits: Tensor) -> Tensor:
    """1/D sum_{i != j} C_ij^2, with C the covariance over the batch of bits as +-1 ([N, D], differentiable).

    The batch is that of all ranks, N on each; the gradient is scaled for DDP's mean, as in `ntxent`.
    """
    bits = bits.to(torch.promote_types(bits.dtype, torch.float32))
    centred = bits - batch_mean(bits)
    with torch.autocast(bits.device.type, enabled=False):
        covariance = all_reduce_sum(centred.T @ centred) / (len(bits) * ranks())
    diagonal = covariance.diagonal()
    return (covariance.square().sum() - diagonal.square().sum()) / bits.shape[1]
