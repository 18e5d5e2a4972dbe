"""Family `gaussian`: z ~ N(mu, s^2), prior N(0, 1) in every dimension (Kingma & Welling 2014)."""

import math
from dataclasses import dataclass

from torch import Tensor

from lvssl.latents.noise import Noise, normal
from lvssl.latents.posterior import constant
from lvssl.latents.quantised import Quantised, QuantisedPosterior

LOG_VARIANCE_BOUND = 10.0


@dataclass(frozen=True)
class Gaussian(Quantised):
    """`parameters` is [B, 2D]: mu, then ln s^2, which is clamped to [-10, 10]. The code is mu, quantised."""

    about = "a Gaussian latent"
    fused = True

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Start with s = 1 / init_scale and means of unit standard deviation."""
        return constant(dim, 1.0), constant(dim, -2 * math.log(init_scale))

    def posterior(self, parameters: Tensor) -> "GaussianPosterior":
        return GaussianPosterior(parameters, self.depth)


class GaussianPosterior(QuantisedPosterior):
    def __init__(self, parameters: Tensor, depth: int) -> None:
        super().__init__(parameters, depth)
        self.mu, log_variance = self.parameters.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        drawn = normal((count, *self.mu.shape), self.mu, noise)
        return self.mu + (0.5 * self.log_variance).exp() * drawn

    def mean(self) -> Tensor:
        return self.mu

    def unit_kl(self) -> Tensor:
        """(mu^2 + s^2 - 1 - ln s^2) / 2 in each dimension."""
        return 0.5 * (self.mu.square() + self.log_variance.exp() - 1 - self.log_variance)

    def entropy(self) -> Tensor:
        return 0.5 * (math.log(2 * math.pi * math.e) + self.log_variance).sum(dim=1)

    def saturated(self) -> Tensor:
        """Share of variances at their bounds."""
        return (self.log_variance.abs() >= LOG_VARIANCE_BOUND).float().mean()

    def uncertainty(self) -> Tensor:
        """Sum of ln s^2, twice the entropy up to a constant."""
        return self.log_variance.sum(dim=1)
