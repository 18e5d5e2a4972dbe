"""Family `none`: no latent. This is plain SimCLR, the control for every result of a latent variable."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lvssl.latents.noise import Noise
from lvssl.latents.posterior import Family, Posterior, constant


@dataclass(frozen=True)
class Deterministic(Family):
    """A point mass at h. `parameters` is [B, 2D]: h, then the thresholds of its bits (h's running mean)."""

    about = "no latent"
    stochastic = False
    own_code = False
    # There are no bits to decorrelate, and there is no second path.
    unread: ClassVar[tuple[str, ...]] = ("decorrelation", "clean_path_weight")
    default_beta = 0.0

    def scale_count(self, dim: int) -> int:
        return dim

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        return constant(dim, 1.0), constant(dim, 0.0)

    def posterior(self, parameters: Tensor) -> "DeterministicPosterior":
        return DeterministicPosterior(parameters)


class DeterministicPosterior(Posterior):
    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        self.features, self.thresholds = self.parameters.chunk(2, dim=1)

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        return self.features[None]  # all samples would be equal, so one is enough: [1, B, D]

    def mean(self) -> Tensor:
        return self.features

    def unit_kl(self) -> Tensor:
        return self.features.new_zeros(len(self.features), 1)

    def entropy(self) -> Tensor:
        return self.features.new_zeros(len(self.features))

    def code(self) -> Tensor:
        return self.features > self.thresholds

    def uncertainty(self) -> Tensor:
        """The negative norm of the features, the usual score of a deterministic model."""
        return -self.features.norm(dim=1)
