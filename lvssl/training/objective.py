"""The loss of a step, a function of the network's outputs and the settings alone."""

import math

import torch
from torch import Tensor

from lvssl.latents.sign import straight_through_signs
from lvssl.latents.sphere import SphericalPosterior, log_surface
from lvssl.latents.vmf import log_normaliser
from lvssl.losses.ntxent import ntxent
from lvssl.losses.objective import batch_mean, beta_at, decorrelation, rate
from lvssl.losses.stochastic import match_loss, sample_infonce
from lvssl.losses.variants import decoupled_ntxent, mc_infonce, vicreg
from lvssl.models.network import Outputs
from lvssl.settings.pretrain import OF_VECTORS, LatentSettings, PretrainSettings

Figures = dict[str, Tensor]


def objective(outputs: Outputs, settings: PretrainSettings, fraction: float) -> Figures:
    """Compute the loss and its parts from the posteriors and projections of 2B views.

    This is a pure function: nothing is drawn, kept or changed, so it can also be evaluated on detached
    tensors of a whole batch (`dataclasses.replace(outputs, features=..., parameters=..., kl=None, ...)`).

        loss = (1 - clean) * distortion + clean * the base loss of the clean path
             + beta(t) * rate + decorrelation of hard bits, the code's or those of h

    Args:
        fraction: share of the training that is done, in [0, 1], on which the weight of the rate depends.
    """
    latent = settings.latent
    sampled, figures = distortion(outputs, settings)
    loss = sampled
    if outputs.clean_projections is not None:
        clean, _ = of_vectors(outputs.clean_projections, settings)
        loss = (1 - latent.clean_path_weight) * sampled + latent.clean_path_weight * clean
        figures["distortion_clean"] = clean
    kl = outputs.posterior.kl() if outputs.kl is None else outputs.kl
    nats = rate(kl, latent.free_nats)
    loss = loss + rate_weight(latent, fraction) * nats
    if latent.decorrelation and (bits := penalised_bits(outputs)) is not None:
        figures["decorrelation"] = decorrelation(bits)
        loss = loss + latent.decorrelation * figures["decorrelation"]
    return {"loss": loss, "distortion": sampled, "rate_bits": nats / math.log(2), **figures}


def rate_weight(latent: LatentSettings, fraction: float) -> float:
    """Return beta(t) when `fraction` of the training is done."""
    return beta_at(fraction, latent.final_beta, latent.beta_warmup, latent.beta_schedule, latent.beta_cycles)


def penalised_bits(outputs: Outputs) -> Tensor | None:
    """Return the bits to decorrelate, [N, D], or None if there are none.

    These are the code's bits, unless the code is longer than h. Its bits are then dependent whatever h is,
    and the batch is often too small to tell, so that the penalty would lead to bits that are hardly ever on.
    The sign bits of h are penalised instead.
    """
    features, bits = outputs.features, outputs.posterior.straight_through_bits(batch_mean)
    if bits is None or bits.shape[1] <= features.shape[1]:
        return bits
    wide = torch.promote_types(features.dtype, torch.float32)
    return straight_through_signs(features.to(wide), batch_mean)


def distortion(outputs: Outputs, settings: PretrainSettings) -> tuple[Tensor, Figures]:
    """Return the loss of the sampled path, `--objective`, and its parts, if it has any."""
    name, u, temperature = settings.latent.objective, outputs.projections, settings.temperature
    if name in OF_VECTORS:
        each = [of_vectors(v, settings) for v in (u[None] if u.ndim == 2 else u)]
        if len(each) == 1:
            return each[0]
        losses, parts = zip(*each)
        return torch.stack(losses).mean(), {
            key: torch.stack([p[key] for p in parts]).mean() for key in parts[0]
        }
    if name == "mcinfonce":
        return mc_infonce(u, temperature), {}
    if name == "hib":
        assert outputs.match_parameters is not None
        return match_loss(u, outputs.match_parameters), {}
    return bottleneck(outputs, settings)


def of_vectors(u: Tensor, settings: PretrainSettings) -> tuple[Tensor, Figures]:
    """Return NT-Xent, DCL or VICReg of vectors [2B, P] with weighted variance and covariance, and its parts,
    unweighted."""
    latent = settings.latent
    parts: Figures = {}
    if latent.objective == "vicreg" or any(latent.spread):
        parts = vicreg(u)._asdict()
    if latent.objective == "vicreg":
        loss = latent.invariance * parts["invariance"]
    elif latent.objective == "dcl":
        loss = parts["dcl"] = decoupled_ntxent(u, settings.temperature)
    else:
        loss = parts["ntxent"] = ntxent(u, settings.temperature)
    for name, weight in zip(("variance", "covariance"), latent.spread):
        if weight:
            loss = loss + weight * parts[name]
    return loss, parts


def bottleneck(outputs: Outputs, settings: PretrainSettings) -> tuple[Tensor, Figures]:
    """C-SimCLR's conditional-entropy bottleneck (Lee et al. 2021): bounds of weight * I(x; z | y) - I(y; z).

    With e(z | x) the posterior and b(z | y) a von Mises-Fisher distribution of concentration kappa_b about
    the other view's mean direction, the residual information is
    KL(e || b) = -H(e) - kappa_b E[z] . mu_y - ln C, in closed form, where the paper draws samples.
    """
    posterior, kappa = outputs.posterior, settings.latent.ceb_kappa
    assert isinstance(posterior, SphericalPosterior)
    towards = posterior.direction.roll(len(posterior.direction) // 2, dims=0)
    constant = log_surface(posterior.dim - 1) + log_normaliser(kappa, posterior.dim)
    agreement = (posterior.mean() * towards).sum(dim=1)
    residual = (constant - posterior.entropy() - kappa * agreement).mean()
    contrast = sample_infonce(outputs.projections, posterior.direction, kappa)
    found = settings.latent.ceb_weight * residual + contrast
    return found, {"residual_nats": residual, "ceb_contrast": contrast}
