"""Family `bernoulli`: independent bits z ~ Bern(p), p = sigmoid(logit), prior Bern(1/2)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lvssl.latents.noise import Noise, uniform
from lvssl.latents.posterior import BatchMean, Family, Posterior, constant, rows_mean


@dataclass(frozen=True)
class Bernoulli(Family):
    """`parameters` are the logits, [B, D].

    Samples are hard bits with the straight-through gradient of p. If `relaxed`, they follow the binary
    concrete distribution (Maddison et al. 2017, Jang et al. 2017), whose sign is the hard bit. In both cases
    `kl` is that of the discrete distribution; the KL of the relaxed one is larger.
    """

    relaxed: bool = False

    about = "a Bernoulli latent"
    signs = True
    discrete = True
    default_beta = 0.0

    @property
    def fused(self) -> bool:
        return not self.relaxed

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        return constant(dim, init_scale), constant(0, 0.0)

    def posterior(self, parameters: Tensor) -> "BernoulliPosterior":
        return BernoulliPosterior(parameters, self.relaxed)


class BernoulliPosterior(Posterior):
    def __init__(self, parameters: Tensor, relaxed: bool) -> None:
        super().__init__(parameters)
        self.logits, self.relaxed = self.parameters, relaxed

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw 2z - 1: in {-1, +1}, with z = b + p - stop_grad(p), or in (-1, 1) if relaxed."""
        p, logits = self.logits.sigmoid(), self.logits
        drawn = uniform((count, *p.shape), p, noise)
        if self.relaxed:
            logistic = drawn.clamp(min=2**-25).logit()
            return (0.5 / temperature * (logits + logistic)).tanh()
        bits = (drawn < p).to(p.dtype)
        return 2 * (bits + (p - p.detach())) - 1  # (p - p) is exactly 0, so the value is exactly +-1

    def mean(self) -> Tensor:
        return (0.5 * self.logits).tanh()  # 2p - 1

    def unit_kl(self) -> Tensor:
        """p * l - softplus(l) + ln 2 for each bit; exact and finite for any finite logit."""
        return math.log(2) - self.unit_entropy()

    def unit_entropy(self) -> Tensor:
        """Entropy of each bit in nats, [B, D].

        softplus(l) - p * l is an even function of l. It is computed as softplus(-|l|) + |l| * sigmoid(-|l|),
        which doesn't subtract two large numbers of the same size.
        """
        size = self.logits.abs()
        return F.softplus(-size) + size * torch.sigmoid(-size)

    def entropy(self) -> Tensor:
        return self.unit_entropy().sum(dim=1)

    def saturated(self) -> Tensor:
        """Share of logits beyond +-7, where the gradient of p is below a thousandth."""
        return (self.logits.abs() > 7).float().mean()

    def code(self) -> Tensor:
        return self.logits > 0

    def bit_means(self) -> Tensor:
        return self.logits.sigmoid()

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor:
        """The hard bits as +-1 with the gradient of 2p - 1: [B, D]."""
        soft = self.mean()
        return torch.where(self.logits > 0, 1.0, -1.0) + (soft - soft.detach())
