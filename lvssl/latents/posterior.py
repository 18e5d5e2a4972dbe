"""What every family has in common: a posterior over the latent code of each of B images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lvssl.latents.bits import pack

BatchMean = Callable[[Tensor], Tensor]


def rows_mean(x: Tensor) -> Tensor:
    return x.mean(dim=0)


class Posterior(ABC):
    """q(z | x) for B images, in fp32 whatever the autocast (fp64 for fp64 parameters).

    `parameters` [B, parameter_count(D)] are `location_count(D)` locations, which the head normalises over the
    batch, then `spread_count(D)` numbers of the spread, which it learns as they are.

    Class attributes are the family's options; `lvssl.latents.family` sets them.
    """

    stochastic: ClassVar[bool] = True  # False: sample() is always the same and kl() is 0
    exact_kl: ClassVar[bool] = True  # False: kl() is an upper bound; the family's file says of what

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters if parameters.dtype == torch.float64 else parameters.float()

    @classmethod
    def location_count(cls, dim: int) -> int:
        return dim

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return 0

    @classmethod
    def parameter_count(cls, dim: int) -> int:
        """Numbers that the head must give for `dim` latent dimensions."""
        return cls.location_count(dim) + cls.spread_count(dim)

    @classmethod
    def code_bits(cls, dim: int) -> int:
        """Nominal bits of a deployed code."""
        return dim

    @classmethod
    def complaint(cls, dim: int) -> str:
        """Why there can't be `dim` latent dimensions; empty if there can."""
        return ""

    @classmethod
    @abstractmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        """Factors of the normalised locations and first values of the spread, that start the posterior
        `sharpness` times as narrow as its prior."""

    @abstractmethod
    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        """`count` differentiable samples, as the projector takes them: [count, B, D].

        `temperature` is the relaxation's, where the family is relaxed.
        """

    @abstractmethod
    def mean(self) -> Tensor:
        """The sample's expectation, [B, D] (of the discrete law, where the sample is relaxed)."""

    @abstractmethod
    def unit_kl(self) -> Tensor:
        """KL(q || prior) in nats of each independent part of the code, [B, units]."""

    def kl(self) -> Tensor:
        """KL(q || prior) in nats, [B]."""
        return self.unit_kl().sum(dim=1)

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy of q in nats, [B]; differential for continuous families."""

    def uncertainty(self) -> Tensor:
        """A score that grows with the posterior's spread: [B]."""
        return self.entropy()

    def saturated(self) -> Tensor:
        """Share of this batch's numbers that have left the range where they learn: a scalar in [0, 1]."""
        return self.parameters.new_zeros(())

    @abstractmethod
    def symbols(self) -> Tensor:
        """The deployed code as integers, int64 [B, symbols]: the same for the same image at every call."""

    @abstractmethod
    def code(self) -> Tensor:
        """The same as bits, bool [B, code_bits(D)]."""

    def packed(self) -> Tensor:
        """The same, eight bits a byte: uint8 [B, ceil(code_bits(D) / 8)], as `lvssl.codes.pack`."""
        return pack(self.code())

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor | None:
        """The code's bits as +-1 with a gradient, [B, bits], for decorrelation; None where there are none.

        `batch_mean`: [N, D] -> [D]; across ranks, one over all of them.
        """
        return None


def constant(count: int, value: float) -> Tensor:
    return torch.full((count,), value)


def uniform(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """In [0, 1), of the type and on the device of `like`."""
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)


def normal(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
