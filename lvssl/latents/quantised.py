"""Families with a location and a scale for each dimension, whose code is the quantised mean."""

from dataclasses import dataclass

from torch import Tensor

from lvssl.latents.bits import gray_digits, quantise
from lvssl.latents.posterior import Family, Posterior


def loading(depth: int) -> float:
    """Half the range of a quantiser of N(0, 1). For 1 to 8 bits its steps are within 27 % of the best uniform
    ones (Max 1960)."""
    return 1 + 0.5 * depth


@dataclass(frozen=True)
class Quantised(Family):
    """`parameters` is [B, 2D]: D locations, then D scales. `depth` is the code's bits per dimension."""

    depth: int = 1

    def scale_count(self, dim: int) -> int:
        return dim

    def code_bits(self, dim: int) -> int:
        return self.depth * dim


class QuantisedPosterior(Posterior):
    """The code is the mean, uniformly quantised to `depth` bits (one bit: its sign), in Gray code."""

    def __init__(self, parameters: Tensor, depth: int) -> None:
        super().__init__(parameters)
        self.depth = depth

    def bound(self) -> float:
        """Half the range of the quantiser, which is symmetric about 0."""
        return loading(self.depth)

    def symbols(self) -> Tensor:
        """The quantised mean, int64 [B, D], in [0, 2^depth)."""
        return quantise(self.mean(), -self.bound(), self.bound(), self.depth)

    def code(self) -> Tensor:
        return gray_digits(self.symbols(), self.depth)
