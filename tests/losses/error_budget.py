"""The error budget of a fast form: twice the plain fp32 reference's error plus a tolerance, against fp64."""

import torch
from torch import Tensor

from lvssl.losses.ntxent import reference

# Units in the last place of a logit, which is up to 1 / tau, next to some rounding in sums. Relative to 1 +
# the loss, and to the largest gradient that an anchor can have in a batch of 2B, 1 / (2B tau |x|).
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-23, torch.float16: 2**-23}
# The gradient is returned in the input's type, which rounds once.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def value_and_slopes(loss, x: Tensor, temperature: float, wide: bool = False) -> list[Tensor]:
    """Return loss, gradient of x times its length (so that huge and tiny vectors count alike) and gradient of
    tau in fp64."""
    x = (x.double() if wide else x).clone().requires_grad_()
    tau = torch.tensor(temperature, dtype=torch.float64 if wide else torch.float32, requires_grad=True)
    value = loss(x, tau)
    value.backward()
    lengths = x.detach().double().norm(dim=1, keepdim=True)
    return [value.detach().double(), x.grad.double() * lengths, tau.grad.double()]


def assert_within_budget(loss, x: Tensor, temperature: float, ulp: float | None = None, truth=reference):
    """Compare `loss` with fp64 on the given x: a bf16 input is exact, only what is computed is not."""
    budget = (ulp or ULP[x.dtype]) * (8 + 1 / temperature)
    budgets = (budget, budget + ROUNDING[x.dtype], budget)
    exact = value_and_slopes(truth, x, temperature, wide=True)
    naive = value_and_slopes(truth, x, temperature)
    found = value_and_slopes(loss, x, temperature)
    scales = (1 + exact[0].abs(), 1 / (len(x) * temperature), (1 + exact[0].abs()) / temperature)
    names = ("loss", "gradient", "gradient of tau")
    for name, e, n, f, scale, budget in zip(names, exact, naive, found, scales, budgets):
        error = (f - e).abs()
        allowed = 2 * (n - e).abs().max() + budget * scale
        worst = error.argmax()
        assert error.max() <= allowed, (
            f"{name} at {worst.item()}: {f.flatten()[worst].item()}, exactly {e.flatten()[worst].item()}; "
            f"error {error.max().item():.3g}, allowed {float(allowed):.3g}"
        )


def awkward(kind: str, vectors: int, d: int = 32) -> Tensor:
    """Return vectors that break a careless implementation."""
    x = torch.randn(vectors, d, generator=torch.Generator().manual_seed(vectors))
    if kind == "duplicates":  # each image twice, as near as its positive
        x[1::2] = x[::2]
    elif kind == "zeros":
        x[:: max(2, vectors // 3)] = 0
    elif kind == "huge":
        x *= 1e17
    elif kind == "tiny":
        x *= 1e-9
    elif kind == "aligned":  # a sharp softmax; each anchor is nearest to its positive
        x[vectors // 2 :] = x[: vectors // 2] + 0.1 * x[vectors // 2 :]
    return x
