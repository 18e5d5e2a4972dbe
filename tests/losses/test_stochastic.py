"""Match probabilities and samples against directions, against loops over every pair; the rate's schedules."""

import math

import numpy as np
import pytest
import torch

from lvssl.losses.objective import beta_at
from lvssl.losses.stochastic import match_loss, other_images, sample_infonce


def test_match_loss_is_the_papers_formula():
    """Oh et al. 2019, equations 2 to 5, pair by pair and sample by sample."""
    z = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    match = torch.tensor([0.3, 0.8], dtype=torch.float64)
    a, b = math.log1p(math.exp(0.3)), 0.8
    positive, negative = [], []
    for i in range(8):
        for j in range(8):
            if i == j:
                continue
            distances = [np.linalg.norm(z[k, i] - z[m, j]) for k in range(3) for m in range(3)]
            p = np.mean([1 / (1 + math.exp(a * d - b)) for d in distances])
            if abs(i - j) == 4:
                positive.append(-math.log(p))
            else:
                negative.append(-math.log(1 - p))
    expected = np.mean(positive) + np.mean(negative)
    assert match_loss(z.float(), match.float()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [4, 6, 10])
def test_others_are_those_of_the_other_images_in_their_order(n):
    """What a mask would pick, number for number."""
    mask = ~torch.eye(n, dtype=torch.bool)
    first = torch.arange(n // 2)
    mask[first, first + n // 2] = mask[first + n // 2, first] = False
    x = torch.randn(n, n)
    assert torch.equal(x.gather(1, other_images(n, x.device)).flatten(), x[mask])


def test_match_loss_stays_finite_where_samples_coincide_or_are_far():
    for scale in (0.0, 1e-6, 1e6):
        z = (scale * torch.randn(2, 6, 4)).requires_grad_()
        match = torch.zeros(2, requires_grad=True)
        loss = match_loss(z, match)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all() and match.grad.isfinite().all()


def test_sample_infonce_is_the_papers_formula():
    """Lee et al. 2021: the sample of one view against the directions of all other views."""
    generator = torch.Generator().manual_seed(1)
    z = torch.nn.functional.normalize(torch.randn(2, 6, 5, dtype=torch.float64, generator=generator), dim=2)
    r = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64, generator=generator), dim=1)
    total = 0.0
    for k in range(2):
        for i in range(6):
            scores = {j: 7.0 * float(z[k, i] @ r[j]) for j in range(6) if j != i}
            total += math.log(sum(math.exp(s) for s in scores.values())) - scores[(i + 3) % 6]
    assert sample_infonce(z.float(), r.float(), 7.0).item() == pytest.approx(total / 12, rel=1e-5)


def test_their_gradients_are_finite_differences():
    z = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_()
    r = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    match = torch.tensor([0.1, 0.5], dtype=torch.float64).requires_grad_()
    coarse = {"eps": 1e-3, "atol": 1e-3}  # both compute in fp32
    assert torch.autograd.gradcheck(lambda z, m: match_loss(z, m).double(), (z, match), **coarse)
    assert torch.autograd.gradcheck(lambda z, r: sample_infonce(z, r, 3.0).double(), (z, r), **coarse)


@pytest.mark.parametrize("shape", [(4, 3), (0, 4, 3), (2, 3, 3), (2, 0, 3)])
def test_samples_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="2B"):
        match_loss(torch.zeros(shape), torch.zeros(2))
    with pytest.raises(ValueError, match="2B"):
        sample_infonce(torch.zeros(shape), torch.zeros(4, 3), 1.0)


def test_one_image_has_nothing_to_be_told_from():
    with pytest.raises(ValueError, match="two images"):
        match_loss(torch.zeros(1, 2, 3), torch.zeros(2))


def test_schedules_of_the_rates_weight():
    fractions = (0.0, 0.0625, 0.125, 0.2, 0.25, 0.3125, 1.0)
    cyclical = [beta_at(f, 2.0, schedule="cyclical", cycles=4) for f in fractions]
    assert cyclical == pytest.approx([0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 2.0])
    assert beta_at(0.0, 2.0, schedule="constant") == 2.0
    assert beta_at(0.05, 2.0, 0.1) == 1.0
