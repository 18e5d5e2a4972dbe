"""Every family against torch.distributions, SciPy, Monte Carlo, enumeration and finite differences."""

import math

import pytest
import scipy.special
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Beta as TorchBeta
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Laplace, MixtureSameFamily, Normal, kl_divergence

from lvssl.latents import FAMILIES, family
from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.beta import FLOOR
from lvssl.latents.bits import pack, quantise
from lvssl.latents.categorical import Categorical
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.mixture import Mixture
from lvssl.latents.noise import keyed
from lvssl.latents.quantised import loading
from lvssl.latents.sign import Sign
from lvssl.latents.sphere import log_surface
from lvssl.latents.vmf import VonMisesFisher
from pipelines.kernels.pack import pack_bits

DIM = 8
PAIRS = ("gaussian+bernoulli", "categorical+vmf")
OPTIONS = {"categories": 4, "components": 2}
ALL = (*FAMILIES, *PAIRS)
STOCHASTIC = tuple(name for name in ALL if family(name).stochastic)


def of(name: str, parameters: torch.Tensor, **options):
    return family(name, **(OPTIONS | options)).posterior(parameters)


def parameters(name: str, rows: int = 5, scale: float = 2.0, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, family(name, **OPTIONS).parameter_count(dim), generator=generator)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(posterior, count: int, seed: int = 0, *temperature: float) -> torch.Tensor:
    """Samples, with the noise of a seed."""
    return posterior.sample(count, keyed(seed, len(posterior.parameters)), *temperature)


# ---- KL


