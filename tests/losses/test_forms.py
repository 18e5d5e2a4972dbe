"""The chunked form against fp64, other people's code and itself elsewhere; the variants likewise."""

import subprocess
import sys

import pytest
import torch
from error_budget import assert_within_budget, awkward, value_and_slopes

from lvssl.losses import chunked
from lvssl.losses import ntxent as module
from lvssl.losses.anchors import anchors
from lvssl.losses.ntxent import ntxent, reference
from lvssl.losses.variants import decoupled_ntxent, mc_infonce, vicreg

KINDS = ("random", "duplicates", "zeros", "huge", "tiny", "aligned")


@pytest.fixture(autouse=True)
def small_tiles_and_no_reference(monkeypatch):
    """Tiles of 48: every size below has cut ones and, from 97 vectors on, whole ones off the diagonal."""
    monkeypatch.setattr(module, "FAST_FROM", 0)
    monkeypatch.setitem(chunked.TILE, "cpu", 48)


@pytest.mark.parametrize("temperature", [0.01, 0.019, 0.1, 0.5, 10.0])  # on both sides of chunked.BOUND
@pytest.mark.parametrize("batch", [1, 2, 3, 127, 128, 129])
def test_chunked_is_as_exact_as_the_reference(batch, temperature):
    for kind in KINDS if batch in (3, 127) else KINDS[:1]:
        assert_within_budget(ntxent, awkward(kind, 2 * batch), temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_other_types(dtype, temperature):
    assert_within_budget(ntxent, awkward("aligned", 200).to(dtype), temperature)


def test_a_thousand_images_on_tiles_as_shipped(monkeypatch):
    monkeypatch.undo()
    for temperature in (0.01, 0.1):
        assert_within_budget(ntxent, awkward("random", 2000, 128), temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_gradcheck(temperature):
    x = torch.randn(98, 3, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([temperature], dtype=torch.float64, requires_grad=True)
    # Around 100 anchors at tau 0.01 the loss bends a lot within gradcheck's usual step.
    assert torch.autograd.gradcheck(ntxent, (x, tau), eps=1e-7, atol=1e-4, fast_mode=True)


def test_a_zero_vector_gets_no_gradient():
    x = awkward("zeros", 12).requires_grad_()
    ntxent(x, 0.1).backward()
    assert (x.grad[x.norm(dim=1) == 0] == 0).all() and (x.grad != 0).any()


def test_strided_input_and_weights_of_the_caller():
    x = torch.randn(32, 200, dtype=torch.float64).T.requires_grad_()
    (3 * ntxent(x, 0.2)).backward()
    y = x.detach().clone().requires_grad_()
    (3 * reference(y, 0.2)).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_refused_instead_of_left_out():
    """A penalty on the gradient would be 0, silently; the reference has its derivative."""
    x = torch.randn(8, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\)"):
        torch.autograd.grad(ntxent(x), x, create_graph=True)
    (grad,) = torch.autograd.grad(reference(x), x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


def test_autocast_changes_nothing():
    x = torch.randn(128, 32)
    plain = value_and_slopes(ntxent, x, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        under = value_and_slopes(ntxent, x, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(plain, under))


def test_compiled():
    """Dynamo steps around the pass over the tiles: the graph is broken there, not the result."""
    x = torch.randn(128, 32)
    compiled = torch.compile(lambda x, tau: ntxent(2 * x, tau) + x.square().mean(), backend="eager")
    plain = value_and_slopes(lambda x, tau: ntxent(2 * x, tau) + x.square().mean(), x, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(value_and_slopes(compiled, x, 0.1), plain))


def test_the_matrix_never_stands_in_memory():
    """16,384 vectors of length 16: the matrix would be 1 GiB; a fresh process grows by less than 100 MB."""
    script = (
        "import torch\n"
        "from lvssl.losses.ntxent import ntxent\n"
        "torch.set_num_threads(1)\n"
        "def once(n): ntxent(torch.randn(n, 16, requires_grad=True), 0.1).backward()\n"
        # getrusage's peak is handed down by the process that started this one
        "peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "once(1024); before = peak(); once(16384); print(peak() - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600
    )
    assert 0 < int(grown.stdout) < 100_000  # KB


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_lightly_and_pytorch_metric_learning_agree(temperature):
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (extra `bench`)")
    metric = pytest.importorskip("pytorch_metric_learning.losses", reason="extra `bench` is not installed")
    x = awkward("aligned", 194, 16)
    labels = torch.arange(97).repeat(2)
    peers = {
        "lightly": lambda u: lightly.NTXentLoss(temperature=temperature)(*u.chunk(2)),
        "pytorch-metric-learning": lambda u: metric.NTXentLoss(temperature=temperature)(u, labels),
    }
    for name, peer in peers.items():
        a, b = (x.clone().requires_grad_() for _ in range(2))
        ours, theirs = ntxent(a, temperature), peer(b)
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def by_matrix(x, temperature, labels, decoupled=False):
    """Supervised contrastive or decoupled loss from the whole matrix, with masks."""
    unit = torch.nn.functional.normalize(x, dim=1)
    logits = unit @ unit.T / temperature
    own = torch.eye(len(x), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~own
    left_out = own | positive if decoupled else own
    shares = logits - logits.masked_fill(left_out, float("-inf")).logsumexp(1, keepdim=True)
    return -((shares * positive).sum(1) / positive.sum(1)).mean()


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("count", [47, 49, 53])  # the positives in a tile's corners, and across two tiles
def test_variants_by_matrix(count, temperature):
    x = awkward("aligned", 2 * count)
    images = torch.arange(count).repeat(2)

    def decoupled(u, tau):
        return by_matrix(u, tau, images, decoupled=True)

    assert_within_budget(decoupled_ntxent, x, temperature, truth=decoupled)


def test_mc_infonce():
    """One sample is NT-Xent; several by their definition; equal ones count once."""
    x = torch.randn(3, 40, 8)
    torch.testing.assert_close(mc_infonce(x[:1], 0.2), reference(x[0], 0.2))
    torch.testing.assert_close(mc_infonce(x[:1].repeat(4, 1, 1), 0.2), reference(x[0], 0.2))
    likelihood = torch.zeros(40)
    for drawn in x:
        unit = torch.nn.functional.normalize(drawn, dim=1)
        logits = (unit @ unit.T / 0.2).fill_diagonal_(float("-inf"))
        likelihood += logits.softmax(1)[torch.arange(40), torch.arange(40).roll(20)] / 3
    torch.testing.assert_close(mc_infonce(x, 0.2), -likelihood.log().mean())


def vicreg_by_columns(x):
    """Bardes et al. 2022, algorithm 1, in fp64, a dimension and a pair of dimensions at a time."""
    a, b = x.double().chunk(2)
    n, d = a.shape
    low, together = [], []
    for view in (a, b):
        columns = [column - column.sum() / n for column in view.unbind(1)]
        low += [torch.relu(1 - torch.sqrt(c @ c / (n - 1) + 1e-4)) for c in columns]
        together += [(columns[i] @ columns[j] / (n - 1)) ** 2 for i in range(d) for j in range(d) if i != j]
    return sum(((p - q) ** 2).sum() for p, q in zip(a, b)) / (n * d), sum(low) / (2 * d), sum(together) / d


@pytest.mark.parametrize("spread", [0.01, 0.9, 3.0])  # all deviations below 1, on both sides of it, above
def test_vicreg_is_the_papers_formula(spread):
    """Each of its parts, and each part's gradient, of vectors with a mean, dimensions that hang together."""
    x = spread * torch.randn(2 * 23, 5) @ torch.randn(5, 5) + torch.arange(5)
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        leaf = x.to(kind).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = vicreg(leaf)
        exact = leaf.detach().double().requires_grad_()
        tolerance = {"rtol": 1e-10, "atol": 1e-12} if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        for part, wanted in zip(found, vicreg_by_columns(exact), strict=True):
            assert part.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
            torch.testing.assert_close(part.double(), wanted, **tolerance)
            (grad,) = torch.autograd.grad(part, leaf, retain_graph=True)
            (expected,) = torch.autograd.grad(wanted, exact, retain_graph=True)
            torch.testing.assert_close(
                grad, expected.to(kind), **(tolerance if kind != torch.bfloat16 else {})
            )


def test_peers_of_the_variants():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed (extra `bench`)")
    x = torch.randn(2 * 31, 16)
    theirs = lightly.DCLLoss(temperature=0.2)(*x.chunk(2))
    torch.testing.assert_close(decoupled_ntxent(x, 0.2), theirs, rtol=1e-5, atol=1e-6)
    invariance, variance, covariance = vicreg(x)
    theirs = lightly.VICRegLoss()(*x.chunk(2))
    torch.testing.assert_close(25 * invariance + 25 * variance + covariance, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x, temperature, error, culprit", [
    (torch.ones(4, 3, dtype=torch.int64), 0.1, ValueError, "torch.int64"),
    (torch.ones(4, 0), 0.1, ValueError, r"\(4, 0\)"),
    (torch.ones(2, 2, 3), 0.1, ValueError, r"\(2, 2, 3\)"),
    (torch.ones(4, 3), -1.0, ValueError, "temperature must be positive and finite, got -1.0"),
    (torch.ones(4, 3), torch.tensor(0.0), ValueError, "temperature .* got 0.0"),
    (torch.ones(4, 3), torch.ones(2), ValueError, r"temperature .* \(2,\)"),
    (torch.tensor([[1.0, 0], [0, 1], [1, float("nan")], [1, 1]]), 0.1, FloatingPointError, "1 of 4 .* row 2"),
    (torch.tensor([[1.0, 0], [0, 1], [1, float("inf")], [1, 1]]), 0.1, FloatingPointError, "1 of 4 .* row 2"),
])  # fmt: skip
@pytest.mark.parametrize("fast_from", [0, 10**9])
def test_bad_input_is_named(x, temperature, error, culprit, fast_from, monkeypatch):
    monkeypatch.setattr(module, "FAST_FROM", fast_from)
    with pytest.raises(error, match=culprit):
        ntxent(x, temperature)


def test_bad_samples_are_named():
    with pytest.raises(ValueError, match=r"samples .* \(4, 3\)"):
        mc_infonce(torch.ones(4, 3))
    with pytest.raises(ValueError, match="no negatives"):
        decoupled_ntxent(torch.ones(2, 3))
    with pytest.raises(ValueError, match="two images at least, got 1: no variance"):
        vicreg(torch.ones(2, 3))
    with pytest.raises(FloatingPointError, match="the distance of the views is inf; .* 1 of 4 .* row 3"):
        vicreg(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, float("inf")]]))


def test_anchors_are_log_sum_exps():
    """What other losses may build on: both parts, each with its own gradient."""
    x = torch.randn(130, 8, dtype=torch.float64, requires_grad=True)
    denominators, positives = anchors(x, 0.3, [130])
    unit = torch.nn.functional.normalize(x, dim=1)
    logits = (unit @ unit.T / 0.3).masked_fill(torch.eye(130, dtype=torch.bool), float("-inf"))
    expected = logits.logsumexp(1), logits[torch.arange(130), torch.arange(130).roll(65)]
    weights = torch.randn(2, 130, dtype=torch.float64)
    for found, wanted, weight in zip((denominators, positives), expected, weights):
        torch.testing.assert_close(found, wanted)
        grads = (torch.autograd.grad((v * weight).sum(), x, retain_graph=True)[0] for v in (found, wanted))
        torch.testing.assert_close(*grads)
