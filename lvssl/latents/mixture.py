"""Family `mixture`: z ~ sum_k pi_k N(mu_k, s_k^2), one component for the whole code, prior N(0, 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvssl.latents.bits import binary_digits, gray_digits, quantise
from lvssl.latents.gaussian import LOG_VARIANCE_BOUND
from lvssl.latents.noise import Noise, normal, uniform
from lvssl.latents.posterior import Family, Posterior, constant
from lvssl.latents.quantised import loading


@dataclass(frozen=True)
class Mixture(Family):
    """`parameters` is [B, K * D + K + K * D]: mu_k, logits of pi, ln s_k^2 (clamped to [-10, 10]).

    `kl` is the joint one of component and z, against a uniform component and N(0, 1). It exceeds the KL of z
    alone by at most ln K nats. Likewise `entropy` is the joint entropy of component and z. The code is the
    likeliest component and its mean, uniformly quantised to `depth` bits.
    """

    components: int = 4
    depth: int = 1

    about = "a mixture-of-Gaussians latent"

    def location_count(self, dim: int) -> int:
        return self.components * (dim + 1)

    def scale_count(self, dim: int) -> int:
        return self.components * dim

    def code_bits(self, dim: int) -> int:
        return math.ceil(math.log2(self.components)) + self.depth * dim

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        k = self.components
        scale = torch.cat([constant(k * dim, 1.0), constant(k, init_scale)])
        return scale, constant(k * dim, -2 * math.log(init_scale))

    def posterior(self, parameters: Tensor) -> "MixturePosterior":
        return MixturePosterior(parameters, self.components, self.depth)


class MixturePosterior(Posterior):
    def __init__(self, parameters: Tensor, components: int, depth: int) -> None:
        super().__init__(parameters)
        self.components, self.depth, k = components, depth, components
        size = (self.parameters.shape[1] - k) // 2
        means, logits, log_variances = self.parameters.split([size, k, size], dim=1)
        self.mu, log_variances = means.unflatten(1, (k, -1)), log_variances.unflatten(1, (k, -1))
        self.log_variance = log_variances.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)  # [B, K, D]
        self.log_shares = logits.log_softmax(dim=1)

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        """Draw a component, straight-through with the gradient of its share, then from its Gaussian."""
        shares = self.log_shares.exp()
        drawn = uniform((count, len(shares), 1), shares, noise)
        chosen = (drawn >= shares.detach().cumsum(dim=1)).sum(dim=2).clamp(max=self.components - 1)
        hard = torch.nn.functional.one_hot(chosen, self.components).to(shares.dtype)
        normals = normal((count, len(shares), 1, self.mu.shape[2]), shares, noise.shifted(1))
        each = self.mu + (0.5 * self.log_variance).exp() * normals  # [count, B, K, D]
        return ((hard + (shares - shares.detach()))[..., None] * each).sum(dim=2)

    def mean(self) -> Tensor:
        return (self.log_shares.exp()[..., None] * self.mu).sum(dim=1)

    def unit_kl(self) -> Tensor:
        """[B, D + 1]: the KL of each dimension given the component, then that of the component."""
        shares = self.log_shares.exp()
        gaussians = 0.5 * (self.mu.square() + self.log_variance.exp() - 1 - self.log_variance)
        per_dim = (shares[..., None] * gaussians).sum(dim=1)
        component = (shares * self.log_shares).sum(dim=1, keepdim=True) + math.log(self.components)
        return torch.cat([per_dim, component], dim=1)

    def entropy(self) -> Tensor:
        shares = self.log_shares.exp()
        gaussians = 0.5 * (math.log(2 * math.pi * math.e) + self.log_variance).sum(dim=2)
        return (shares * (gaussians - self.log_shares)).sum(dim=1)

    def saturated(self) -> Tensor:
        """Share of variances at their bounds."""
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
