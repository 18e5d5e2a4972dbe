"""Family `mixture`: z ~ sum_k pi_k N(mu_k, s_k^2), one component for the whole code, prior N(0, 1)."""

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lvssl.latents.bits import binary_digits, gray_digits, quantise
from lvssl.latents.gaussian import LOG_VARIANCE_BOUND, loading
from lvssl.latents.posterior import Posterior, constant, normal, uniform


class Mixture(Posterior):
    """`parameters` is [B, K * D + K + K * D]: mu_k, logits of pi, ln s_k^2 (bounded to [-10, 10]).

    `kl` is that of component and z together against a uniform component and N(0, 1): an upper bound on the
    KL of z alone, by at most ln K nats; `monte_carlo_kl` estimates the latter. Likewise
    `entropy` is that of component and z together. The code is the likeliest component and its mean,
    uniformly quantised to `depth` bits.
    """

    components: ClassVar[int] = 4
    depth: ClassVar[int] = 1
    exact_kl: ClassVar[bool] = False

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        k = self.components
        size = (self.parameters.shape[1] - k) // 2
        means, logits, log_variances = self.parameters.split([size, k, size], dim=1)
        self.mu, log_variances = means.unflatten(1, (k, -1)), log_variances.unflatten(1, (k, -1))
        self.log_variance = log_variances.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)  # [B, K, D]
        self.log_shares = logits.log_softmax(dim=1)

    @classmethod
    def location_count(cls, dim: int) -> int:
        return cls.components * (dim + 1)

    @classmethod
    def spread_count(cls, dim: int) -> int:
        return cls.components * dim

    @classmethod
    def code_bits(cls, dim: int) -> int:
        return math.ceil(math.log2(cls.components)) + cls.depth * dim

    @classmethod
    def start(cls, dim: int, sharpness: float) -> tuple[Tensor, Tensor]:
        k = cls.components
        scale = torch.cat([constant(k * dim, 1.0), constant(k, sharpness)])
        return scale, constant(k * dim, -2 * math.log(sharpness))

    def sample(self, count: int = 1, generator: Generator | None = None, temperature: float = 0.5) -> Tensor:
        """A component, straight-through (the gradient is that of its share), then its Gaussian."""
        shares = self.log_shares.exp()
        drawn = uniform((count, len(shares), 1), shares, generator)
        chosen = (drawn >= shares.detach().cumsum(dim=1)).sum(dim=2).clamp(max=self.components - 1)
        hard = torch.nn.functional.one_hot(chosen, self.components).to(shares.dtype)
        noise = normal((count, len(shares), 1, self.mu.shape[2]), shares, generator)
        each = self.mu + (0.5 * self.log_variance).exp() * noise  # [count, B, K, D]
        return ((hard + (shares - shares.detach()))[..., None] * each).sum(dim=2)

    def mean(self) -> Tensor:
        return (self.log_shares.exp()[..., None] * self.mu).sum(dim=1)

    def unit_kl(self) -> Tensor:
        """[B, D + 1]: each dimension, given the component, then the component."""
        shares = self.log_shares.exp()
        gaussians = 0.5 * (self.mu.square() + self.log_variance.exp() - 1 - self.log_variance)
        per_dim = (shares[..., None] * gaussians).sum(dim=1)
        component = (shares * self.log_shares).sum(dim=1, keepdim=True) + math.log(self.components)
        return torch.cat([per_dim, component], dim=1)

    def monte_carlo_kl(self, count: int, generator: Generator | None = None) -> Tensor:
        """KL of z alone, [B], as the mean of `count` log-ratios; unbiased, not differentiable."""
        with torch.no_grad():
            z = self.sample(count, generator)[:, :, None]  # [count, B, 1, D]
            squares = (z - self.mu).square() / self.log_variance.exp()
            densities = self.log_shares - 0.5 * (squares + self.log_variance).sum(dim=3)
            return (densities.logsumexp(dim=2) + 0.5 * z[:, :, 0].square().sum(dim=2)).mean(dim=0)

    def entropy(self) -> Tensor:
        shares = self.log_shares.exp()
        gaussians = 0.5 * (math.log(2 * math.pi * math.e) + self.log_variance).sum(dim=2)
        return (shares * (gaussians - self.log_shares)).sum(dim=1)

    def saturated(self) -> Tensor:
        """Variances at their bounds."""
        return (self.log_variance.abs() >= LOG_VARIANCE_BOUND).float().mean()

    def symbols(self) -> Tensor:
        """[B, 1 + D]: the component, then its quantised mean."""
        chosen = self.log_shares.argmax(dim=1)
        mean = self.mu[torch.arange(chosen.shape[0], device=chosen.device), chosen]
        bound = loading(self.depth)
        return torch.cat([chosen[:, None], quantise(mean, -bound, bound, self.depth)], dim=1)

    def code(self) -> Tensor:
        symbols = self.symbols()
        component = binary_digits(symbols[:, :1], math.ceil(math.log2(self.components)))
        return torch.cat([component, gray_digits(symbols[:, 1:], self.depth)], dim=1)
