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
        beta=0.2,
        free_nats=20.0,
        decorrelation=0.3,
        clean_path_weight=0.25,
        beta_schedule="warmup",
        beta_warmup=0.5,
    )
    logits = out.parameters.double()
    kl = (logits.sigmoid() * logits - torch.nn.functional.softplus(logits) + math.log(2)).sum(1)
    bits = torch.where(logits > 0, 1.0, -1.0)
    covariance = torch.cov(bits.T, correction=0)
    penalty = (covariance.square().sum() - covariance.diagonal().square().sum()) / bits.shape[1]
    expected = 0.75 * info_nce(out.projections).mean() + 0.25 * info_nce(out.clean_projections).mean()
    expected += 0.1 * kl.clamp(min=20.0).mean() + 0.3 * penalty
    halfway = objective(out, settings, 0.25)  # through the warm-up of beta
    assert halfway["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


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


def spread(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """VICReg's invariance, variance and covariance."""
    views = u.double().chunk(2)
    covariances = [torch.cov(view.T) for view in views]
    low = torch.stack([1 - (c.diagonal() + 1e-4).sqrt() for c in covariances]).clamp(min=0).mean()
    off = sum(c.square().sum() - c.diagonal().square().sum() for c in covariances) / u.shape[1]
    return (views[0] - views[1]).square().mean(), low, off


@pytest.mark.parametrize("latent", [
    {"family": "none"}, {"family": "bernoulli", "clean_path_weight": 0.3},
    {"invariance": 5.0, "covariance": 2.0}, {"family": "gaussian", "sample_reduction": "losses", "beta": 0.0},
])  # fmt: skip
def test_vicreg_is_the_base_of_control_and_latent_alike(latent):
    out, settings = outputs(objective="vicreg", decorrelation=0.0, **latent)
    weights = latent.get("invariance", 25.0), 25.0, latent.get("covariance", 1.0)

    def weighed(u: torch.Tensor) -> torch.Tensor:
        return sum(weight * part for weight, part in zip(weights, spread(u), strict=True))

    each = [out.projections] if out.projections.ndim == 2 else list(out.projections)
    expected = torch.stack([weighed(u) for u in each]).mean()
    found = objective(out, settings, 0.5)
    assert found["distortion"].item() == pytest.approx(expected.item(), rel=1e-5)
    if out.clean_projections is not None:
        share = settings.latent.clean_path_weight
        expected = (1 - share) * expected + share * weighed(out.clean_projections)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name,given",
    [("ntxent", (3.0, 0.5)), ("dcl", (3.0, 0.5)), ("ntxent-vc", (None, None)), ("ntxent-vc", (0.0, 2.0))],
)
def test_variance_and_covariance_stand_beside_a_contrastive_loss(name, given):
    variance, covariance = given
    out, settings = outputs(objective=name, variance=variance, covariance=covariance, decorrelation=0.0)
    weights = [usual if weight is None else weight for weight, usual in zip(given, (5.0, 1.0))]
    total, loss = 0.0, name.removesuffix("-vc")
    for u, share in ((out.projections, 0.3), (out.clean_projections, 0.7)):
        expected = {loss: info_nce(u, decoupled=name == "dcl").mean()}
        expected |= dict(zip(("invariance", "variance", "covariance"), spread(u)))
        total += share * (
            expected[loss] + weights[0] * expected["variance"] + weights[1] * expected["covariance"]
        )
        if u is out.projections:
            parts = expected
    found = objective(out, settings, 0.5)
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert {key: found[key].item() for key in parts} == pytest.approx(
        {key: part.item() for key, part in parts.items()}, rel=1e-5
    )


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
        ((1 - share) * expected + share * found["distortion_clean"]).item(), rel=1e-5
    )


PUBLISHED = {
    "family": "vmf", "site": "proj", "objective": "ceb", "posterior_scale": "fixed", "init_scale": 1024 / 8,
    "samples": 1, "clean_path_weight": 0.0,
}  # fmt: skip


def test_c_simclr_as_published():
    """Lee et al. 2021, eq. 8: kappa_e is 1,024 whatever the image, kappa_b 10, weight 1, one sample."""
    out, settings = outputs(**PUBLISHED)
    posterior = out.posterior
    assert torch.allclose(posterior.kappa, torch.full((12,), 1024.0, dtype=torch.float64), rtol=1e-6)
    assert settings.latent.final_beta == 0 and out.clean_projections is None and len(out.projections) == 1

    e_mean, z = posterior.direction.detach().double(), out.projections[0].detach().double()
    log_c = [
        3 * math.log(k) - 4 * math.log(2 * math.pi) - math.log(scipy.special.ive(3, k)) - k
        for k in (1024, 10)
    ]
    b = log_c[1] + 10 * z @ e_mean.T  # log b(z_i | x_j)
    own, other = range(12), [(i + 6) % 12 for i in range(12)]
    wrong = [[j for j in range(12) if j != i] for i in range(12)]
    log_share = torch.stack([b[i, other[i]] - b[i, wrong[i]].logsumexp(0) for i in own])
    # E log e - log b is in closed form in ours; the mean resultant length of e is I_4 / I_3.
    length = scipy.special.ive(4, 1024) / scipy.special.ive(3, 1024)
    agreement = (e_mean * e_mean[other]).sum(1)
    residual = log_c[0] + 1024 * length - log_c[1] - 10 * length * agreement
    found = objective(out, settings, 0.5)
    assert found["loss"].item() == pytest.approx((residual - log_share).mean().item(), rel=1e-5)

    sampled = posterior.sample(20_000, keyed(2, 12)).detach().double()
    log_e = log_c[0] + 1024 * (sampled * e_mean).sum(2)
    ratio = (log_e - log_c[1] - 10 * (sampled * e_mean[other]).sum(2)).mean(0)
    assert (ratio - residual).abs().max() < 5 * math.sqrt(3.5 / 20_000)  # log e has a variance of (d - 1) / 2


def test_the_published_concentration_stays_and_moves_nothing_but_the_direction():
    """After steps on the loss it is what it was; the gradient of a vector's length along itself is none."""
    out, settings = outputs(**PUBLISHED)
    parameters = out.parameters.detach().requires_grad_()
    posterior = out.family.posterior(parameters)
    changed = dataclasses.replace(out, parameters=parameters, projections=posterior.sample(1, keyed(1, 12)))
    (grad,) = torch.autograd.grad(objective(changed, settings, 0.5)["loss"], [parameters])
    along = (grad[:, :-1] * posterior.direction).sum(1).abs() / grad[:, :-1].norm(dim=1)
    assert along.max() < 1e-4 and grad[:, :-1].norm(dim=1).min() > 0
    torch.manual_seed(0)
    network = LVNet(MODEL, settings.latent, 8)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    images = torch.randn(12, 3, 8, 8)
    for _ in range(3):
        optimiser.zero_grad()
        out = network(images, keyed(1, 12))
        objective(out, settings, 0.5)["loss"].backward()
        optimiser.step()
    kappa = network(images, keyed(1, 12)).posterior.kappa
    assert torch.allclose(kappa, torch.full_like(kappa, 1024.0), rtol=1e-6)


@pytest.mark.parametrize("latent", [
    {}, {"family": "gaussian"}, {"objective": "vicreg"}, {"family": "gaussian", "objective": "hib"},
    {"family": "vmf", "site": "proj", "objective": "ceb"},
    {"family": "categorical", "sample_reduction": "losses"},
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
