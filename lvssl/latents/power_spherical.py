"""Family `power_spherical`: (1 + mu . z)^kappa on the sphere (De Cao & Aziz 2020), prior uniform."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvssl.latents.beta import beta_variates
from lvssl.latents.noise import Noise
from lvssl.latents.sphere import Spherical, SphericalPosterior


@dataclass(frozen=True)
class PowerSpherical(Spherical):
    """(w + 1) / 2 ~ Beta((D - 1) / 2 + kappa, (D - 1) / 2); no rejection, closed forms of entropy and KL."""

    about = "a power spherical latent"

    def posterior(self, parameters: Tensor) -> "PowerSphericalPosterior":
        return PowerSphericalPosterior(parameters)


class PowerSphericalPosterior(SphericalPosterior):
    def cosines(self, count: int, noise: Noise) -> Tensor:
        b = torch.full_like(self.kappa, (self.dim - 1) / 2)[:, None]
        drawn = beta_variates(self.kappa[:, None] + b, b, count, noise)[:, :, 0]
        return drawn[..., 0] - drawn[..., 1]

    def mean_cosine(self) -> Tensor:
        return self.kappa / (self.kappa + self.dim - 1)

    def exact_entropy(self) -> Tensor:
        """-ln N - kappa (ln 2 + psi(a) - psi(a + b)), the paper's equation 14, with the Beta's a and b."""
        half = (self.dim - 1) / 2
        a, total = self.kappa + half, self.kappa + 2 * half
        log_normaliser = total * math.log(2) + half * math.log(math.pi) + a.lgamma() - total.lgamma()
        return log_normaliser - self.kappa * (math.log(2) + a.digamma() - total.digamma())
