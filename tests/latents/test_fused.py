"""The fused head without a GPU: its noise, its kernels interpreted, and compiled for sm_80 and sm_90."""

import importlib.util
import json
import math

import pytest
import torch
import triton_kernels

from lvssl.latents import family, fused, noise

triton_there = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch's CUDA builds bring triton"
)


def test_philox_gives_the_published_words():
    """Of tensors; a known answer of Random123 (kat_vectors, philox4x32 10)."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in noise.philox(*(zero,) * 6)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_its_noise_is_uniform_and_normal_and_differs_between_rows_dimensions_samples_and_keys():
    rows = torch.arange(200)
    u = noise.uniforms(noise.keyed(7, rows), 50, 6)
    assert u.shape == (6, 200, 50) and u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * u.numel()))
    assert len(u.unique()) > 0.99 * u.numel()
    assert not torch.equal(u, noise.uniforms(noise.keyed(8, rows), 50, 6))
    assert torch.equal(u[:, 100:], noise.uniforms(noise.keyed(7, rows[100:]), 50, 6)), "by place, not by rank"
    z = noise.normals(noise.keyed(7, rows), 50, 6)
    assert z.mean().abs() < 5 / math.sqrt(z.numel()) and z.var().item() == pytest.approx(1, abs=0.03)
    assert (z.flatten(1) @ z.flatten(1).T / 10_000 - torch.eye(6)).abs().max() < 0.05


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "categorical"])
def test_the_reference_draws_from_the_posterior(name):
    kind = family(name, categories=4)
    x = torch.randn(1, kind.parameter_count(8), generator=torch.Generator().manual_seed(0))
    drawn = fused.reference(kind, x, 4000, torch.tensor([3]), torch.tensor([5]))
    posterior = kind.posterior(x)
    deviation = posterior.sample(4000, noise.keyed(1, 1)).std(0)
    assert ((drawn.sample - posterior.mean()).abs() < 5 * deviation / math.sqrt(4000) + 1e-6).all()
    assert torch.equal(drawn.kl, posterior.kl()) and torch.equal(drawn.entropy, posterior.entropy())


@triton_there
def test_interpreted_kernels_are_the_reference():
    lines = triton_kernels.run("latents/fused_interpreted.py", TRITON_INTERPRET="1")
    assert json.loads(lines[-1])["compared"] == 63


@triton_there
def test_kernels_compile_for_a_gpu_without_spills():
    rows = [json.loads(line) for line in triton_kernels.run("latents/fused_compiled.py")]
    assert len(rows) == 16
    triton_kernels.assert_fits(rows)


@triton_there
@pytest.mark.slow
def test_kernels_of_every_number_of_categories_compile_without_spills():
    numbers = [str(2**k) for k in range(1, 9)]
    rows = [json.loads(line) for line in triton_kernels.run("latents/fused_compiled.py", *numbers)]
    assert len(rows) == 12 + 4 * 8
    triton_kernels.assert_fits(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "categorical"])
def test_on_a_gpu_it_is_the_reference(name):
    kind = family(name)
    x = torch.randn(64, kind.parameter_count(256), device="cuda")
    key, rows = torch.tensor([9], device="cuda"), torch.arange(64, device="cuda")
    for ours, expected in zip(fused.draw(kind, x, 4, key, rows), fused.reference(kind, x, 4, key, rows)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
