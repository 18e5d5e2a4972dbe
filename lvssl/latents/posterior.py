"""What all families have in common: a family with its options, and its posterior over the latent code of
each of B images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvssl.latents.noise import Noise

BatchMean = Callable[[Tensor], Tensor]


def rows_mean(x: Tensor) -> Tensor:
    return x.mean(dim=0)


class Posterior(ABC):
    """q(z | x) for B images, in fp32 whatever the autocast (fp64 for fp64 parameters).

    `parameters` [B, parameter_count(D)] are the family's `location_count(D)` locations, which the head
    normalises over the batch, then `scale_count(D)` numbers of the scale, which it learns as they are.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters if parameters.dtype == torch.float64 else parameters.float()

    @abstractmethod
    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """`count` differentiable samples, as the projector takes them: [count, B, D].

        A sample depends on the noise at its image's row, and on no other image. `temperature` is the
        relaxation's, where the family is relaxed.
        """

    @abstractmethod
    def mean(self) -> Tensor:
        """The sample's expectation, [B, D] (of the discrete distribution, where the sample is relaxed)."""

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
        """A score that grows with the posterior's scale: [B]."""
        return self.entropy()

    def saturated(self) -> Tensor:
        """Share of this batch's numbers that have left the range where they learn: a scalar in [0, 1]."""
        return self.parameters.new_zeros(())

    @abstractmethod
    def code(self) -> Tensor:
        """The deployed code, bool [B, code_bits(D)]: the same for the same image at every call."""

    def bit_means(self) -> Tensor | None:
        """P(bit = 1), [B, bits], where the code is drawn bit by bit; None where it isn't."""
        return None

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor | None:
        """The code's bits as +-1 with a gradient, [B, bits], for decorrelation; None where there are none.

        `batch_mean`: [N, D] -> [D]; across ranks, one over all of them.
        """
        return None


@dataclass(frozen=True)
class Family(ABC):
    """A distribution of the latent; its options are the fields. All that is known of it before an image.

    The rest of the project asks a family for what it needs to know, and never for its name.
    """

    # False: there is no latent; samples are all the same, and the KL is 0.
    stochastic: ClassVar[bool] = True
    # False: its bits are the signs of features that nothing made for a code, the weakest of controls.
    own_code: ClassVar[bool] = True
    # Whether the code's bits are the parameters' signs.
    signs: ClassVar[bool] = False
    # Whether it is a distribution on the sphere, as the objective `ceb` wants.
    on_sphere: ClassVar[bool] = False
    # Settings of the latent that the result of such a run doesn't depend on.
    unread: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def about(self) -> str:
        """What such a model has, as it stands behind "an encoder with": `a Gaussian latent`."""

    @property
    def discrete(self) -> bool:
        """Whether there are logits: their init_scale can be annealed, and samples of them relaxed."""
        return False

    @property
    def default_beta(self) -> float:
        """The weight of the rate, unless it is set: above 0 where the noise would vanish without."""
        return 1e-3

    @property
    def fused(self) -> bool:
        """Whether `lvssl.latents.fused` has a kernel of its samples."""
        return False

    @abstractmethod
    def posterior(self, parameters: Tensor) -> Posterior:
        """That of B images, of their parameters [B, parameter_count(D)]."""

    def location_count(self, dim: int) -> int:
        return dim

    def scale_count(self, dim: int) -> int:
        return 0

    def parameter_count(self, dim: int) -> int:
        """Numbers that the head must give for `dim` latent dimensions."""
        return self.location_count(dim) + self.scale_count(dim)

    def code_bits(self, dim: int) -> int:
        """Nominal bits of a deployed code."""
        return dim

    def validation_error(self, dim: int) -> str:
        """Why there can't be `dim` latent dimensions; empty if there can."""
        return ""

    @abstractmethod
    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Factors of the normalised locations and first values of the scale, that start the posterior
        `init_scale` times as narrow as its prior."""


def constant(count: int, value: float) -> Tensor:
    return torch.full((count,), value)
