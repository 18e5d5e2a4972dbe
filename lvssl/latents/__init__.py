"""Posteriors over the latent code: one file a family, chosen by name.

A posterior holds the parameters of one factorised distribution per image, in fp32 whatever the autocast.
A new family is one file and one line in FAMILIES.
"""

from typing import Any

from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.beta import Beta
from lvssl.latents.categorical import Categorical
from lvssl.latents.concat import Concat
from lvssl.latents.deterministic import Deterministic
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.laplace import Laplace
from lvssl.latents.mixture import Mixture
from lvssl.latents.posterior import Posterior
from lvssl.latents.power_spherical import PowerSpherical
from lvssl.latents.sign import Sign
from lvssl.latents.vmf import VonMisesFisher

FAMILIES: dict[str, type[Posterior]] = {
    "none": Deterministic,
    "sign": Sign,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "beta": Beta,
    "mixture": Mixture,
    "power_spherical": PowerSpherical,
    "vmf": VonMisesFisher,
    "laplace": Laplace,
}


def family(name: str, **options: Any) -> type[Posterior]:
    """The family of that name, or two side by side: `gaussian+bernoulli`.

    Args:
        options: class attributes of the family, such as `categories`, `components`, `depth` (bits a dimension
            of the code), `relaxed`; those that a family doesn't have are left out.

    Raises:
        ValueError: an unknown name; it lists the known ones.
    """
    if "+" in name:
        parts = tuple(family(part, **options) for part in name.split("+"))
        if len(parts) != 2 or not all(part.stochastic for part in parts):
            raise ValueError(f"{name!r}: two families with a latent can stand side by side")
        return configured(Concat, parts=parts)
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}, or two of them joined by +")
    return configured(FAMILIES[name], **options)


def configured(kind: type[Posterior], **options: Any) -> type[Posterior]:
    """A subclass with these class attributes."""
    chosen = {name: value for name, value in options.items() if hasattr(kind, name)}
    return type(kind.__name__, (kind,), chosen)