def log_ratio(name: str, posterior, z: torch.Tensor) -> torch.Tensor:
    """ln q(z | x) - ln p(z) of fp64 samples [count, B, D], from other people's densities."""
    if name == "gaussian":
        q = Normal(posterior.mu, (posterior.log_variance / 2).exp())
        return (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(2)
    if name == "laplace":
        q = Laplace(posterior.mu, posterior.log_scale.exp())
        return (q.log_prob(z) - Laplace(0.0, 1.0).log_prob(z)).sum(2)
    if name == "bernoulli":
        return (TorchBernoulli(logits=posterior.logits).log_prob((z + 1) / 2) + math.log(2)).sum(2)
    if name == "categorical":
        p = 0.99 * posterior.logits.softmax(2) + 0.01 / 4
        q = TorchCategorical(probs=p)
        return (q.log_prob(z.unflatten(2, (-1, 4)).argmax(3)) + math.log(4)).sum(2)
    if name == "beta":
        x = ((z + 1) / 2).clamp(1e-300, 1 - 1e-16)
        return (TorchBeta(posterior.a, posterior.b).log_prob(x) - TorchBeta(1.1, 1.1).log_prob(x)).sum(2)
    if name == "mixture":
        return mixture_density(posterior)(z) - Normal(0.0, 1.0).log_prob(z).sum(2)
    cosine = (z * posterior.direction).sum(2)
    return spherical_log_density(name, posterior, cosine) + log_surface(DIM)


def mixture_density(posterior):
    parts = Normal(posterior.mu, (posterior.log_variance / 2).exp())
    parts = torch.distributions.Independent(parts, 1)
    return MixtureSameFamily(TorchCategorical(logits=posterior.log_shares), parts).log_prob


def monte_carlo_kl(posterior, count: int, seed: int) -> torch.Tensor:
    """A mixture's KL of z alone, [B], as the mean of `count` log-ratios in its own formula."""
    with torch.no_grad():
        z = drawn(posterior, count, seed)[:, :, None]  # [count, B, 1, D]
        squares = (z - posterior.mu).square() / posterior.log_variance.exp()
        densities = posterior.log_shares - 0.5 * (squares + posterior.log_variance).sum(dim=3)
        return (densities.logsumexp(dim=2) + 0.5 * z[:, :, 0].square().sum(dim=2)).mean(dim=0)


def spherical_log_density(name: str, posterior, cosine: torch.Tensor) -> torch.Tensor:
    kappa, d = posterior.kappa, posterior.dim
    if name == "vmf":
        bessel = torch.from_numpy(scipy.special.ive(d / 2 - 1, kappa.numpy())).log() + kappa
        return (d / 2 - 1) * kappa.log() - d / 2 * math.log(2 * math.pi) - bessel + kappa * cosine
    a, b = (d - 1) / 2 + kappa, (d - 1) / 2
    log_normaliser = (a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b)
    return kappa * torch.log1p(cosine) - log_normaliser


def assert_kl_is_monte_carlo(name: str, count: int) -> None:
    x = parameters(name, rows=2, scale=1.0).double()
    if name == "beta":
        x[:, DIM:] += 3  # at the very ends of (-1, 1) the sample has lost what its density needs
    posterior = of(name, x)
    with torch.no_grad():
        ratios = log_ratio(name, posterior, drawn(posterior, count, 3))
    error = 5 * ratios.std(0) / math.sqrt(count) + 1e-9
    exact = name != "mixture"  # whose KL is an upper bound
    expected = posterior.kl() if exact else monte_carlo_kl(posterior, count, 4)
    error = error * (1 if exact else math.sqrt(2))
    assert ((expected - ratios.mean(0)).abs() < error).all(), (expected, ratios.mean(0), error)


SINGLE = tuple(name for name in STOCHASTIC if name not in PAIRS)


@pytest.mark.parametrize("name", SINGLE)
def test_kl_is_the_mean_log_ratio_of_its_own_samples(name):
    assert_kl_is_monte_carlo(name, 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_kl_is_a_million_samples_mean_log_ratio(name):
    assert_kl_is_monte_carlo(name, 1_000_000)


def test_kl_is_torchs_where_torch_has_one():
    x = parameters("gaussian").double()
    mu, log_variance = x.chunk(2, dim=1)
    expected = kl_divergence(Normal(mu, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(Gaussian().posterior(x.float()).kl().double(), expected, rtol=1e-5)
    x = parameters("bernoulli").double()
    expected = kl_divergence(TorchBernoulli(logits=x), TorchBernoulli(probs=torch.full_like(x, 0.5))).sum(1)
    assert torch.allclose(Bernoulli().posterior(x.float()).kl().double(), expected, rtol=1e-5)
    x = parameters("laplace", scale=1.0).double()
    mu, log_scale = x.chunk(2, dim=1)
    expected = kl_divergence(Laplace(mu, log_scale.exp()), Laplace(0.0, 1.0)).sum(1)
    assert torch.allclose(of("laplace", x.float()).kl().double(), expected, rtol=1e-5)
    q = of("categorical", parameters("categorical").double())
    uniform = TorchCategorical(logits=torch.zeros_like(q.logits))
    expected = kl_divergence(TorchCategorical(probs=q.probabilities()), uniform).sum(1)
    assert torch.allclose(q.kl(), expected, rtol=1e-9)
    assert torch.allclose(of("categorical", q.parameters.float()).kl().double(), expected, rtol=1e-5)


def torchs_entropy(name: str, q) -> torch.Tensor:
    """That of a beta's 2z - 1, and of a mixture's component and z."""
    if name == "laplace":
        return Laplace(q.mu, q.log_scale.exp()).entropy().sum(1)
    if name == "bernoulli":
        return TorchBernoulli(logits=q.logits).entropy().sum(1)
    if name == "categorical":
        return TorchCategorical(probs=q.probabilities()).entropy().sum(1)
    if name == "beta":
        return (TorchBeta(q.a, q.b).entropy() + math.log(2)).sum(1)
    normals = Normal(q.mu, (q.log_variance / 2).exp()).entropy().sum(-1)
    if name == "gaussian":
        return normals
    shares = TorchCategorical(logits=q.log_shares)
    return shares.entropy() + (shares.probs * normals).sum(1)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli", "categorical", "beta", "mixture"])
def test_entropy_is_torchs(name):
    q = of(name, parameters(name, scale=1.0).double())
    torch.testing.assert_close(q.entropy(), torchs_entropy(name, q))


def test_kl_of_beta_is_exact_in_fp32_where_log_gammas_cancel():
    """Concentrations of 5,000 each: computed in fp32, torch's own formula is wrong in the third digit."""
    x = torch.cat([torch.full((1, 4), 0.3), torch.full((1, 4), 9.2)], dim=1)
    posterior = of("beta", x)
    expected = kl_divergence(
        TorchBeta(posterior.a.double(), posterior.b.double()),
        TorchBeta(torch.tensor(1.1).double(), torch.tensor(1.1).double()),
    ).sum(1)
    naive = kl_divergence(TorchBeta(posterior.a, posterior.b), TorchBeta(1.1, 1.1)).sum(1)
    assert (posterior.kl().double() / expected - 1).abs() < 1e-6
    assert (naive.double() / expected - 1).abs() > 1e-5


def test_beta_keeps_its_digits_where_the_mean_is_near_an_end():
    x = torch.tensor([[12.0, -12.0, 9.0, 9.0]])  # a total of 8,103, of which one side has 0.05
    found, exact = of("beta", x), of("beta", x.double())
    torch.testing.assert_close(torch.cat([found.a, found.b]), torch.cat([exact.a, exact.b]).float())


@pytest.mark.parametrize("name", ["vmf", "power_spherical"])
def test_kl_on_the_sphere_is_exact_in_fp32(name):
    x = parameters(name, dim=2048)
    x[:, -1] = torch.tensor([-9.0, 0.0, 5.0, 9.0, 11.0])
    torch.testing.assert_close(of(name, x).kl().double(), of(name, x.double()).kl(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 8, 128, 2048])
@pytest.mark.parametrize("kappa", [1e-4, 0.5, 30.0, 5e3, 1e5])
def test_von_mises_fishers_integrals_are_bessel_functions(dim, kappa):
    x = torch.zeros(1, dim + 1, dtype=torch.float64)
    x[0, -1] = math.log(kappa)
    posterior = VonMisesFisher().posterior(x)
    found = log_surface(dim - 1) - posterior.exact_entropy() + posterior.kappa * posterior.mean_cosine()
    log_bessel = scipy.special.ive(dim / 2 - 1, kappa)
    if log_bessel < 1e-200:  # SciPy underflows where the order is far above the argument
        pytest.skip("SciPy's ive is 0 here")
    constant = (dim / 2 - 1) * math.log(kappa) - dim / 2 * math.log(2 * math.pi)
    expected = -(
        constant - math.log(log_bessel) - kappa
    )  # ln of the integral of exp(kappa w) over the sphere
    entropy = expected - kappa * scipy.special.ive(dim / 2, kappa) / scipy.special.ive(dim / 2 - 1, kappa)
    ratio = scipy.special.ive(dim / 2, kappa) / scipy.special.ive(dim / 2 - 1, kappa)
    assert posterior.mean_cosine().item() == pytest.approx(ratio, rel=1e-9, abs=1e-12)
    assert posterior.exact_entropy().item() == pytest.approx(entropy, rel=1e-9, abs=1e-9 * max(1, kappa))
    assert found.isfinite()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_kls_gradient_is_finite_differences(name):
    """In fp64; what autograd can't differentiate twice is not asked to."""
    x = parameters(name, rows=2, scale=1.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: of(name, x).kl(), x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: of(name, x).entropy(), x, atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli", "beta", "power_spherical", "vmf"])
@pytest.mark.parametrize("what", ["sample", "kl"])
def test_second_derivatives_are_exact_or_refused(name, what):
    """Where the backward pass is written by hand, a penalty on the gradient would silently lack a part."""
    by_hand = name == "vmf" or (what == "sample" and name in ("beta", "power_spherical"))
    theta, direction = (parameters(name, seed=seed).double() for seed in (0, 1))

    def gradient(x, **how):
        posterior = of(name, x)
        value = posterior.kl() if what == "kl" else posterior.sample(2, keyed(0, len(x)))
        return torch.autograd.grad(value.sum(), x, **how)[0]

    theta.requires_grad_()
    if by_hand:
        with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\)"):
            gradient(theta, create_graph=True)
        return
    (product,) = torch.autograd.grad((gradient(theta, create_graph=True) * direction).sum(), theta)
    step = 1e-5 * direction
    either = [gradient((theta + sign * step).detach().requires_grad_()) for sign in (1, -1)]
    torch.testing.assert_close(product, (either[0] - either[1]) / 2e-5, rtol=1e-5, atol=1e-5)


def test_the_joint_bound_of_a_mixture_is_above_its_kl_by_at_most_the_components_bits():
    apart = torch.cat([torch.full((1, 4), 3.0), torch.full((1, 4), -3.0), torch.zeros(1, 2 + 8)], dim=1)
    for x, gap in ((apart, math.log(2)), (torch.zeros_like(apart), 0.0)):
        posterior = of("mixture", x.double())
        estimates = torch.stack([monte_carlo_kl(posterior, 5000, s) for s in range(20)])
        error = 5 * estimates.std() / math.sqrt(20) + 1e-6
        assert abs(posterior.kl() - estimates.mean() - gap) < error


# ---- samples


@pytest.mark.parametrize("name", ALL)
def test_samples_have_the_posteriors_mean(name):
    posterior = of(name, parameters(name, scale=1.0))
    samples = drawn(posterior, 20_000, 1).detach()
    assert samples.shape[1:] == posterior.mean().shape and samples.dtype == torch.float32
    error = 5 * samples.std(0) / math.sqrt(20_000) if len(samples) > 1 else torch.tensor(1e-6)
    assert ((samples.mean(0) - posterior.mean()).abs() <= error + 1e-5).all()


def test_samples_have_the_posteriors_variance():
    posterior = Gaussian().posterior(parameters("gaussian", scale=1.0))
    samples = drawn(posterior, 50_000, 2)
    assert torch.allclose(samples.var(0).log(), posterior.log_variance, atol=0.05)
    posterior = of("beta", parameters("beta", scale=1.0))
    samples = drawn(posterior, 50_000, 2)
    expected = 4 * TorchBeta(posterior.a, posterior.b).variance
    assert torch.allclose(samples.var(0), expected, rtol=0.08)
    posterior = of("mixture", parameters("mixture", scale=1.0))
    samples = drawn(posterior, 50_000, 2).detach()
    parts = Normal(posterior.mu.mT, (posterior.log_variance / 2).exp().mT)
    shares = TorchCategorical(logits=posterior.log_shares[:, None].expand(-1, DIM, -1))
    assert torch.allclose(samples.var(0), MixtureSameFamily(shares, parts).variance, rtol=0.06)


@pytest.mark.parametrize("name", ["vmf", "power_spherical"])
@pytest.mark.parametrize("dim, log_kappa", [(2, 1.0), (3, -3.0), (3, 9.0), (64, 5.5), (2048, 9.0)])
def test_directions_are_unit_vectors_whose_cosines_have_the_right_law(name, dim, log_kappa):
    """Against the cosine's cumulated density, integrated numerically: a Kolmogorov-Smirnov test."""
    location = torch.randn(1, dim, generator=generator(0))
    posterior = of(name, torch.cat([location, torch.full((1, 1), log_kappa)], dim=1).repeat(4000, 1))
    samples = drawn(posterior, 1, 1)
    assert torch.allclose(samples.norm(dim=2), torch.ones(1, 4000), atol=1e-5)
    angle = (posterior.cosines(1, keyed(1, 4000))[0]).clamp(-1, 1).acos().sort().values
    kappa, grid = posterior.kappa[0].item(), torch.linspace(1e-9, math.pi, 400_001, dtype=torch.float64)
    logs = (dim - 2) * grid.sin().clamp(min=1e-300).log()
    logs += kappa * (grid.cos() if name == "vmf" else torch.log1p(grid.cos().clamp(min=-1 + 1e-15)))
    distribution = (logs - logs.max()).exp().cumsum(0)
    expected = (distribution / distribution[-1])[torch.bucketize(angle, grid).clamp(max=400_000)]
    empirical = torch.arange(1, 4001) / 4000
    assert (expected - empirical).abs().max() < 1.95 / math.sqrt(4000)  # one run in 1,000 would fail


@pytest.mark.parametrize("name", ["vmf", "power_spherical"])
def test_a_mean_direction_without_length_is_the_first_axis(name):
    q = of(name, torch.tensor([[0.0, 0.0, 0.0, 2.0], [1e-13, 0.0, 1e-14, 2.0]]))
    assert torch.equal(q.direction, torch.eye(3)[[0, 0]])
    assert torch.allclose(drawn(q, 100).norm(dim=2), torch.ones(100, 2), atol=1e-5)


@pytest.mark.parametrize("name", ["vmf", "power_spherical"])
def test_how_far_a_direction_turns_does_not_depend_on_where_to(name):
    """In each of two dimensions as the mean, because noise that served both would show in one of them."""
    for location in ([1.0, 0.0], [0.0, 1.0]):
        z = drawn(of(name, torch.tensor([[*location, 1.0]]).repeat(20_000, 1)), 1)[0]
        far, side = z @ torch.tensor(location), (z @ torch.tensor(location[::-1])).sign()
        assert torch.corrcoef(torch.stack([far, side]))[0, 1].abs() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("name", ["gaussian", "beta", "power_spherical", "vmf"])
def test_the_samplers_gradient_is_that_of_the_expectation(name):
    """E[f(z)] differentiated through the sampler, against central differences of its mean."""
    x = parameters(name, rows=1, scale=0.7, dim=3, seed=1).double()
    weights = torch.tensor([0.3, -1.0, 0.6], dtype=torch.float64)

    def f(z):
        return ((z * weights).sum(-1) + 0.5 * (z.square() * weights).sum(-1)).squeeze(-1)

    count = 10_000 if name == "vmf" else 60_000  # of 24 proposals each
    leaf = x.clone().requires_grad_()
    each = f(drawn(of(name, leaf), count, 5))
    (found,) = torch.autograd.grad(each.mean(), leaf)
    numeric, step = torch.zeros_like(x), 0.1
    for i in range(x.numel()):
        change = torch.zeros_like(x)
        change.view(-1)[i] = step
        high, low = (f(drawn(of(name, x + s * change), count, 7)) for s in (1, -1))
        numeric.view(-1)[i] = (high.mean() - low.mean()) / (2 * step)
    # Where rejection draws differ on both sides nothing cancels: five deviations of the difference.
    error = 5 * each.detach().std() * math.sqrt(2 / count) / (2 * step) + 0.01
    assert ((found - numeric).abs() < error).all(), (found, numeric, error)


def test_a_mixtures_samples_have_the_gradient_of_its_mean_in_its_shares_too():
    x = parameters("mixture", rows=1, scale=1.0, dim=3).requires_grad_()
    q, weights = of("mixture", x), torch.tensor([0.3, -1.0, 0.6])
    (found,) = torch.autograd.grad((drawn(q, 20_000).mean(0) * weights).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((q.mean() * weights).sum(), x)
    error = 5 * weights.norm() * (q.log_variance / 2).exp().max() / math.sqrt(20_000)
    assert ((found - expected).abs() < error).all() and expected[0, 6:8].abs().min() > 2 * error


@pytest.mark.parametrize("dim, kappa", [(2, 3.0), (3, 0.5), (8, 20.0), (512, 2000.0)])
def test_von_mises_fishers_implicit_gradient_is_that_of_its_quantile(dim, kappa):
    """dw / dkappa of a drawn cosine, against differences of numerically found quantiles."""
    x = torch.zeros(1, dim + 1, dtype=torch.float64)
    x[0, -1] = math.log(kappa)
    leaf = x.requires_grad_()
    cosines = VonMisesFisher().posterior(leaf).cosines(5, keyed(0, 1))[:, 0]
    grid = torch.linspace(1e-9, math.pi, 2_000_001, dtype=torch.float64)

    def distribution(k: float) -> torch.Tensor:
        logs = (dim - 2) * grid.sin().clamp(min=1e-300).log() + k * grid.cos()
        mass = (logs - logs.max()).exp()
        summed = torch.cat([mass.new_zeros(1), ((mass[1:] + mass[:-1]) / 2).cumsum(0)])
        return summed / summed[-1]

    middle, distributions = distribution(kappa), [distribution(kappa * (1 + s)) for s in (-1e-3, 1e-3)]
    for w in cosines:
        (found,) = torch.autograd.grad(w, leaf, retain_graph=True)
        place = ((w.detach().acos() - grid[0]) / (grid[1] - grid[0])).item()
        at = int(place)
        quantile = middle[at] + (place - at) * (middle[at + 1] - middle[at])
        angles = []
        for one in distributions:
            right = int(torch.searchsorted(one, quantile))
            share = (quantile - one[right - 1]) / (one[right] - one[right - 1])
            angles.append(grid[right - 1] + share * (grid[1] - grid[0]))
        numeric = (angles[1].cos() - angles[0].cos()) / 2e-3  # with respect to ln kappa
        assert found[0, -1].item() == pytest.approx(numeric.item(), rel=2e-3, abs=1e-7)


def test_beta_is_right_at_its_floor_where_torch_below_is_not():
    """Moments at a = b = 0.01, where nearly all mass is at the ends; far below, torch's are wrong."""
    posterior = of("beta", torch.cat([torch.zeros(1, 2), torch.full((1, 2), -50.0)], dim=1))
    assert posterior.a.unique().item() == posterior.b.unique().item() == pytest.approx(FLOOR)
    z = drawn(posterior, 200_000, 0)
    assert z.mean().abs() < 5 / math.sqrt(400_000)
    assert z.var().item() == pytest.approx(4 * TorchBeta(FLOOR, FLOOR).variance.item(), rel=0.01)


def test_bernoulli_samples_are_signs_with_the_gradient_of_the_mean():
    logits = parameters("bernoulli").requires_grad_()
    posterior = Bernoulli().posterior(logits)
    sample = drawn(posterior, 1, 0)
    assert set(sample.detach().unique().tolist()) == {-1.0, 1.0}
    weights = torch.randn_like(sample)
    (sample * weights).sum().backward()
    straight_through = logits.grad.clone()
    expectation = torch.autograd.grad((posterior.mean() * weights[0]).sum(), logits)[0]
    assert torch.allclose(straight_through, expectation, atol=1e-6)


def test_categorical_samples_are_one_hot_with_the_gradient_of_the_chances():
    logits = parameters("categorical").requires_grad_()
    posterior = of("categorical", logits)
    sample = drawn(posterior, 3, 0)
    groups = sample.detach().unflatten(2, (-1, 4))
    assert torch.equal(groups.sum(3), torch.ones(3, 5, 2)) and set(groups.unique().tolist()) == {0.0, 1.0}
    weights = torch.randn_like(sample)
    (found,) = torch.autograd.grad((sample * weights).sum(), logits)
    (expected,) = torch.autograd.grad((posterior.mean() * weights.sum(0)).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_relaxed_samples_harden_to_the_discrete_law(name):
    posterior = of(name, parameters(name, scale=1.0), relaxed=True)
    soft, hard = (drawn(posterior, 20_000, 1, t).detach() for t in (1.0, 1e-3))
    if name == "bernoulli":
        chosen = (soft > 0).float() * 2 - 1
    else:
        groups = soft.unflatten(2, (-1, 4))
        chosen = torch.nn.functional.one_hot(groups.argmax(3), 4).float().flatten(2)
        assert torch.allclose(groups.sum(3), torch.ones(()), atol=1e-5)
    error = 5 * chosen.std(0) / math.sqrt(20_000) + 1e-6
    # Its sign or argmax has the discrete distribution.
    assert ((chosen.mean(0) - posterior.mean()).abs() < error).all()
    assert (hard - chosen).abs().mean() < 2e-3


def test_the_relaxed_bernoullis_kl_is_monte_carlo_and_above_the_discrete():
    logits = torch.tensor([[0.005], [0.5], [-2.0], [6.0]], dtype=torch.float64)
    posterior = Bernoulli().posterior(logits)
    noise = torch.rand(400_000, 1, 1, dtype=torch.float64, generator=generator(0)).logit()
    x = logits + noise  # a concrete sample is a one-to-one function of it
    ratio = (-noise - 2 * torch.nn.functional.softplus(-noise)) - (-x - 2 * torch.nn.functional.softplus(-x))
    error = 5 * ratio.std(0) / math.sqrt(400_000) + 1e-6
    found = (logits * (0.5 * logits).tanh().reciprocal() - 2).sum(dim=1)  # as docs/latents.md has it
    assert ((found - ratio.mean((0, 2))).abs() < error[:, 0]).all()
    assert (found > posterior.kl()).all()


def straight_through_bias(name: str, f, logits: torch.Tensor, outcomes: torch.Tensor, chance) -> float:
    """Largest error of the mean straight-through gradient of E[f], relative to the exact one's norm."""
    leaf = logits.clone().requires_grad_()
    exact = torch.autograd.grad((chance(leaf) * f(outcomes)).sum(), leaf)[0]
    samples = drawn(of(name, leaf), 400_000, 3)
    estimate = torch.autograd.grad(f(samples[:, 0]).mean(), leaf)[0]
    return ((estimate - exact).abs().max() / exact.norm()).item()


def linear(z):
    return z @ torch.linspace(0.7, -0.3, z.shape[-1])


def quadratic(z):
    return z @ torch.linspace(0.7, -0.3, z.shape[-1]) + 0.5 * (z @ torch.linspace(0.2, 1.0, z.shape[-1])) ** 2


@pytest.mark.parametrize("f, biased", [(linear, False), (quadratic, True)])
def test_the_straight_through_gradient_is_exact_for_linear_functions_and_biased_for_others(f, biased):
    """Enumerated: two bits, and one group of four categories. The bias is stated, not hidden."""
    outcomes = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])

    def bits(x):
        p = x.sigmoid()
        return torch.where(outcomes > 0, p, 1 - p).prod(1)

    def one_of_four(x):
        return 0.99 * x.softmax(1)[0] + 0.01 / 4

    cases = {
        "bernoulli": (torch.tensor([[0.4, -1.1]]), outcomes, bits),
        "categorical": (torch.tensor([[0.4, -1.1, 0.2, 0.9]]), torch.eye(4), one_of_four),
    }
    for name, (logits, possible, chance) in cases.items():
        bias = straight_through_bias(name, f, logits, possible, chance)
        print(f"{name}, {f.__name__}: bias {100 * bias:.1f} % of the exact gradient")
        assert (bias > 0.05) == biased


@pytest.mark.parametrize("name", ALL)
def test_the_same_noise_gives_the_same_sample(name):
    posterior = of(name, parameters(name))
    torch.manual_seed(1)
    a = drawn(posterior, 3, 9)
    torch.manual_seed(2)
    assert torch.equal(a, drawn(posterior, 3, 9))


# ---- extremes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [-1e4, -50.0, -1e-4, 0.0, 1e-4, 50.0, 1e4])
@pytest.mark.parametrize("relaxed", [False, True])
def test_extremes_stay_finite(name, value, relaxed):
    if relaxed and not family(name).discrete:
        return
    x = torch.full((2, family(name, **OPTIONS).parameter_count(DIM)), value, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            posterior = of(name, x if not enabled else x.bfloat16(), relaxed=relaxed)
            figures = (
                posterior.kl(), drawn(posterior, 2), posterior.uncertainty(), posterior.entropy(),
                posterior.mean(),
            )  # fmt: skip
            everything = sum(figure.sum() for figure in figures)
        assert all(figure.dtype == torch.float32 and figure.isfinite().all() for figure in figures)
        gradient = torch.autograd.grad(everything, x)[0]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("spread", [-18.4, -9.2, 9.2, 18.4])
def test_narrow_and_wide_posteriors_stay_finite(name, spread):
    """s from 1e-4 to 1e4 (and beyond their bounds), concentrations likewise, beside ordinary locations."""
    kind = family(name, **OPTIONS)
    locations = parameters(name, rows=4)[:, : kind.location_count(DIM)]
    x = torch.cat([locations, torch.full((4, kind.scale_count(DIM)), spread)], dim=1).requires_grad_()
    posterior = kind.posterior(x)
    everything = posterior.kl().sum() + drawn(posterior, 3, 0).sum() + posterior.entropy().sum()
    assert everything.isfinite() and torch.autograd.grad(everything, x)[0].isfinite().all()
    assert (posterior.kl() >= -1e-5).all()


@pytest.mark.parametrize(("name", "low", "high"), [
    ("gaussian", -10.0, 10.0), ("mixture", -10.0, 10.0), ("laplace", -5.0, 5.0), ("beta", -10.0, 10.0),
    ("vmf", -10.0, 12.0), ("power_spherical", -10.0, 12.0),
])  # fmt: skip
def test_a_scale_beyond_its_bounds_is_the_one_at_them(name, low, high):
    kind = family(name, **OPTIONS)
    locations = parameters(name, rows=4)[:, : kind.location_count(DIM)]
    for bound in (low, high):
        there, beyond = (
            kind.posterior(torch.cat([locations, torch.full((4, kind.scale_count(DIM)), scale)], dim=1))
            for scale in (bound, 1.5 * bound)
        )
        assert torch.equal(there.kl(), beyond.kl()) and torch.equal(drawn(there, 2), drawn(beyond, 2))


@pytest.mark.parametrize("name", ALL)
def test_no_image_is_no_error(name):
    posterior = of(name, parameters(name, rows=0))
    assert posterior.kl().shape == (0,) and drawn(posterior, 2).shape == (
        2 if family(name).stochastic else 1,
        0,
        DIM,
    )
    assert posterior.code().shape == (0, family(name, **OPTIONS).code_bits(DIM))


# ---- codes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("depth", [1, 3])
def test_codes_are_deterministic_and_of_the_stated_length(name, depth):
    x = parameters(name)
    kind = family(name, **OPTIONS, depth=depth)
    posterior = kind.posterior(x)
    assert posterior.code().shape == (5, kind.code_bits(DIM)) and posterior.code().dtype == torch.bool
    assert torch.equal(posterior.code(), kind.posterior(x).code())
    assert torch.equal(posterior.code()[2:3], kind.posterior(x[2:3]).code())
    assert (pack(posterior.code()).numpy() == pack_bits(posterior.code())).all()
    if hasattr(posterior, "symbols"):
        assert posterior.symbols().dtype == torch.int64 and len(posterior.symbols()) == 5


@pytest.mark.parametrize("name", ALL)
def test_where_all_parameters_are_zero_no_bit_is_on(name):
    """As in the kernels, and in codes of features."""
    assert not of(name, torch.zeros(1, family(name, **OPTIONS).parameter_count(DIM))).code().any()


def test_codes_of_several_bits_are_quantised_means_in_gray_digits():
    """Neighbouring levels differ in one bit, and the levels of a sorted mean are sorted."""
    mu = torch.linspace(-4, 4, 1000)[:, None]
    posterior = of("gaussian", torch.cat([mu, torch.zeros(1000, 1)], dim=1), depth=3)
    levels = posterior.symbols()[:, 0]
    assert levels.unique().tolist() == list(range(8)) and (levels.diff() >= 0).all()
    changes = (posterior.code()[1:] != posterior.code()[:-1]).sum(1)
    assert changes.max() == 1 and changes.sum() == 7
    one = of("gaussian", torch.cat([mu, torch.zeros(1000, 1)], dim=1))
    assert torch.equal(one.code()[:, 0], mu[:, 0] > 0)


def test_quantisers_have_equal_intervals_and_borders_belong_to_the_lower():
    values = torch.tensor([-9.0, -0.5, -0.25, 0.0, 0.1, 0.25, 0.26, 9.0])
    assert quantise(values, -0.5, 0.5, 2).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    beta = of("beta", torch.cat([torch.linspace(-3, 3, 300)[:, None], torch.zeros(300, 1)], dim=1), depth=3)
    assert torch.equal(beta.symbols(), (4 * (beta.mean() + 1)).long())  # all of (-1, 1)


@pytest.mark.parametrize("depth, best", [(1, 1.596), (2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881)])
def test_quantisers_of_normals_are_nearly_the_best(depth, best):
    """The steps of Max 1960, table II."""
    assert abs(2 * loading(depth) / 2**depth / best - 1) < 0.27


def test_a_categorys_bits_are_its_number():
    posterior = of("categorical", parameters("categorical"))
    bits = posterior.code().unflatten(1, (-1, 2)).long()
    assert torch.equal(bits[..., 0] + 2 * bits[..., 1], posterior.symbols())


def test_uncertainty_grows_with_the_spread():
    sharp, flat = (of("bernoulli", torch.full((1, DIM), logit)) for logit in (6.0, 0.5))
    assert sharp.uncertainty() < flat.uncertainty() <= DIM * math.log(2)
    for name, high_is_narrow in (
        ("gaussian", False),
        ("beta", True),
        ("vmf", True),
        ("power_spherical", True),
    ):
        x = parameters(name, rows=1).repeat(2, 1)
        x[:, DIM:] = torch.tensor([[-1.0], [4.0]])
        low, high = of(name, x).uncertainty()
        assert (low > high) == high_is_narrow, name


def test_the_uncertainty_of_beta_is_its_log_variance():
    q = of("beta", parameters("beta", scale=1.0).double())
    torch.testing.assert_close(q.uncertainty(), TorchBeta(q.a, q.b).variance.log().sum(1))


@pytest.mark.parametrize("name", SINGLE)
def test_init_scale_is_how_narrow_the_posterior_starts(name):
    """The deviation of logits, 1 / s, kappa / D; a beta about 0 has s = 1 / sqrt(1 + init_scale^2)."""
    kind = family(name, **OPTIONS)
    factors, start = kind.initial_head(DIM, 4.0)
    q = kind.posterior(torch.cat([torch.zeros(kind.location_count(DIM)), start])[None])
    others = len(factors) - {"bernoulli": DIM, "categorical": DIM, "mixture": 2}.get(name, 0)
    assert (factors[:others] == (2 if name == "beta" else 1)).all() and (factors[others:] == 4).all()
    found = torch.tensor(4.0)
    if name in ("gaussian", "mixture"):
        found = (-q.log_variance / 2).exp()
    elif name == "laplace":
        found = (-q.log_scale).exp()
    elif name == "beta":
        found = (1 / (4 * TorchBeta(q.a, q.b).variance) - 1).sqrt()
    elif name in ("vmf", "power_spherical"):
        found = q.kappa.float() / DIM
    torch.testing.assert_close(found, torch.full_like(found, 4.0))


# Parameters, the same in every place, within the range in which they learn, and beyond it.
RANGES = {
    "gaussian": [(9.9,), (-10.1, 10.1)],
    "laplace": [(4.9,), (-5.1, 5.1)],
    "bernoulli": [(-6.9, 6.9), (-7.1, 7.1)],
    "mixture": [(9.9,), (-10.1, 10.1)],
    "vmf": [(-9.9, 11.9), (-10.1, 12.1)],
    "power_spherical": [(-9.9, 11.9), (-10.1, 12.1)],
    "beta": [(-1.0, 3.0), (-6.0,)],  # a and b at their floor
    "gaussian+bernoulli": [(-6.9, 6.9), (-7.1, 7.1)],  # the larger of the two shares
}


@pytest.mark.parametrize("name", RANGES)
def test_saturated_is_what_lies_beyond_the_bounds(name):
    for share, values in enumerate(RANGES[name]):
        for value in values:
            x = torch.full((2, family(name, **OPTIONS).parameter_count(DIM)), value)
            assert of(name, x).saturated() == share, value


def test_a_group_of_categories_is_saturated_from_a_thousandth_off_certain():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]])  # 0.9996 and 0.997
    assert of("categorical", logits).saturated() == 0.5


@pytest.mark.parametrize("name", ["none", "sign"])
def test_without_a_latent_bits_lie_about_the_thresholds_and_short_features_are_uncertain(name):
    q, (features, thresholds) = of(name, parameters(name)), parameters(name).chunk(2, dim=1)
    assert torch.equal(q.code(), features > thresholds)
    torch.testing.assert_close(q.uncertainty(), -features.square().sum(dim=1).sqrt())


def test_sign_bits_are_about_the_batch_mean_with_the_gradient_of_a_tanh():
    """Of twice the standardised feature: as steep as Bernoulli bits are at the start."""
    features = torch.rand(8, DIM, dtype=torch.float64, requires_grad=True)
    bits = Sign().posterior(torch.cat([features, torch.zeros(8, DIM)], dim=1)).straight_through_bits()
    assert torch.equal(bits, torch.where(features > features.mean(0), 1.0, -1.0))
    weights = torch.randn(8, DIM, dtype=torch.float64)
    (found,) = torch.autograd.grad((bits * weights).sum(), features)
    soft = (2 * (features - features.mean(0)) / (features.std(0, correction=0) + 1e-6)).tanh()
    (expected,) = torch.autograd.grad((soft * weights).sum(), features)
    torch.testing.assert_close(found, expected)


def test_bernoulli_bits_have_the_gradient_of_their_mean_alone_and_in_a_pair():
    x = parameters("gaussian+bernoulli").requires_grad_()
    bits, logits = of("gaussian+bernoulli", x).straight_through_bits(), x[:, 4:8]
    assert torch.equal(bits, torch.where(logits > 0, 1.0, -1.0))
    weights = torch.randn(5, 4)
    (found,) = torch.autograd.grad((bits * weights).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(((2 * logits.sigmoid() - 1) * weights).sum(), x)
    torch.testing.assert_close(found, expected)
    assert of("gaussian+vmf", parameters("gaussian+vmf")).straight_through_bits() is None


def test_bit_means_are_the_chances_of_a_one():
    x = parameters("bernoulli")
    torch.testing.assert_close(of("bernoulli", x).bit_means(), TorchBernoulli(logits=x).probs)


# ---- names


def test_families_are_found_by_name_and_unknown_ones_are_refused():
    assert family("categorical", categories=8) == Categorical(categories=8) != Categorical()
    assert family("categorical", categories=8).code_bits(64) == 24 and Categorical().categories == 16
    assert family("mixture", components=2, categories=3) == Mixture(components=2)
    pair = family("gaussian+bernoulli")
    assert pair.code_bits(10) == 10 and pair.parameter_count(9) == 2 * 4 + 5
    assert pair.default_beta == Gaussian().default_beta > Bernoulli().default_beta  # what either needs
    assert family("vmf").validation_error(1) and not family("vmf").validation_error(2)
    assert pair.discrete and not family("gaussian+vmf").discrete  # what either has
    for wrong in ("gauss", "gaussian+gauss", "none+gaussian", "gaussian+beta+vmf", ""):
        with pytest.raises(ValueError, match=r"known|can be combined"):
            family(wrong)
