"""Family `none`: no latent. Plain SimCLR, the control that every latent-variable result is paired with."""

from typing import ClassVar

from torch import Generator, Tensor


class Deterministic:
    """A point mass at h; `parameters` is [B, 2D]: h, then its sign bits' thresholds (h's running mean)."""

    stochastic: ClassVar[bool] = False

    def __init__(self, parameters: Tensor) -> None:
        self.features, self.thresholds = parameters.float().chunk(2, dim=1)

    @staticmethod
    def parameter_count(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def code_bits(dim: int) -> int:
        return dim

    @staticmethod
    def head_scale(sharpness: float) -> tuple[float, float]:
        return 1.0, 0.0

    def sample(self, count: int = 1, generator: Generator | None = None) -> Tensor:
        return self.features[None]  # samples would all be equal, so one is enough: [1, B, D]

    def mean(self) -> Tensor:
        return self.features

    def kl(self) -> Tensor:
        return self.features.new_zeros(len(self.features))

    def code(self) -> Tensor:
        return self.features > self.thresholds

    def uncertainty(self) -> Tensor:
        """Minus the feature's norm: the customary score of a deterministic model."""
        return -self.features.norm(dim=1)
