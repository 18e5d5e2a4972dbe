"""Family `beta`: z ~ Beta(a, b) in every dimension, prior Beta(1.1, 1.1)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Beta as TorchBeta
from torch.distributions import kl_divergence

from lvssl.latents.noise import Keyed, Noise
from lvssl.latents.posterior import constant
from lvssl.latents.quantised import Quantised, QuantisedPosterior

PRIOR = 1.1
FLOOR = 1e-2  # torch's Beta samples wrongly below
LOG_TOTAL_BOUND = 10.0


@dataclass(frozen=True)
class Beta(Quantised):
    """`parameters` is [B, 2D]: the mean's logit, then ln(a + b), which is bounded to [-10, 10].

    a and b are floored at 0.01. KL and entropy are torch's closed forms in fp64: in fp32 their log-gammas
    cancel to 0.01 nats a dimension. The code is the mean, quantised.
    """

    about = "a beta latent"

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Means of deviation 0.6 in (-1, 1); at 0 a deviation of 1 / sqrt(1 + init_scale^2)."""
        return constant(dim, 2.0), constant(dim, 2 * math.log(init_scale))

    def posterior(self, parameters: Tensor) -> "BetaPosterior":
        return BetaPosterior(parameters, self.depth)


class BetaPosterior(QuantisedPosterior):
    def __init__(self, parameters: Tensor, depth: int) -> None:
        super().__init__(parameters, depth)
        self.logits, log_total = self.parameters.chunk(2, dim=1)
        total = log_total.clamp(-LOG_TOTAL_BOUND, LOG_TOTAL_BOUND).exp()
        self.a = (total * self.logits.sigmoid()).clamp(min=FLOOR)
        self.b = (total * (-self.logits).sigmoid()).clamp(min=FLOOR)

    def sample(self, count: int = 1, noise: Noise = None, temperature: float = 0.5) -> Tensor:
        """2z - 1, in [-1, 1]; the gradient is that of torch's rsample."""
        both = torch.stack([self.a, self.b], dim=2).expand(count, *self.a.shape, 2)
        drawn = draw_dirichlet(both, noise)
        return drawn[..., 0] - drawn[..., 1]

    def mean(self) -> Tensor:
        return (self.a - self.b) / (self.a + self.b)

    def unit_kl(self) -> Tensor:
        # Made on the device: a copy from the host would wait for it.
        prior = torch.full((), PRIOR, dtype=torch.float64, device=self.a.device)
        exact = kl_divergence(self.exact(), TorchBeta(prior, prior, validate_args=False))
        return exact.to(self.a.dtype)

    def entropy(self) -> Tensor:
        """Of 2z - 1: each dimension is twice as wide as z."""
        per_dim = self.exact().entropy() + math.log(2)
        return per_dim.sum(dim=1).to(self.a.dtype)

    def uncertainty(self) -> Tensor:
        """Sum of the logarithms of z's variances: the entropy falls again where all mass is at the ends."""
        total = self.a + self.b
        return (self.a.log() + self.b.log() - 2 * total.log() - total.log1p()).sum(dim=1)

    def exact(self) -> TorchBeta:
        return TorchBeta(self.a.double(), self.b.double(), validate_args=False)

    def saturated(self) -> Tensor:
        """Dimensions with a concentration at the floor."""
        return ((self.a <= FLOOR) | (self.b <= FLOOR)).float().mean()

    def bound(self) -> float:
        return 1.0


def draw_dirichlet(concentration: Tensor, noise: Noise) -> Tensor:
    """Dirichlet samples over the last dimension, with implicit gradients (Figurnov et al. 2018).

    `torch.distributions` has the same, but draws from the global generator alone.
    """
    if isinstance(noise, Keyed):
        raise TypeError("a Dirichlet distribution is drawn from a generator, not from keyed noise")
    return _Dirichlet.apply(concentration, noise)


class _Dirichlet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, concentration: Tensor, generator: Generator | None) -> Tensor:
        drawn = torch._sample_dirichlet(concentration.contiguous(), generator=generator)
        ctx.save_for_backward(drawn, concentration)
        return drawn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        drawn, concentration = ctx.saved_tensors
        total = concentration.sum(-1, keepdim=True).expand_as(concentration)
        jacobian = torch._dirichlet_grad(drawn, concentration, total)
        return jacobian * (grad - (drawn * grad).sum(-1, keepdim=True)), None
