"""The loss of a step, a function of what the network gave and of the settings alone."""

import math

from torch import Tensor

from lvssl.config import PretrainSettings
from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.sign import Sign
from lvssl.losses.ntxent import ntxent
from lvssl.losses.objective import batch_mean, beta_at, decorrelation, rate
from lvssl.models.network import Outputs


def objective(outputs: Outputs, settings: PretrainSettings, fraction: float) -> dict[str, Tensor]:
    """The loss and its parts, from the posteriors and projections of 2B views.

    A pure function: nothing is drawn, kept or changed, so that it may also be evaluated on detached tensors
    of a whole batch (`dataclasses.replace(outputs, parameters=..., projections=...)`).

    Args:
        fraction: of the training that is done, in [0, 1]: the weight of the rate depends on it.
    """
    latent, temperature = settings.latent, settings.temperature
    sampled = ntxent(outputs.projections, temperature)
    distortion = sampled
    figures = {}
    if outputs.clean_projections is not None:
        clean = ntxent(outputs.clean_projections, temperature)
        distortion = (1 - latent.clean) * sampled + latent.clean * clean
        figures["ntxent_clean"] = clean
    nats = rate(outputs.posterior.kl(), latent.free_nats)
    loss = distortion + beta_at(fraction, latent.final_beta, latent.beta_warmup) * nats
    posterior = outputs.posterior
    if latent.decorrelation > 0 and isinstance(posterior, Bernoulli | Sign):
        over_ranks = {"batch_mean": batch_mean} if isinstance(posterior, Sign) else {}
        penalty = decorrelation(posterior.straight_through_bits(**over_ranks))
        loss = loss + latent.decorrelation * penalty
        figures["decorrelation"] = penalty
    return {"loss": loss, "ntxent": sampled, "rate_bits": nats / math.log(2), **figures}
