"""Family `gaussian`: z ~ N(mu, s^2), prior N(0, 1) in every dimension (Kingma & Welling 2014)."""

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor

LOG_VARIANCE_BOUND = 10.0


class Gaussian:
    """`parameters` is [B, 2D]: mu, then ln s^2, which is bounded to [-10, 10]."""

    stochastic: ClassVar[bool] = True

    def __init__(self, parameters: Tensor) -> None:
        self.mu, log_variance = parameters.float().chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)

    @staticmethod
    def parameter_count(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def code_bits(dim: int) -> int:
        return dim

    @staticmethod
    def head_scale(sharpness: float) -> tuple[float, float]:
        return 1.0, -2 * math.log(sharpness)  # s = 1 / sharpness beside means of unit spread

    def sample(self, count: int = 1, generator: Generator | None = None) -> Tensor:
        noise = torch.randn((count, *self.mu.shape), generator=generator, device=self.mu.device)
        return self.mu + (0.5 * self.log_variance).exp() * noise

    def mean(self) -> Tensor:
        return self.mu

    def kl(self) -> Tensor:
        """sum_d (mu^2 + s^2 - 1 - ln s^2) / 2."""
        per_dim = self.mu.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * per_dim.sum(dim=1)

    def code(self) -> Tensor:
        """The means' signs: a uniform quantiser of one bit."""
        return self.mu > 0

    def uncertainty(self) -> Tensor:
        """Sum of ln s^2, twice the entropy up to a constant."""
        return self.log_variance.sum(dim=1)
