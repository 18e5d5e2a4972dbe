"""Base of the distributions on the sphere S^(D-1) about a mean direction, `vmf` and `power_spherical`."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lvssl.latents.noise import Noise, normal
from lvssl.latents.posterior import Family, Posterior, constant

LOG_CONCENTRATION = (-10.0, 12.0)  # bounds of ln kappa


@dataclass(frozen=True)
class Spherical(Family):
    """`parameters` is [B, D + 1]: the mean direction at any length (a zero vector: the first axis), ln kappa.

    z = w mu + sqrt(1 - w^2) v, where v is uniform among the unit vectors orthogonal to mu, and the cosine w
    follows the family's distribution; samples are unit vectors. The prior is uniform on the sphere. Whatever
    depends on kappa alone is one number per image, computed in fp64. The code is the sign bits of mu.
    """

    on_sphere = True

    def scale_count(self, dim: int) -> int:
        return 1

    def validation_error(self, dim: int) -> str:
        return "at least 2 for a distribution on a sphere" if dim < 2 else ""

    def initial_head(self, dim: int, init_scale: float) -> tuple[Tensor, Tensor]:
        """Start with kappa = init_scale * D, for which the mean resultant length hardly depends on D."""
        return constant(dim, 1.0), constant(1, math.log(init_scale * dim))


class SphericalPosterior(Posterior):
    """Posterior with any distribution of the cosine w."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(parameters)
        location, log_kappa = self.parameters[:, :-1], self.parameters[:, -1]
        self.dim = location.shape[1]
        self.direction = unit(location)
        self.kappa = log_kappa.double().clamp(*LOG_CONCENTRATION).exp()  # [B]

    @abstractmethod
    def cosines(self, count: int, noise: Noise) -> Tensor:
        """Draw w, differentiable, fp64 [count, B], from up to three streams of the noise."""

    @abstractmethod
    def mean_cosine(self) -> Tensor:
        """E[w], fp64 [B]."""

    @abstractmethod
    def exact_entropy(self) -> Tensor:
        """Entropy of q in nats, fp64 [B]."""

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> Tensor:
        w = self.cosines(count, noise.shifted(1))[..., None]
        sine = (1 - w.square()).clamp(min=1e-24).sqrt()
        mu = self.direction
        drawn = normal((count, *mu.shape), mu, noise)
        tangent = drawn - (drawn * mu).sum(dim=2, keepdim=True) * mu
        tangent = torch.nn.functional.normalize(tangent, dim=2)
        if self.dim < 8:  # the draw may lie along mu, which leaves rounding errors of it
            tangent = tangent - (tangent * mu).sum(dim=2, keepdim=True) * mu
            tangent = torch.nn.functional.normalize(tangent, dim=2)
        return w.to(mu.dtype) * mu + sine.to(mu.dtype) * tangent

    def mean(self) -> Tensor:
        return self.mean_cosine().to(self.direction.dtype)[:, None] * self.direction

    def unit_kl(self) -> Tensor:
        """[B, 1]: the whole direction is one unit."""
        exact = log_surface(self.dim) - self.exact_entropy()
        return exact.to(self.direction.dtype)[:, None]

    def entropy(self) -> Tensor:
        return self.exact_entropy().to(self.direction.dtype)

    def saturated(self) -> Tensor:
        """Share of concentrations at their bounds."""
        low, high = LOG_CONCENTRATION
        log_kappa = self.parameters[:, -1]
        return ((log_kappa <= low) | (log_kappa >= high)).float().mean()

    def code(self) -> Tensor:
        return self.parameters[:, :-1] > 0


def unit(vectors: Tensor) -> Tensor:
    """Normalise vectors [B, D]; a vector without a direction becomes the first axis."""
    norms = vectors.norm(dim=1, keepdim=True)
    axis = torch.zeros_like(vectors)
    axis[:, :1].fill_(1)
    return torch.where(norms <= 1e-12, axis, vectors / norms.clamp(min=1e-12))  # NaN stays NaN


def log_surface(dim: int) -> float:
    """Logarithm of the area of the unit sphere in `dim` dimensions, 2 pi^(D/2) / Gamma(D/2)."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
