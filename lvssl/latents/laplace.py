"""Family `laplace`: z ~ Laplace(mu, s), prior Laplace(0, 1) in every dimension: sparser than a Gaussian."""

import math
from typing import ClassVar

from torch import Generator, Tensor

from lvssl.latents.bits import gray_digits, quantise
from lvssl.latents.gaussian import loading
from lvssl.latents.posterior import Posterior, constant, uniform

LOG_SCALE_BOUND = 5.0


class Laplace(Posterior):
    """`parameters` is [B, 2D]: mu, then ln s, which is bounded to [-5, 5]. The code is mu, quantised."""

    depth: ClassVar[int] = 1

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        self.mu, log_scale = self.parameters.chunk(2, dim=1)
        self.log_scale = log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return dim

    @classmethod
    def code_bits(cls, dim: int) -> int:
        return cls.depth * dim

    @classmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        return constant(dim, 1.0), constant(dim, -math.log(sharpness))

    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        """mu + s * noise, the noise by inversion."""
        centred = uniform((count, *self.mu.shape), self.mu, generator).clamp(min=2**-25) - 0.5
        noise = -centred.sign() * (1 - 2 * centred.abs()).log()
        return self.mu + self.log_scale.exp() * noise

    def mean(self) -> Tensor:
        return self.mu

    def unit_kl(self) -> Tensor:
        """|mu| + s exp(-|mu| / s) - 1 - ln s."""
        size, scale = self.mu.abs(), self.log_scale.exp()
        return size + scale * (-size / scale).exp() - 1 - self.log_scale

    def entropy(self) -> Tensor:
        return (1 + math.log(2) + self.log_scale).sum(dim=1)

    def symbols(self) -> Tensor:
        return quantise(self.mu, -loading(self.depth), loading(self.depth), self.depth)

    def code(self) -> Tensor:
        return gray_digits(self.symbols(), self.depth)
