"""Family `laplace`: z ~ Laplace(mu, s), prior Laplace(0, 1) in every dimension, sparser than a Gaussian."""

import math
from dataclasses import dataclass

from torch import Tensor

from lvssl.latents.noise import Noise, uniform
from lvssl.latents.posterior import constant
from lvssl.latents.quantised import Quantised, QuantisedPosterior

LOG_SCALE_BOUND = 5.0


@dataclass(frozen=True)
class Laplace(Quantised):
    """`parameters` is [B, 2D]: mu, then ln s, which is clamped to [-5, 5]. The code is mu, quantised."""

    about = "a Laplace latent"

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        return constant(dim, 1.0), constant(dim, -math.log(init_scale))

    def posterior(self, parameters: Tensor) -> "LaplacePosterior":
        return LaplacePosterior(parameters, self.depth)


class LaplacePosterior(QuantisedPosterior):
    def __init__(self, parameters: Tensor, depth: int) -> None:
        super().__init__(parameters, depth)
        self.mu, log_scale = self.parameters.chunk(2, dim=1)
        self.log_scale = log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw mu + s * noise, with the noise by inversion."""
        centred = uniform((count, *self.mu.shape), self.mu, noise).clamp(min=2**-25) - 0.5
        drawn = -centred.sign() * (1 - 2 * centred.abs()).log()
        return self.mu + self.log_scale.exp() * drawn

    def mean(self) -> Tensor:
        return self.mu

    def unit_kl(self) -> Tensor:
        """|mu| + s exp(-|mu| / s) - 1 - ln s."""
        size, scale = self.mu.abs(), self.log_scale.exp()
        return size + scale * (-size / scale).exp() - 1 - self.log_scale

    def saturated(self) -> Tensor:
        """Share of scales at their bounds."""
        return (self.log_scale.abs() >= LOG_SCALE_BOUND).float().mean()

    def entropy(self) -> Tensor:
        return (1 + math.log(2) + self.log_scale).sum(dim=1)
