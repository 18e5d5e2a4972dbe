"""Each objective against a dozen lines of its own, on the outputs of a small network; and that it is pure."""

import dataclasses
import math

import pytest
import scipy.special
import torch

from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet, Outputs
from lvssl.settings.pretrain import LatentSettings, ModelSettings, PretrainSettings
from lvssl.training.objective import objective

MODEL = ModelSettings(backbone="tiny", hidden=16, projection=8)


def outputs(**latent) -> tuple[Outputs, PretrainSettings]:
    settings = PretrainSettings(model=MODEL, latent=LatentSettings(**latent), temperature=0.2)
    settings.validate()
    torch.manual_seed(0)
    network = LVNet(MODEL, settings.latent, 8)
    return network(torch.randn(12, 3, 8, 8), keyed(1, 12), 0.5), settings


def info_nce(u: torch.Tensor, decoupled: bool = False) -> torch.Tensor:
    """-log share of each anchor's positive, [2B], anchor by anchor."""
    u = torch.nn.functional.normalize(u.double(), dim=1)
    losses = []
    for i in range(len(u)):
        j = (i + len(u) // 2) % len(u)
        others = [k for k in range(len(u)) if k != i and not (decoupled and k == j)]
        losses.append((u[i] @ u[others].T / 0.2).logsumexp(0) - u[i] @ u[j] / 0.2)
    return torch.stack(losses)


def test_ntxent_with_rate_clean_path_and_decorrelation():
    out, settings = outputs(
        beta=0.1, free_nats=20.0, decorrelation=0.3, clean_path_weight=0.25, beta_schedule="constant"
    )
    logits = out.parameters.double()
    kl = (logits.sigmoid() * logits - torch.nn.functional.softplus(logits) + math.log(2)).sum(1)
    bits = torch.where(logits > 0, 1.0, -1.0)
    covariance = torch.cov(bits.T, correction=0)
    penalty = (covariance.square().sum() - covariance.diagonal().square().sum()) / bits.shape[1]
    expected = 0.75 * info_nce(out.projections).mean() + 0.25 * info_nce(out.clean_projections).mean()
    expected += 0.1 * kl.clamp(min=20.0).mean() + 0.3 * penalty
    assert objective(out, settings, 0.0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_bits_of_h_are_decorrelated_where_the_code_is_longer():
    for dim, given, weight in (
        (300, 0.02, 0.02),
        (300, 0.3, 0.3),
        (8, 0.3, 0.3),
        (300, 0.0, 0.0),
    ):
        out, settings = outputs(dim=dim, decorrelation=given, clean_path_weight=0.0, beta=0.0)
        longer = dim > out.features.shape[1]
        values = out.features.double() - out.features.double().mean(0) if longer else out.parameters.double()
        covariance = torch.cov(torch.where(values > 0, 1.0, -1.0).T, correction=0)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        expected = info_nce(out.projections).mean() + weight * off / len(covariance)
        found = objective(out, settings, 0.5)
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        (grad,) = torch.autograd.grad(found["loss"], [out.features])
        assert grad.isfinite().all() and grad.abs().sum() > 0
    assert "decorrelation" not in found


@pytest.mark.parametrize("average", ["samples", "projections", "losses"])
def test_ntxent_on_the_mean_and_on_each(average):
    out, settings = outputs(sample_reduction=average)
    each = [out.projections] if out.projections.ndim == 2 else list(out.projections)
    assert len(each) == (4 if average == "losses" else 1)
    expected = torch.stack([info_nce(u).mean() for u in each]).mean()
    found = objective(out, settings, 0.5)
    assert found["ntxent"].item() == found["distortion"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_dcl():
    out, settings = outputs(family="gaussian", objective="dcl")
    found = objective(out, settings, 0.5)["dcl"]
    assert found.item() == pytest.approx(info_nce(out.projections, decoupled=True).mean().item(), rel=1e-5)


def test_mcinfonce():
    out, settings = outputs(family="vmf", site="proj", objective="mcinfonce")
    shares = torch.stack([(-info_nce(u)).exp() for u in out.projections])
    expected = -shares.mean(0).log().mean()
    assert objective(out, settings, 0.5)["distortion"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_hib_learns_its_scale():
    out, settings = outputs(family="gaussian", site="proj", objective="hib")
    found = objective(out, settings, 0.5)
    found["loss"].backward()
    assert found["distortion"].isfinite() and out.match_parameters is not None


@pytest.mark.parametrize("family", ["vmf", "power_spherical"])
def test_the_conditional_entropy_bottleneck(family):
    """C-SimCLR's two terms, the residual information by 200,000 samples of the forward encoder e."""
    out, settings = outputs(family=family, site="proj", objective="ceb", ceb_weight=0.5, ceb_kappa=6.0)
    posterior, d, k = out.posterior, 8, 6.0
    mu = posterior.direction.detach().double()
    bessel = scipy.special.ive(d / 2 - 1, [k, *posterior.kappa.tolist()])
    log_c = [
        (d / 2 - 1) * math.log(x) - d / 2 * math.log(2 * math.pi) - math.log(b) - x
        for x, b in zip([k, *posterior.kappa.tolist()], bessel)
    ]
    z = posterior.sample(20_000, keyed(2, 12)).detach().double()
    cosine = (z * mu).sum(2)
    if family == "vmf":
        log_e = torch.tensor(log_c[1:]).double() + posterior.kappa.detach() * cosine
    else:
        a, b = (d - 1) / 2 + posterior.kappa.detach(), (d - 1) / 2
        constant = (a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b)
        log_e = posterior.kappa.detach() * torch.log1p(cosine) - constant
    log_b = log_c[0] + k * (z * mu.roll(6, 0)).sum(2)
    ratio = (log_e - log_b).mean(1)
    found = objective(out, settings, 0.5)
    error = 5 * ratio.std() / math.sqrt(20_000)
    assert abs(found["residual_nats"].item() - ratio.mean()) < error
    scores = k * out.projections.detach().double() @ mu.T
    scores[:, range(12), range(12)] = -torch.inf
    partners = [(i + 6) % 12 for i in range(12)]
    contrast = (scores.logsumexp(2) - scores[:, range(12), partners]).mean()
    assert found["ceb_contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    expected = 0.5 * found["residual_nats"] + found["ceb_contrast"]
    assert found["distortion"].item() == pytest.approx(expected.item(), rel=1e-6)
    share = settings.latent.clean_path_weight
    assert found["loss"].item() == pytest.approx(
        ((1 - share) * expected + share * found["ntxent_clean"]).item(), rel=1e-5
    )


@pytest.mark.parametrize("latent", [
    {}, {"family": "gaussian"}, {"family": "vmf", "site": "proj", "objective": "ceb"},
    {"family": "gaussian", "objective": "hib"}, {"family": "categorical", "sample_reduction": "losses"},
])  # fmt: skip
def test_it_can_be_evaluated_on_detached_tensors(latent):
    """As an engine with gradient caching does: leaves in, gradients out, the same as through the network."""
    out, settings = outputs(**latent)
    tensors = {
        "parameters": out.parameters,
        "projections": out.projections,
        "clean_projections": out.clean_projections,
    }
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    loss = objective(dataclasses.replace(out, **leaves), settings, 0.5)["loss"]
    again = objective(dataclasses.replace(out, **leaves), settings, 0.5)["loss"]
    assert torch.equal(loss, again)
    found = torch.autograd.grad(loss, list(leaves.values()))
    whole = objective(out, settings, 0.5)["loss"]
    assert whole.item() == pytest.approx(loss.item(), rel=1e-6)
    (projected,) = torch.autograd.grad(whole, [out.clean_projections], retain_graph=True)
    assert torch.allclose(projected, found[2], atol=1e-7)
