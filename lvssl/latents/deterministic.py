"""Family `none`: no latent. Plain SimCLR, the control that every latent-variable result is paired with."""

from typing import ClassVar

from torch import Generator, Tensor

from lvssl.latents.posterior import Posterior, constant


class Deterministic(Posterior):
    """A point mass at h; `parameters` is [B, 2D]: h, then its sign bits' thresholds (h's running mean)."""

    stochastic: ClassVar[bool] = False

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        self.features, self.thresholds = self.parameters.chunk(2, dim=1)

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return dim

    @classmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        return constant(dim, 1.0), constant(dim, 0.0)

    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        return self.features[None]  # samples would all be equal, so one is enough: [1, B, D]

    def mean(self) -> Tensor:
        return self.features

    def unit_kl(self) -> Tensor:
        return self.features.new_zeros(len(self.features), 1)

    def entropy(self) -> Tensor:
        return self.features.new_zeros(len(self.features))

    def symbols(self) -> Tensor:
        return self.code().long()

    def code(self) -> Tensor:
        return self.features > self.thresholds

    def uncertainty(self) -> Tensor:
        """Minus the feature's norm: the customary score of a deterministic model."""
        return -self.features.norm(dim=1)
