"""Base classes: a family with its options, and its posterior over the latent code of each of B images."""

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


def refuse_second_derivatives(of: str) -> None:
    """Raise RuntimeError in a backward pass that is itself differentiated. What is written by hand would
    count as a constant, silently; with `once_differentiable`, too, if the incoming gradient is one."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{of} has no second derivatives (create_graph=True)")


class Posterior(ABC):
    """q(z | x) for B images, in fp32 whatever the autocast (fp64 for fp64 parameters).

    `parameters` [B, parameter_count(D)] are the family's `location_count(D)` locations, which the head
    normalises over the batch, then `scale_count(D)` scale parameters, which it doesn't normalise.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters if parameters.dtype == torch.float64 else parameters.float()

    @abstractmethod
    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw `count` differentiable samples as the projector takes them, [count, B, D].

        A sample depends on the noise at its image's row, and on no other image. `temperature` is that of the
        relaxation, if the family is relaxed.
        """

    @abstractmethod
    def mean(self) -> Tensor:
        """Expectation of a sample, [B, D]; if samples are relaxed, that of the discrete distribution."""

    @abstractmethod
    def unit_kl(self) -> Tensor:
        """KL(q || prior) of each independent part of the code in nats, [B, units]."""

    def kl(self) -> Tensor:
        """KL(q || prior) in nats, [B]."""
        return self.unit_kl().sum(dim=1)

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy of q in nats, [B]; differential for continuous families."""

    def uncertainty(self) -> Tensor:
        """A score that grows with the posterior's scale, [B]."""
        return self.entropy()

    def saturated(self) -> Tensor:
        """Share of this batch's values that are outside the range in which they learn, a scalar in [0, 1]."""
        return self.parameters.new_zeros(())

    @abstractmethod
    def code(self) -> Tensor:
        """The deployed code, bool [B, code_bits(D)], the same for the same image at every call."""

    def bit_means(self) -> Tensor | None:
        """P(bit = 1), [B, bits], if the code is drawn bit by bit; otherwise None."""
        return None

    def straight_through_bits(self, batch_mean: BatchMean = rows_mean) -> Tensor | None:
        """The code's bits as +-1 with a gradient, [B, bits], for decorrelation; None if there are none.

        `batch_mean`: [N, D] -> [D]; with several ranks, the mean over all of them.
        """
        return None


@dataclass(frozen=True)
class Family(ABC):
    """A distribution of the latent, without an image's parameters. Its fields are the options.

    The rest of the project asks a family for what it needs to know, and never for its name.
    """

    # False: there is no latent; all samples are the same, and the KL is 0.
    stochastic: ClassVar[bool] = True
    # False: the bits are signs of features that weren't trained to be a code, the weakest control.
    own_code: ClassVar[bool] = True
    # Whether the code's bits are the signs of the parameters.
    signs: ClassVar[bool] = False
    # Whether it is a distribution on the sphere, which the objective `ceb` requires.
    on_sphere: ClassVar[bool] = False
    # Settings of the latent that don't affect the result of a run with this family.
    unread: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def about(self) -> str:
        """What such a model has, worded to follow "an encoder with": `a Gaussian latent`."""

    @property
    def discrete(self) -> bool:
        """Whether there are logits, whose init_scale can be annealed and whose samples can be relaxed."""
        return False

    @property
    def default_beta(self) -> float:
        """Default weight of the rate: above 0 where the noise would vanish without it."""
        return 1e-3

    @property
    def fused(self) -> bool:
        """Whether `lvssl.latents.fused` has a kernel for it."""
        return False

    @abstractmethod
    def posterior(self, parameters: Tensor) -> Posterior:
        """Return the posterior of B images from their parameters [B, parameter_count(D)]."""

    def location_count(self, dim: int) -> int:
        return dim

    def scale_count(self, dim: int) -> int:
        return 0

    def parameter_count(self, dim: int) -> int:
        """Number of parameters that the head must predict for `dim` latent dimensions."""
        return self.location_count(dim) + self.scale_count(dim)

    def code_bits(self, dim: int) -> int:
        """Nominal number of bits of a deployed code."""
        return dim

    def validation_error(self, dim: int) -> str:
        """What the number of latent dimensions must be, if it can't be `dim`; otherwise empty."""
        return ""

    @abstractmethod
    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Return factors of the normalised locations and initial values of the scale.

        The larger `init_scale`, the narrower the posterior at the start: it is the standard deviation of
        logits, 1 / s of a Gaussian with the prior N(0, 1), kappa / D on the sphere.
        """


def constant(count: int, value: float) -> Tensor:
    return torch.full((count,), value)
