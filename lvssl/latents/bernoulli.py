"""Family `bernoulli`: independent bits z ~ Bern(p), p = sigmoid(logit), prior Bern(1/2)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class Bernoulli:
    """`parameters` is the logits, [B, D]."""

    stochastic: ClassVar[bool] = True

    def __init__(self, parameters: Tensor) -> None:
        self.logits = parameters.float()

    @staticmethod
    def parameter_count(dim: int) -> int:
        return dim

    @staticmethod
    def code_bits(dim: int) -> int:
        return dim

    @staticmethod
    def head_scale(sharpness: float) -> tuple[float, float]:
        return sharpness, 0.0

    def sample(self, count: int = 1, generator: Generator | None = None) -> Tensor:
        """2z - 1 in {-1, +1}; straight-through gradient, that of p: z = b + p - stop_grad(p)."""
        p = self.logits.sigmoid()
        uniform = torch.rand((count, *p.shape), generator=generator, device=p.device)
        bits = (uniform < p).float()
        return 2 * (bits + (p - p.detach())) - 1  # (p - p) is exactly 0, so the value is exactly +-1

    def mean(self) -> Tensor:
        return (0.5 * self.logits).tanh()  # 2p - 1

    def kl(self) -> Tensor:
        """sum_d p * l - softplus(l) + ln 2; exact and finite for any finite logit.

        p*l - softplus(l) is written with |l|, which is symmetric, so that two large numbers of the same
        size are not subtracted: minus the entropy = -(softplus(-|l|) + |l| * sigmoid(-|l|)).
        """
        return (math.log(2) - self.entropy()).sum(dim=1)

    def entropy(self) -> Tensor:
        """Entropy of each bit in nats, [B, D]."""
        size = self.logits.abs()
        return F.softplus(-size) + size * torch.sigmoid(-size)

    def code(self) -> Tensor:
        return self.logits > 0

    def uncertainty(self) -> Tensor:
        """Entropy of the code in nats."""
        return self.entropy().sum(dim=1)

    def straight_through_bits(self) -> Tensor:
        """The hard bits as +-1 with the gradient of 2p - 1: [B, D]."""
        soft = self.mean()
        return torch.where(self.logits > 0, 1.0, -1.0) + (soft - soft.detach())
