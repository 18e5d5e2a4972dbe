"""Keyed noise: the same in a compiled loop and in plain torch, by place and not by rank; against SciPy."""

import json
import math

import pytest
import scipy.stats
import torch
import triton_kernels

from lvssl.latents import FAMILIES, family
from lvssl.latents.noise import (
    GAMMA_PROPOSALS,
    Noise,
    key_of,
    keyed,
    log_gammas,
    normals,
    plain_log_gammas,
    plain_uniforms,
    rows_of,
    uniforms,
)

ROWS = torch.tensor([0, 1, 77, 2**31 + 5, 2**32 - 1])
PAIRS = ("gaussian+gaussian", "beta+vmf", "mixture+bernoulli")


@pytest.mark.parametrize("key", [0, 1, 2**62 + 12345, -1, key_of(42, 1000)])
@pytest.mark.parametrize(("dim", "count", "stream"), [(1, 1, 0), (7, 4, 1), (16, 6, 200), (0, 2, 0)])
def test_the_compiled_uniforms_are_those_of_plain_torch(key, dim, count, stream):
    """Bit for bit: it is what a GPU draws."""
    noise = Noise(torch.tensor([key]), ROWS, stream)
    found = uniforms(noise, dim, count)
    assert found.shape == (count, 5, dim) and torch.equal(found, plain_uniforms(noise, dim, count))


def test_the_compiled_gamma_variates_are_those_of_plain_torch():
    """To the rounding of a logarithm: both take the same proposals."""
    shapes = torch.tensor([0.01, 0.3, 0.999, 1.0, 1.5, 30.0, 2e4, 1e8]).repeat(500, 1)
    noise = keyed(3, 500).shifted(2)
    torch.testing.assert_close(
        log_gammas(shapes, 3, noise), plain_log_gammas(shapes, 3, noise), rtol=1e-12, atol=1e-12
    )


def test_the_interpreted_kernel_draws_the_gamma_variates_of_plain_torch():
    pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")
    (line,) = triton_kernels.run("latents/gammas_interpreted.py", TRITON_INTERPRET="1")
    assert json.loads(line) == {"compared": 30}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_gamma_variates_are_those_of_a_cpu(dtype):
    """Of a million, none is accepted on one side alone: that takes two numbers within 10^-15."""
    shapes = torch.rand(1000, 256, generator=torch.Generator().manual_seed(0), dtype=dtype) * 10 + 0.01
    noise = keyed(5, 1000)
    there = Noise(*(part.cuda() for part in noise[:2]), noise.stream)
    found = log_gammas(shapes.cuda(), 4, there).cpu()
    torch.testing.assert_close(found, log_gammas(shapes, 4, noise), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [0.01, 0.5, 1.0, 1.1, 7.0, 5000.0])
def test_gamma_variates_have_scipys_distribution(shape):
    found = log_gammas(torch.full((1, 20_000), shape), 1, keyed(1, 1)).flatten().numpy()
    exact = scipy.stats.loggamma(shape)
    assert scipy.stats.kstest(found, exact.cdf).pvalue > 1e-3


def test_a_gamma_proposal_is_refused_once_in_twenty_at_most():
    """So that all are once in 10^15. Counted where the acceptance is lowest, at a shape of 1."""
    draws = 100_000
    one = torch.ones(1, draws)
    first, all_of_them = (plain_log_gammas_of(one, proposals) for proposals in (1, GAMMA_PROPOSALS))
    refused = (first != all_of_them).double().mean().item()
    assert refused < 0.0492 + 5 * math.sqrt(0.05 / draws)
    assert 0.0492**GAMMA_PROPOSALS < 1e-15


def plain_log_gammas_of(shapes: torch.Tensor, proposals: int) -> torch.Tensor:
    from lvssl.latents import noise as module

    kept, module.GAMMA_PROPOSALS = module.GAMMA_PROPOSALS, proposals
    try:
        return plain_log_gammas(shapes, 1, keyed(0, 1))
    finally:
        module.GAMMA_PROPOSALS = kept


