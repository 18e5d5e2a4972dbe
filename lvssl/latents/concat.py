"""Two families side by side, as in `gaussian+bernoulli`: each has half of the dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from lvssl.latents.noise import STREAMS, Noise
from lvssl.latents.posterior import BatchMean, Family, Posterior, rows_mean

Said = TypeVar("Said")


@dataclass(frozen=True)
class Concat(Family):
    """`parameters` are the locations of both, then the scales of both. KL, entropy and code bits add up."""

    parts: tuple[Family, ...]

    @property
    def about(self) -> str:
        return " and ".join(part.about for part in self.parts)

    @property
    def discrete(self) -> bool:
        return any(part.discrete for part in self.parts)

    @property
    def default_beta(self) -> float:
        return max(part.default_beta for part in self.parts)

    def each(self, ask: Callable[[Family, int], Said], dim: int) -> list[Said]:
        """Call `ask` with each part and its number of dimensions."""
        return [ask(part, d) for part, d in zip(self.parts, halves(dim))]

    def location_count(self, dim: int) -> int:
        return sum(self.each(lambda part, d: part.location_count(d), dim))

    def scale_count(self, dim: int) -> int:
        return sum(self.each(lambda part, d: part.scale_count(d), dim))

    def code_bits(self, dim: int) -> int:
        return sum(self.each(lambda part, d: part.code_bits(d), dim))

    def validation_error(self, dim: int) -> str:
        said = self.each(lambda part, d: part.validation_error(d), dim)
        return "; ".join(f"half of it {error}" for error in said if error)

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        scales, offsets = zip(*self.each(lambda part, d: part.initial_head(d, init_scale), dim))
        return torch.cat(scales), torch.cat(offsets)

    def posterior(self, parameters: Tensor) -> "ConcatPosterior":
        dim = dim_of(self, parameters.shape[1])
        counts = self.each(lambda part, d: part.location_count(d), dim)
        counts += self.each(lambda part, d: part.scale_count(d), dim)
        pieces = parameters.split(counts, dim=1)
        both = zip(pieces[: len(self.parts)], pieces[len(self.parts) :])
        posteriors = [part.posterior(torch.cat(piece, dim=1)) for part, piece in zip(self.parts, both)]
        return ConcatPosterior(parameters, posteriors)


class ConcatPosterior(Posterior):
    def __init__(self, parameters: Tensor, posteriors: list[Posterior]) -> None:
        super().__init__(parameters)
        self.posteriors = posteriors

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        streams = (noise.shifted(STREAMS * i) for i in range(len(self.posteriors)))
        return torch.cat([p.sample(count, n, temperature) for p, n in zip(self.posteriors, streams)], dim=2)

    def mean(self) -> Tensor:
        return torch.cat([p.mean() for p in self.posteriors], dim=1)

    def unit_kl(self) -> Tensor:
        return torch.cat([p.unit_kl() for p in self.posteriors], dim=1)

    def entropy(self) -> Tensor:
        return torch.stack([p.entropy() for p in self.posteriors]).sum(dim=0)

    def saturated(self) -> Tensor:
        """The larger of the two shares."""
        return torch.stack([p.saturated() for p in self.posteriors]).max()

    def code(self) -> Tensor:
        return torch.cat([p.code() for p in self.posteriors], dim=1)

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor | None:
        """The bits of the parts that have any."""
        bits = [b for p in self.posteriors if (b := p.straight_through_bits(batch_mean)) is not None]
        return torch.cat(bits, dim=1) if bits else None


def halves(dim: int) -> tuple[int, int]:
    return dim // 2, dim - dim // 2


@lru_cache
def dim_of(family: Family, parameters: int) -> int:
    """Return the number of dimensions for which the family has this many parameters."""
    return next(d for d in range(parameters + 1) if family.parameter_count(d) == parameters)
