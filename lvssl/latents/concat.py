"""Two families side by side, as in `gaussian+bernoulli`: each has half of the dimensions."""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lvssl.latents.posterior import BatchMean, Posterior, rows_mean


class Concat(Posterior):
    """`parameters` is the locations of both, then the spreads of both. KL, entropy and bits are sums."""

    parts: ClassVar[tuple[type[Posterior], ...]] = ()

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        dims = halves(dim_of(type(self), self.parameters.shape[1]))
        counts = [part.location_count(d) for part, d in zip(self.parts, dims)]
        counts += [part.spread_count(d) for part, d in zip(self.parts, dims)]
        pieces = self.parameters.split(counts, dim=1)
        both = zip(pieces[: len(dims)], pieces[len(dims) :])
        self.posteriors = [part(torch.cat(piece, dim=1)) for part, piece in zip(self.parts, both)]

    @classmethod
    def each(cls, method: str, dim: int, *arguments: Any) -> list[Any]:
        """What each part's class method says of its share of the dimensions."""
        return [getattr(part, method)(d, *arguments) for part, d in zip(cls.parts, halves(dim))]

    @classmethod
    def location_count(cls, dim: int) -> int:
        return sum(cls.each("location_count", dim))

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return sum(cls.each("spread_count", dim))

    @classmethod
    def code_bits(cls, dim: int) -> int:
        return sum(cls.each("code_bits", dim))

    @classmethod
    def complaint(cls, dim: int) -> str:
        return "; ".join(f"half of it {said}" for said in cls.each("complaint", dim) if said)

    @classmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        scales, offsets = zip(*cls.each("start", dim, sharpness))
        return torch.cat(scales), torch.cat(offsets)

    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        return torch.cat([p.sample(count, generator, temperature) for p in self.posteriors], dim=2)

    def mean(self) -> Tensor:
        return self.joined("mean")

    def unit_kl(self) -> Tensor:
        return self.joined("unit_kl")

    def entropy(self) -> Tensor:
        return torch.stack([p.entropy() for p in self.posteriors]).sum(dim=0)

    def saturated(self) -> Tensor:
        """The worse of the two."""
        return torch.stack([p.saturated() for p in self.posteriors]).max()

    def symbols(self) -> Tensor:
        return self.joined("symbols")

    def code(self) -> Tensor:
        return self.joined("code")

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor | None:
        """Those of the parts that have any."""
        bits = [b for p in self.posteriors if (b := p.straight_through_bits(batch_mean)) is not None]
        return torch.cat(bits, dim=1) if bits else None

    def joined(self, method: str) -> Tensor:
        return torch.cat([getattr(p, method)() for p in self.posteriors], dim=1)


def halves(dim: int) -> tuple[int, int]:
    return dim // 2, dim - dim // 2


@lru_cache
def dim_of(family: type[Posterior], parameters: int) -> int:
    """The dimensions that take so many parameters."""
    return next(d for d in range(parameters + 1) if family.parameter_count(d) == parameters)