def test_normals_have_scipys_distribution():
    for dtype in (torch.float32, torch.float64):
        found = normals(keyed(2, 10), 1000, 6, dtype)
        assert found.dtype == dtype and found.shape == (6, 10, 1000)
        assert scipy.stats.kstest(found.flatten().numpy(), scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli", "categorical"])
def test_a_uniform_of_zero_gives_a_finite_sample(name):
    """One in 16.8 million is, in every step of a large batch; here in a first and in a fourth word."""
    noise = keyed(1, torch.tensor([1922, 1024]))
    zeros = uniforms(noise, 96, 4) == 0
    assert zeros.nonzero().tolist() == [[0, 1, 90], [3, 0, 1]]
    kind = family(name, categories=4, relaxed=True)
    x = torch.full((2, kind.parameter_count(96)), 0.1, requires_grad=True)
    sample = kind.posterior(x).sample(4, noise)
    assert sample.isfinite().all() and torch.autograd.grad(sample.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", [*(n for n in FAMILIES if FAMILIES[n].stochastic), *PAIRS])
@pytest.mark.parametrize("relaxed", [False, True])
def test_a_rank_draws_its_own_rows_alone_and_they_are_those_of_the_whole_batch(name, relaxed):
    kind = family(name, categories=4, components=2, relaxed=relaxed)
    x = torch.randn(12, kind.parameter_count(8), generator=torch.Generator().manual_seed(0))
    whole = kind.posterior(x).sample(3, keyed(9, 12))
    for rank in range(3):
        rows = rows_of(4, 2, rank, 3, torch.device("cpu"))
        assert rows.tolist() == [2 * rank, 2 * rank + 1, 2 * rank + 6, 2 * rank + 7]
        part = kind.posterior(x[rows]).sample(3, keyed(9, rows))
        torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*(n for n in FAMILIES if FAMILIES[n].stochastic), *PAIRS])
def test_seeds_steps_rows_samples_and_dimensions_have_noise_of_their_own(name):
    kind = family(name, categories=4, components=2)
    x = torch.full((2, kind.parameter_count(512)), 0.1)

    def drawn(seed: int, step: int) -> torch.Tensor:
        noise = Noise(torch.tensor([key_of(seed, step)]), torch.arange(2))
        return kind.posterior(x).sample(2, noise)

    one = drawn(0, 0)
    parts = [one[0, 0], one[0, 1], one[1, 0], drawn(0, 1)[0, 0], drawn(1, 0)[0, 0]]
    correlations = torch.corrcoef(torch.stack([part.detach() for part in parts]))
    assert (correlations - torch.eye(5)).abs().max() < 0.35, correlations
    halves = torch.corrcoef(torch.stack(one[0, 0].detach().chunk(2)))
    assert halves[0, 1].abs() < 0.35, "the parts of a pair would otherwise share their noise"


def test_shifts_of_the_noise_add_up():
    """A family's own, and that of the second in a pair."""
    assert keyed(0, 1).shifted(4).shifted(3).stream == 7


def test_keys_differ_between_seeds_and_steps_and_fit_an_int64():
    keys = {key_of(seed, step) for seed in (0, 1, 42, 2**31, -1) for step in (0, 1, 10**6, 2**32 - 1)}
    assert len(keys) == 20 and all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).stochastic])
@pytest.mark.parametrize("rows", [1, 4, 6, 400])
def test_noise_for_another_number_of_images_is_refused(name, rows):
    """A compiled loop has no bounds: it wrote past the end, and the process died, or left numbers unset."""
    made = family(name).posterior(torch.zeros(5, family(name).parameter_count(16)))
    with pytest.raises(ValueError, match=f"5 images need noise of 5 rows, not {rows}"):
        made.sample(2, keyed(0, rows))


@pytest.mark.parametrize("name", [name for name in FAMILIES if family(name).stochastic])
def test_parameters_that_are_nan_give_no_number(name):
    """On the sphere, they gave the first axis, as a vector of length 0 does."""
    parameters = torch.zeros(3, family(name).parameter_count(16))
    parameters[1, 0] = float("nan")
    found = family(name).posterior(parameters)
    wrong = found.sample(2, keyed(0, 3)).isnan().flatten(2).any(dim=2) | found.mean().isnan().any(dim=1)
    assert wrong.tolist() == [[False, True, False]] * 2
