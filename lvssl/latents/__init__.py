"""Posteriors over the latent code: one file per family, chosen by name.

A family holds the options of a distribution, and turns the parameters that a network predicts for B images
into their posterior. A new family takes one file and one line in FAMILIES.
"""

import dataclasses
from typing import Any

from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.beta import Beta
from lvssl.latents.categorical import Categorical
from lvssl.latents.concat import Concat
from lvssl.latents.deterministic import Deterministic
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.laplace import Laplace
from lvssl.latents.mixture import Mixture
from lvssl.latents.posterior import Family, Posterior
from lvssl.latents.power_spherical import PowerSpherical
from lvssl.latents.sign import Sign
from lvssl.latents.vmf import VonMisesFisher

__all__ = ["FAMILIES", "WITHOUT_LATENT", "Family", "Posterior", "described", "families_with", "family"]

FAMILIES: dict[str, type[Family]] = {
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


# The families without a latent, whose runs serve as controls, as messages list them.
WITHOUT_LATENT = " or ".join(name for name, kind in FAMILIES.items() if not kind.stochastic)


def family(name: str, **options: Any) -> Family:
    """Return the family `name`, or two side by side, as in `gaussian+bernoulli`.

    Args:
        options: fields of the family, such as `categories`, `components`, `depth` (bits a dimension of the
            code), `relaxed`; options that the family doesn't have are ignored.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or the two can't be combined.
    """
    if "+" in name:
        parts = tuple(family(part, **options) for part in name.split("+"))
        if len(parts) != 2 or not all(part.stochastic for part in parts):
            raise ValueError(f"{name!r}: only two families with a latent can be combined")
        return Concat(parts)
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}, or two of them joined by +")
    kind = FAMILIES[name]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{option: value for option, value in options.items() if option in known})


def families_with(option: str) -> list[str]:
    """Return the names of the families that have an option, such as `depth`."""
    return [name for name, kind in FAMILIES.items() if option in {f.name for f in dataclasses.fields(kind)}]


def described(name: str) -> str:
    """Describe a family's latent (`Family.about`); a name that only another version knows is named itself."""
    try:
        return family(name).about
    except ValueError:
        return f"a {name} latent"
