"""Blocks of vectors, on which the engines work and which the ranks exchange."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """The vectors of one rank, v = x * factors[:, None]."""

    x: Tensor  # [N, d], any float type: a GPU's dot products take the values as given, not rounded
    factors: Tensor  # [N], fp32 (fp64 for fp64 x)

    def vectors(self) -> Tensor:
        """v, [N, d], in the factors' type."""
        return self.x * self.factors[:, None]

    def per_vector(self) -> list[Tensor]:
        """The fields with one number per vector, each [N], in their order."""
        return [self.factors]


@dataclass(frozen=True)
class Weighed(Block):
    """A block with what the backward pass needs to know of each anchor."""

    denominators: Tensor  # [N], over the columns of all ranks
    weights: Tensor  # [N], the loss's gradient with respect to them

    def per_vector(self) -> list[Tensor]:
        return [self.factors, self.denominators, self.weights]
