"""NT-Xent against loops in NumPy and against lightly; the other parts of the objective against theirs."""

import math

import numpy as np
import pytest
import torch

from lvssl.losses.ntxent import ntxent
from lvssl.losses.objective import beta_at, decorrelation, rate


def by_loops(u: np.ndarray, temperature: float) -> float:
    """The paper's equation 1, written out."""
    u = u.astype(np.float64)
    u = u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
    n, total = len(u), 0.0
    for i in range(n):
        others = [k for k in range(n) if k != i]
        similarity = np.array([u[i] @ u[k] for k in others]) / temperature
        positive = u[i] @ u[(i + n // 2) % n] / temperature
        highest = similarity.max()
        total += highest + math.log(np.exp(similarity - highest).sum()) - positive
    return total / n


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_ntxent_is_the_papers_formula(batch, temperature):
    u = torch.randn(2 * batch, 16, generator=torch.Generator().manual_seed(batch))
    expected = by_loops(u.numpy(), temperature)
    assert ntxent(u, temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert ntxent(u.double(), temperature).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kind", ["zeros", "duplicates", "huge", "bf16", "fp16"])
def test_awkward_vectors_stay_finite(kind):
    u = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    u = {
        "zeros": u * 0,
        "duplicates": u[:1].repeat(8, 1),
        "huge": u * 1e18,
        "bf16": u.bfloat16(),
        "fp16": u.half(),
    }[kind].requires_grad_()
    loss = ntxent(u, 0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and u.grad.isfinite().all()
    if kind in ("zeros", "duplicates"):  # all 2B - 1 candidates look the same
        assert loss.item() == pytest.approx(math.log(7), rel=1e-5)


def test_the_gradient_is_right():
    u = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ntxent(x, 0.3), u)


def test_fp32_under_autocast():
    u = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ntxent(u, 0.1), ntxent(u.clone(), 0.1))
        under = ntxent(u, 0.1)
    assert under.item() == ntxent(u, 0.1).item()


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (extra `bench`)")
    a, b = torch.randn(2, 32, 16)
    for temperature in (0.1, 0.5):
        expected = lightly.NTXentLoss(temperature=temperature)(a, b)
        assert ntxent(torch.cat([a, b]), temperature).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shape, temperature, culprit", [
    ((3, 4), 0.1, r"\(3, 4\)"), ((0, 4), 0.1, r"\(0, 4\)"), ((4,), 0.1, r"\(4,\)"),
    ((4, 4), 0.0, "temperature"), ((4, 4), float("nan"), "temperature"),
])  # fmt: skip
def test_bad_input_is_named(shape, temperature, culprit):
    with pytest.raises(ValueError, match=culprit):
        ntxent(torch.ones(shape), temperature)


def test_rate_is_the_mean_above_the_free_nats():
    kl = torch.tensor([0.5, 3.0])
    assert rate(kl).item() == 1.75
    assert rate(kl, 1.0).item() == 2.0


def test_beta_climbs_then_stays():
    assert [beta_at(fraction, 2.0, 0.1) for fraction in (0.0, 0.05, 0.1, 0.99)] == [0.0, 1.0, 2.0, 2.0]
    assert beta_at(0.0, 2.0, 0.0) == 2.0


def test_decorrelation_is_numpys_covariance():
    bits = torch.randn(50, 7).sign()
    covariance = np.cov(bits.numpy().T, bias=True)
    off = covariance - np.diag(np.diag(covariance))
    assert decorrelation(bits).item() == pytest.approx((off**2).sum() / 7, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert decorrelation(bits).item() == pytest.approx((off**2).sum() / 7, rel=1e-5)
    assert decorrelation(torch.eye(4).repeat(4, 1)[:, :1]).item() == pytest.approx(0, abs=1e-9)
