"""Posteriors over the latent code: one file a family, chosen by name.

A posterior holds the parameters of one factorised distribution per image, in fp32 whatever the autocast.
A new family is one file and one line in FAMILIES.
"""

from typing import ClassVar, Protocol

from torch import Generator, Tensor

from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.deterministic import Deterministic
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.sign import Sign


class Posterior(Protocol):
    """q(z | x) for B images, D latent dimensions; `parameters` is [B, parameter_count(D)]."""

    stochastic: ClassVar[bool]  # False: sample() is always the same and kl() is 0

    def __init__(self, parameters: Tensor) -> None: ...

    @staticmethod
    def parameter_count(dim: int) -> int:
        """Numbers that the head must give for `dim` latent dimensions."""
        ...

    @staticmethod
    def code_bits(dim: int) -> int:
        """Nominal bits of a deployed code."""
        ...

    @staticmethod
    def head_scale(sharpness: float) -> tuple[float, float]:
        """(scale, offset of the second half of the parameters) that start the posterior `sharpness` times
        as narrow as its prior."""
        ...

    def sample(self, count: int = 1, generator: Generator | None = None) -> Tensor:
        """`count` differentiable samples, as the projector takes them: [count, B, D]."""
        ...

    def mean(self) -> Tensor:
        """The sample's expectation, [B, D]."""
        ...

    def kl(self) -> Tensor:
        """KL(q || prior) in nats, summed over the latent dimensions: [B]."""
        ...

    def code(self) -> Tensor:
        """The deployed code: bool [B, code_bits(D)], the same for the same image at every call."""
        ...

    def uncertainty(self) -> Tensor:
        """A score that grows with the posterior's spread: [B]."""
        ...


FAMILIES: dict[str, type[Posterior]] = {
    "none": Deterministic,
    "sign": Sign,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}
