"""Family `sign`: no latent, but h's sign bits are decorrelated. The fair control of every binary code."""

import torch
from torch import Tensor

from lvssl.latents.deterministic import Deterministic

SHARPNESS = 4.0  # of the surrogate gradient, as Bernoulli's default


class Sign(Deterministic):
    """As `none`, with bits that the decorrelation penalty can shape."""

    def straight_through_bits(self) -> Tensor:
        """Sign bits of h about its batch mean, as +-1, with the gradient of tanh(sharpness / 2 * z-score)."""
        centred = self.features - self.features.mean(dim=0)
        soft = (0.5 * SHARPNESS * centred / (centred.std(dim=0) + 1e-6)).tanh()
        return torch.where(centred > 0, 1.0, -1.0) + (soft - soft.detach())
