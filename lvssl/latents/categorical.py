"""Family `categorical`: groups of K exclusive categories, prior uniform (Jang et al. 2017)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvssl.latents.bits import binary_digits
from lvssl.latents.noise import Noise, uniform
from lvssl.latents.posterior import Family, Posterior, constant

UNIFORM_SHARE = 0.01  # of the probabilities, which keeps every category reachable (Hafner et al. 2023)


@dataclass(frozen=True)
class Categorical(Family):
    """`parameters` are the logits, [B, D]: D / K groups of K = `categories`.

    Samples, KL and entropy use the probabilities 0.99 softmax(logits) + 0.01 / K. Samples are one-hot, with
    the straight-through gradient of the probabilities. If `relaxed`, they are Gumbel-softmax samples, whose
    argmax is the one-hot sample; `kl` stays that of the discrete distribution, a lower bound on theirs.
    """

    relaxed: bool = False
    categories: int = 16

    about = "a categorical latent"
    discrete = True
    default_beta = 0.0

    @property
    def fused(self) -> bool:
        return not self.relaxed

    def validation_error(self, dim: int) -> str:
        return f"a multiple of the {self.categories} categories" if dim % self.categories else ""

    def code_bits(self, dim: int) -> int:
        return dim // self.categories * math.ceil(math.log2(self.categories))

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        return constant(dim, init_scale), constant(0, 0.0)

    def posterior(self, parameters: Tensor) -> "CategoricalPosterior":
        return CategoricalPosterior(parameters, self.categories, self.relaxed)


class CategoricalPosterior(Posterior):
    def __init__(self, parameters: Tensor, categories: int, relaxed: bool) -> None:
        super().__init__(parameters)
        self.categories, self.relaxed = categories, relaxed
        self.logits = self.parameters.unflatten(1, (-1, categories))  # [B, groups, K]

    def probabilities(self) -> Tensor:
        """Probabilities of the categories, [B, groups, K]."""
        return (1 - UNIFORM_SHARE) * self.logits.softmax(dim=2) + UNIFORM_SHARE / self.categories

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw concatenated one-hot vectors, [count, B, groups * K]; if relaxed, points on the simplices."""
        p = self.probabilities()
        if self.relaxed:
            drawn = uniform((count, *p.shape), p, noise).clamp(min=2**-25)  # all K of a group may be 0
            gumbel = -(-drawn.log()).log()
            return ((p.log() + gumbel) / temperature).softmax(dim=3).flatten(2)
        # One uniform per group, compared with the cumulative probabilities, is cheaper than K Gumbels.
        drawn = uniform((count, *p.shape[:2], 1), p, noise)
        chosen = (drawn >= p.detach().cumsum(dim=2)).sum(dim=3).clamp(max=self.categories - 1)
        hard = torch.zeros_like(p).expand(count, *p.shape).scatter(3, chosen[..., None], 1.0)
        return (hard + (p - p.detach())).flatten(2)

    def mean(self) -> Tensor:
        return self.probabilities().flatten(1)

    def unit_kl(self) -> Tensor:
        """sum_k q ln q + ln K for each group; no q is below 0.01 / K, so its logarithm is finite."""
        p = self.probabilities()
        return (p * p.log()).sum(dim=2) + math.log(self.categories)

    def entropy(self) -> Tensor:
        p = self.probabilities()
        return -(p * p.log()).flatten(1).sum(dim=1)

    def saturated(self) -> Tensor:
        """Share of groups whose likeliest category has over 99.9 % of the softmax."""
        return (self.logits.softmax(dim=2).amax(dim=2) > 0.999).float().mean()

    def symbols(self) -> Tensor:
        """Each group's likeliest category, int64 [B, groups]."""
        return self.logits.argmax(dim=2)

    def code(self) -> Tensor:
        return binary_digits(self.symbols(), math.ceil(math.log2(self.categories)))
