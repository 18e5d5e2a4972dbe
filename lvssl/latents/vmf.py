"""Family `vmf`: von Mises-Fisher, density ~ exp(kappa mu . z) on the sphere, prior uniform."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvssl.latents.beta import beta_variates
from lvssl.latents.noise import Noise, uniform
from lvssl.latents.posterior import refuse_second_derivatives
from lvssl.latents.sphere import Spherical, SphericalPosterior, log_surface

PROPOSALS = 27  # each is accepted with a probability of at least 0.66; all are rejected once in 10^12
DEVIATIONS = 12.0  # beyond this many, the angle's density is below fp64's resolution
NODES = 128
TAIL_NODES = 48  # for the gradient of each drawn number, where single precision suffices


@dataclass(frozen=True)
class VonMisesFisher(Spherical):
    """The angle t = arccos(w) has the density ~ exp(kappa cos t) sin^(D-2) t.

    Its normaliser and moments, which are made of Bessel functions of order about D / 2, are computed as
    integrals over that angle: Gauss-Legendre quadrature in fp64 around the mode, to 1e-12, for any D and
    kappa. Samples are drawn by rejection (Wood 1994, as in Davidson et al. 2018) among a fixed number of
    proposals, so that the host never waits for a GPU. Gradients are by implicit reparameterisation (Figurnov
    et al. 2018), without Davidson's bias.
    """

    about = "a von Mises-Fisher latent"

    def posterior(self, parameters: Tensor) -> "VonMisesFisherPosterior":
        return VonMisesFisherPosterior(parameters)


class VonMisesFisherPosterior(SphericalPosterior):
    def cosines(self, count: int, noise: Noise) -> Tensor:
        return _Implicit.apply(self.kappa, wood(self.kappa.detach(), self.dim, count, noise), self.dim)

    def mean_cosine(self) -> Tensor:
        return _Moments.apply(self.kappa, self.dim)[1]

    def exact_entropy(self) -> Tensor:
        """ln of the normaliser - kappa E[w]."""
        log_total, mean = _Moments.apply(self.kappa, self.dim)
        return log_surface(self.dim - 1) + log_total - self.kappa * mean


@lru_cache
def log_normaliser(kappa: float, dim: int) -> float:
    """ln of the integral of exp(kappa cos t) sin^(D-2) t over the angle t."""
    return _Moments.apply(torch.tensor([kappa], dtype=torch.float64), dim)[0].item()


def wood(kappa: Tensor, dim: int, count: int, noise: Noise) -> Tensor:
    """Draw `count` cosines w for each concentration [B], the first accepted proposal of each: [count, B]."""
    size = dim - 1
    b = size / (2 * kappa + (4 * kappa.square() + size**2).sqrt())
    x = (1 - b) / (1 + b)
    x, b = x[:, None], b[:, None]
    symmetric = kappa.new_full((len(kappa), PROPOSALS), size / 2)
    e = beta_variates(symmetric, symmetric, count, noise)[..., 0]
    w = (1 - (1 + b) * e) / (1 - (1 - b) * e)
    # log1p keeps the digits of x w and x^2, which are small where kappa is small.
    log_ratio = kappa[:, None] * (w - x) + size * (torch.log1p(-x * w) - torch.log1p(-x * x))
    accepted = uniform(w.shape, kappa, noise.shifted(2)).log() <= log_ratio
    first = accepted.to(torch.uint8).argmax(dim=2, keepdim=True)
    return w.gather(2, first)[..., 0]


def log_density(angle: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """ln(exp(kappa (cos t - 1)) sin^(D-2) t), unnormalised."""
    log_sine = angle.sin().clamp(min=1e-300).log()
    return -2 * kappa * (0.5 * angle).sin().square() + (dim - 2) * log_sine


def mode_and_width(kappa: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mode of the angle's density, and the standard deviation that follows from its curvature there."""
    curvature = ((dim - 2) ** 2 + 4 * kappa.square()).sqrt()
    cosine = 2 * kappa / (dim - 2 + curvature)
    return cosine.clamp(max=1.0).acos(), curvature.rsqrt()


@lru_cache
def legendre(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1]; cached, because they are found by solving an eigenvalue problem."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)


def integration(low: Tensor, high: Tensor, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights between low and high, each [nodes, ...]."""
    x, weights = legendre(nodes, low.device)
    shape = (-1, *(1,) * low.ndim)
    half = (high - low) / 2
    return low + half * (x.view(shape) + 1), half * weights.view(shape)


class _Moments(torch.autograd.Function):
    """kappa fp64 [B] -> ln of the angle's normaliser, E[cos t]."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        mode, width = mode_and_width(kappa, dim)
        low, high = (mode - DEVIATIONS * width).clamp(min=0), (mode + DEVIATIONS * width).clamp(max=math.pi)
        angle, weights = integration(low, high)
        logs = log_density(angle, kappa, dim)
        highest = logs.amax(dim=0)
        mass = weights * (logs - highest).exp()
        total = mass.sum(dim=0)
        deficit = 2 * (0.5 * angle).sin().square()  # 1 - cos t
        mean_deficit = (mass * deficit).sum(dim=0) / total
        variance = (mass * (deficit - mean_deficit).square()).sum(dim=0) / total
        mean = 1 - mean_deficit
        ctx.save_for_backward(mean, variance)
        return kappa + highest + total.log(), mean

    @staticmethod
    def backward(ctx: Any, of_log: Tensor, of_mean: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivatives("the normaliser of von Mises-Fisher")
        mean, variance = ctx.saved_tensors
        return of_log * mean + of_mean * variance, None


class _Implicit(torch.autograd.Function):
    """The drawn cosines [count, B], with dw / dkappa = sin t * (dF / dkappa) / f; F and f are the angle's
    distribution function and density."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, cosines: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(kappa, cosines)
        ctx.dim = dim
        return cosines.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivatives("a sample of von Mises-Fisher")
        kappa, cosines = ctx.saved_tensors
        dim = ctx.dim
        mean = _Moments.apply(kappa, dim)[1]
        angle = cosines.clamp(-1, 1).acos()
        mode, width = mode_and_width(kappa, dim)
        # dF / dkappa = integral of (cos - mean) f from 0 to t, or minus the one from t to pi; take the tail.
        below = angle < mode
        far = torch.where(below, angle - DEVIATIONS * width, angle + DEVIATIONS * width).clamp(0, math.pi)
        nodes, weights = integration(torch.minimum(angle, far), torch.maximum(angle, far), TAIL_NODES)
        ratio = (log_density(nodes, kappa, dim) - log_density(angle, kappa, dim)).exp()
        tail = (weights * (nodes.cos() - mean) * ratio).sum(dim=0)
        change = angle.sin() * torch.where(below, tail, -tail)
        return (grad * change).sum(dim=0), None, None
