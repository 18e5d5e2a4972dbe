"""Family `gaussian`: z ~ N(mu, s^2), prior N(0, 1) in every dimension (Kingma & Welling 2014)."""

import math
from typing import ClassVar

from torch import Generator, Tensor

from lvssl.latents.bits import gray_digits, quantise
from lvssl.latents.posterior import Posterior, constant, normal

LOG_VARIANCE_BOUND = 10.0


def loading(depth: int) -> float:
    """Range of the quantiser of N(0, 1): +- this. Within 25 % of the best uniform steps (Max 1960)."""
    return 1 + 0.5 * depth


class Gaussian(Posterior):
    """`parameters` is [B, 2D]: mu, then ln s^2, which is bounded to [-10, 10].

    The code is mu, uniformly quantised to `depth` bits (one: its sign), in Gray digits.
    """

    depth: ClassVar[int] = 1

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        self.mu, log_variance = self.parameters.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return dim

    @classmethod
    def code_bits(cls, dim: int) -> int:
        return cls.depth * dim

    @classmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        """s = 1 / sharpness beside means of unit spread."""
        return constant(dim, 1.0), constant(dim, -2 * math.log(sharpness))

    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        noise = normal((count, *self.mu.shape), self.mu, generator)
        return self.mu + (0.5 * self.log_variance).exp() * noise

    def mean(self) -> Tensor:
        return self.mu

    def unit_kl(self) -> Tensor:
        """(mu^2 + s^2 - 1 - ln s^2) / 2 in each dimension."""
        return 0.5 * (self.mu.square() + self.log_variance.exp() - 1 - self.log_variance)

    def entropy(self) -> Tensor:
        return 0.5 * (math.log(2 * math.pi * math.e) + self.log_variance).sum(dim=1)

    def saturated(self) -> Tensor:
        """Variances at their bounds."""
        return (self.log_variance.abs() >= LOG_VARIANCE_BOUND).float().mean()

    def symbols(self) -> Tensor:
        return quantise(self.mu, -loading(self.depth), loading(self.depth), self.depth)

    def code(self) -> Tensor:
        return gray_digits(self.symbols(), self.depth)

    def uncertainty(self) -> Tensor:
        """Sum of ln s^2, twice the entropy up to a constant."""
        return self.log_variance.sum(dim=1)
