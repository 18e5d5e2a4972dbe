"""Family `beta`: z ~ Beta(a, b) in every dimension, prior Beta(1.1, 1.1)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import kl_divergence

from lvssl.latents.noise import Noise, log_gammas
from lvssl.latents.posterior import constant, refuse_second_derivatives
from lvssl.latents.quantised import Quantised, QuantisedPosterior

PRIOR = 1.1
FLOOR = 1e-2  # of a and b; torch's Beta samples wrongly below it
LOG_TOTAL_BOUND = 10.0


@dataclass(frozen=True)
class Beta(Quantised):
    """`parameters` is [B, 2D]: the logit of the mean, then ln(a + b), which is clamped to [-10, 10].

    a and b are at least 0.01. KL and entropy are torch's closed forms in fp64: in fp32 their log-gammas
    cancel to an error of 0.01 nats per dimension. The code is the quantised mean.
    """

    about = "a beta latent"

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Start with means in (-1, 1) of standard deviation 0.6; a posterior with mean 0 has a standard
        deviation of 1 / sqrt(1 + init_scale^2)."""
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

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw 2z - 1, in [-1, 1], with the gradient of torch's rsample."""
        drawn = beta_variates(self.a, self.b, count, noise)
        return drawn[..., 0] - drawn[..., 1]

    def mean(self) -> Tensor:
        return (self.a - self.b) / (self.a + self.b)

    def unit_kl(self) -> Tensor:
        # Created on the device, because a copy from the host would wait for it.
        prior = torch.full((), PRIOR, dtype=torch.float64, device=self.a.device)
        exact = kl_divergence(self.exact(), TorchBeta(prior, prior, validate_args=False))
        return exact.to(self.a.dtype)

    def entropy(self) -> Tensor:
        """Entropy of 2z - 1, in which each dimension is twice as wide as in z."""
        per_dim = self.exact().entropy() + math.log(2)
        return per_dim.sum(dim=1).to(self.a.dtype)

    def uncertainty(self) -> Tensor:
        """Sum of the log variances of z. The entropy won't do: it falls where all mass is at the ends."""
        total = self.a + self.b
        return (self.a.log() + self.b.log() - 2 * total.log() - total.log1p()).sum(dim=1)

    def exact(self) -> TorchBeta:
        return TorchBeta(self.a.double(), self.b.double(), validate_args=False)

    def saturated(self) -> Tensor:
        """Share of dimensions with a or b at the floor."""
        return ((self.a <= FLOOR) | (self.b <= FLOOR)).float().mean()

    def bound(self) -> float:
        return 1.0


def beta_variates(a: Tensor, b: Tensor, count: int, noise: Noise) -> Tensor:
    """Draw z ~ Beta(a, b) from two streams of the noise; a, b [N, D] -> z and 1 - z, [count, N, D, 2].

    The gradients are implicit (Figurnov et al. 2018), with the derivative that torch has for its samples.
    """
    difference = log_gammas(a, count, noise) - log_gammas(b, count, noise.shifted(1))
    drawn = torch.stack([difference.sigmoid(), (-difference).sigmoid()], dim=3).to(a.dtype)
    number = torch.finfo(a.dtype)
    drawn = drawn.clamp(min=number.tiny, max=1 - number.eps / 2)  # where the derivative is finite
    return _Reparameterised.apply(torch.stack([a, b], dim=2).expand(drawn.shape), drawn)


class _Reparameterised(torch.autograd.Function):
    """Dirichlet samples over the last dimension, as a function of their concentrations."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, drawn: Tensor) -> Tensor:
        ctx.save_for_backward(concentration, drawn)
        return drawn.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives("a sample of Beta or power-spherical")
        concentration, drawn = ctx.saved_tensors
        total = concentration.sum(-1, keepdim=True).expand_as(concentration)
        jacobian = torch._dirichlet_grad(drawn, concentration.contiguous(), total.contiguous())
        return jacobian * (grad - (drawn * grad).sum(-1, keepdim=True)), None
