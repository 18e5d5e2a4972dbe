"""Every family against torch.distributions, Monte Carlo, enumeration and finite differences."""

import math

import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal, kl_divergence

from lvssl.latents import FAMILIES
from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.sign import Sign

DIM = 6


def parameters(family: str, rows: int = 5, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, FAMILIES[family].parameter_count(DIM), generator=generator)


def reference_kl(family: str, params: torch.Tensor) -> torch.Tensor:
    params = params.double()
    if family == "gaussian":
        mu, log_variance = params.chunk(2, dim=1)
        return kl_divergence(Normal(mu, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    if family == "bernoulli":
        return kl_divergence(
            TorchBernoulli(logits=params), TorchBernoulli(probs=torch.full_like(params, 0.5))
        ).sum(1)
    return torch.zeros(len(params), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_torchs(family):
    params = parameters(family)
    assert torch.allclose(
        FAMILIES[family](params).kl().double(), reference_kl(family, params), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_kl_is_a_million_samples_log_ratio(family):
    params = parameters(family, rows=1, scale=1.0)
    if family == "gaussian":
        mu, log_variance = params.chunk(2, dim=1)
        q, p = Normal(mu, (log_variance / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    else:
        q, p = TorchBernoulli(logits=params), TorchBernoulli(logits=torch.zeros_like(params))
    torch.manual_seed(0)
    z = q.sample((1_000_000,))
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    error = 5 * ratio.std() / 1000
    assert abs(FAMILIES[family](params).kl() - ratio.mean()) < error


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.stochastic])
def test_the_kls_gradient_is_finite_differences(family):
    params = parameters(family, rows=2, scale=1.0).double()
    x = params.clone().requires_grad_()
    FAMILIES[family](x).kl().sum().backward()
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = 1e-3
        numeric = (
            reference_kl(family, params + step.view_as(x)) - reference_kl(family, params - step.view_as(x))
        ).sum() / 2e-3
        assert abs(numeric - x.grad.view(-1)[i]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_posteriors_mean(family):
    posterior = FAMILIES[family](parameters(family, scale=1.0))
    samples = posterior.sample(20_000, torch.Generator().manual_seed(1)).detach()
    assert samples.shape[1:] == posterior.mean().shape
    error = 5 * samples.std(0) / math.sqrt(20_000) if len(samples) > 1 else torch.tensor(1e-6)
    assert ((samples.mean(0) - posterior.mean()).abs() <= error + 1e-6).all()


def test_gaussian_samples_have_the_posteriors_variance():
    posterior = Gaussian(parameters("gaussian", scale=1.0))
    samples = posterior.sample(50_000, torch.Generator().manual_seed(2))
    assert torch.allclose(samples.var(0).log(), posterior.log_variance, atol=0.05)


def test_bernoulli_samples_are_signs_with_the_gradient_of_the_mean():
    logits = parameters("bernoulli").requires_grad_()
    posterior = Bernoulli(logits)
    sample = posterior.sample(1, torch.Generator().manual_seed(0))
    assert set(sample.detach().unique().tolist()) == {-1.0, 1.0}
    weights = torch.randn_like(sample)
    (sample * weights).sum().backward()
    straight_through = logits.grad.clone()
    expectation = torch.autograd.grad((posterior.mean() * weights[0]).sum(), logits)[0]
    assert torch.allclose(straight_through, expectation, atol=1e-6)


def test_the_straight_through_gradient_is_exact_for_linear_functions_and_biased_for_others():
    """Two bits, enumerated: f = w.z is unbiased, f = (sum z)^2 isn't. The bias is stated, not hidden."""
    logits = torch.tensor([[0.4, -1.1]], dtype=torch.float32, requires_grad=True)
    p = logits.sigmoid()
    outcomes = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    chance = torch.where(outcomes > 0, p, 1 - p).prod(1)
    for f, biased in ((lambda z: z @ torch.tensor([0.7, -0.3]), False), (lambda z: z.sum(-1) ** 2, True)):
        exact = torch.autograd.grad((chance * f(outcomes)).sum(), logits, retain_graph=True)[0]
        samples = Bernoulli(logits).sample(400_000, torch.Generator().manual_seed(3))
        estimate = torch.autograd.grad(f(samples[:, 0]).mean(), logits)[0]
        assert ((estimate - exact).abs().max() > 0.02) == biased


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [-50.0, -1e-4, 0.0, 1e-4, 50.0, 1e4])
def test_extremes_stay_finite(family, value):
    params = torch.full((2, FAMILIES[family].parameter_count(DIM)), value, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            posterior = FAMILIES[family](params)
            everything = posterior.kl().sum() + posterior.sample(2).sum() + posterior.uncertainty().sum()
        assert posterior.kl().dtype == torch.float32
        gradient = torch.autograd.grad(everything, params)[0]
        assert everything.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_deterministic_and_of_the_stated_length(family):
    params = parameters(family)
    posterior = FAMILIES[family](params)
    assert (
        posterior.code().shape == (5, FAMILIES[family].code_bits(DIM))
        and posterior.code().dtype == torch.bool
    )
    assert torch.equal(posterior.code(), FAMILIES[family](params).code())
    assert torch.equal(posterior.code()[2:3], FAMILIES[family](params[2:3]).code())


def test_uncertainty_grows_with_the_spread():
    sharp, flat = Bernoulli(torch.full((1, DIM), 6.0)), Bernoulli(torch.full((1, DIM), 0.5))
    assert sharp.uncertainty() < flat.uncertainty() <= DIM * math.log(2)
    narrow, wide = (Gaussian(torch.tensor([[0.0, ln]])) for ln in (-3.0, 1.0))
    assert narrow.uncertainty() < wide.uncertainty()


def test_the_same_generator_gives_the_same_sample():
    posterior = Bernoulli(parameters("bernoulli"))
    a, b = (posterior.sample(3, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(a, b)


def test_sign_bits_are_about_the_batch_mean_and_carry_a_gradient():
    features = torch.rand(8, DIM, requires_grad=True)
    bits = Sign(torch.cat([features, torch.zeros(8, DIM)], dim=1)).straight_through_bits()
    assert torch.equal(bits.detach() > 0, features > features.mean(0))
    weights = torch.linspace(-1, 1, 8 * DIM).view(8, DIM)
    (bits * weights).sum().backward()
    assert features.grad.abs().min() > 0
