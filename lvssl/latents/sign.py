"""Family `sign`: no latent, but decorrelated sign bits of h. It is the fair control for every binary code."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvssl.latents.deterministic import Deterministic, DeterministicPosterior
from lvssl.latents.posterior import BatchMean, rows_mean

INIT_SCALE = 4.0  # of the surrogate gradient; the default of Bernoulli


def straight_through_signs(features: Tensor, batch_mean: BatchMean = rows_mean) -> Tensor:
    """Sign bits of h [N, D] about its batch mean, as +-1, with the gradient of tanh(init_scale / 2 * z).

    z is h, standardised over the batch. `batch_mean`: [N, D] -> [D], over the batch of all ranks.
    """
    centred = features - batch_mean(features)
    deviation = batch_mean(centred.square()).sqrt()
    soft = (0.5 * INIT_SCALE * centred / (deviation + 1e-6)).tanh()
    return torch.where(centred > 0, 1.0, -1.0) + (soft - soft.detach())


@dataclass(frozen=True)
class Sign(Deterministic):
    """The family `none` with bits that the decorrelation penalty can shape."""

    about = "no latent, its sign bits decorrelated"
    own_code = True
    unread = ("clean_path_weight",)

    def posterior(self, parameters: Tensor) -> "SignPosterior":
        return SignPosterior(parameters)


class SignPosterior(DeterministicPosterior):
    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor:
        return straight_through_signs(self.features, batch_mean)
