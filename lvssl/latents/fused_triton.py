"""The kernels of `fused.py`. A program takes one row and loops over its dimensions, so that nothing is summed
between programs and results are the same from run to run. The kernels are tested in Triton's interpreter,
compiled ahead of time for sm_80 and sm_90, and were run on an H100.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.categorical import UNIFORM_SHARE, Categorical
from lvssl.latents.gaussian import LOG_VARIANCE_BOUND, Gaussian
from lvssl.latents.posterior import Family

LN2 = tl.constexpr(math.log(2))
TAU = tl.constexpr(2 * math.pi)
LOG_2PIE = tl.constexpr(math.log(2 * math.pi * math.e))
BOUND = tl.constexpr(LOG_VARIANCE_BOUND)
SHARE = tl.constexpr(UNIFORM_SHARE)
BLOCK = 1024  # dimensions that a program handles at a time


@triton.jit
def _uniforms(key, row, d, call):
    """Four uniforms for each dimension, as in `noise.uniforms`."""
    zero = (d * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, zero + row.to(tl.uint32), d.to(tl.uint32), zero + call, zero, n_rounds=10)
    unit: tl.constexpr = 1.0 / 16777216.0
    return (
        (w0 >> 8).to(tl.float32) * unit,
        (w1 >> 8).to(tl.float32) * unit,
        (w2 >> 8).to(tl.float32) * unit,
        (w3 >> 8).to(tl.float32) * unit,
    )


@triton.jit
def _hits(key, row, d, p, COUNT: tl.constexpr):
    """How many of COUNT uniforms lie below p."""
    total = p * 0
    for call in range((COUNT + 3) // 4):
        u0, u1, u2, u3 = _uniforms(key, row, d, call)
        total += tl.where(u0 < p, 1.0, 0.0)
        total += tl.where((u1 < p) & (4 * call + 1 < COUNT), 1.0, 0.0)
        total += tl.where((u2 < p) & (4 * call + 2 < COUNT), 1.0, 0.0)
        total += tl.where((u3 < p) & (4 * call + 3 < COUNT), 1.0, 0.0)
    return total


@triton.jit
def _turn(u):
    """cos and sin of u turns, u in [0, 1). The GPU's own take any angle and keep a table in memory for it."""
    quarter = (u * 4 + 0.5).to(tl.int32)
    x = (u - 0.25 * quarter) * TAU  # within an eighth of a turn
    square = x * x
    s = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square / 362880))))
    c = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square / 40320)))
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return cosine, tl.where((quarter & 2) == 2, -sine, sine)


@triton.jit
def _mean_normal(key, row, d, COUNT: tl.constexpr):
    """Mean of COUNT normals for each dimension."""
    total = (d * 0).to(tl.float32)
    for call in range((COUNT + 3) // 4):
        u0, u1, u2, u3 = _uniforms(key, row, d, call)
        radius = tl.sqrt(-2 * tl.log(1 - u0))
        cosine, sine = _turn(u1)
        total += radius * cosine
        total += tl.where(4 * call + 1 < COUNT, radius * sine, 0.0)
        radius = tl.sqrt(-2 * tl.log(1 - u2))
        cosine, sine = _turn(u3)
        total += tl.where(4 * call + 2 < COUNT, radius * cosine, 0.0)
        total += tl.where(4 * call + 3 < COUNT, radius * sine, 0.0)
    return total / COUNT


@triton.jit
def bernoulli_kernel(
    logits, keys, rows, sample, kl, entropy, packed, D, width, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    key, row = tl.load(keys), tl.load(rows + n)
    nats, h_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        l = tl.load(logits + n * D + d, mask=inside, other=0.0)
        hits = _hits(key, row, d, tl.sigmoid(l), COUNT)
        tl.store(sample + n * D + d, 2 * (hits / COUNT) - 1, mask=inside)
        size = tl.abs(l)
        small = tl.exp(-size)  # softplus(-|l|) = log(1 + small), or its series where 1 + small rounds
        h = tl.where(small > 1e-3, tl.log(1 + small), small * (1 - 0.5 * small + small * small / 3))
        h += size * small / (1 + small)
        nats += tl.where(inside, LN2 - h, 0.0)
        h_sum += tl.where(inside, h, 0.0)
        bits = tl.reshape(((l > 0) & inside).to(tl.int32), (BLOCK // 8, 8))
        values = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(packed + n * width + byte, values.to(tl.uint8), mask=byte < width)
    tl.store(kl + n, tl.sum(nats, 0))
    tl.store(entropy + n, tl.sum(h_sum, 0))


@triton.jit
def bernoulli_backward_kernel(logits, of_sample, of_kl, of_entropy, out, D, BLOCK: tl.constexpr):
    """dp / dl = p (1 - p); d kl / dl = l p (1 - p) = -d entropy / dl."""
    n = tl.program_id(0).to(tl.int64)
    of_rate = tl.load(of_kl + n) - tl.load(of_entropy + n)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        l = tl.load(logits + n * D + d, mask=inside, other=0.0)
        grad = tl.load(of_sample + n * D + d, mask=inside, other=0.0)
        small = tl.exp(-tl.abs(l))
        variance = small / ((1 + small) * (1 + small))
        tl.store(out + n * D + d, variance * (2 * grad + of_rate * l), mask=inside)


@triton.jit
def gaussian_kernel(parameters, keys, rows, sample, kl, entropy, D, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    key, row = tl.load(keys), tl.load(rows + n)
    nats, h_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        mu = tl.load(parameters + n * 2 * D + d, mask=inside, other=0.0)
        v = tl.load(parameters + n * 2 * D + D + d, mask=inside, other=0.0)
        v = tl.minimum(tl.maximum(v, -BOUND), BOUND)
        tl.store(sample + n * D + d, mu + tl.exp(0.5 * v) * _mean_normal(key, row, d, COUNT), mask=inside)
        nats += tl.where(inside, 0.5 * (mu * mu + tl.exp(v) - 1 - v), 0.0)
        h_sum += tl.where(inside, 0.5 * (v + LOG_2PIE), 0.0)
    tl.store(kl + n, tl.sum(nats, 0))
    tl.store(entropy + n, tl.sum(h_sum, 0))


@triton.jit
def gaussian_backward_kernel(
    parameters, keys, rows, of_sample, of_kl, of_entropy, out, D, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    key, row = tl.load(keys), tl.load(rows + n)
    of_rate, of_h = tl.load(of_kl + n), tl.load(of_entropy + n)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        mu = tl.load(parameters + n * 2 * D + d, mask=inside, other=0.0)
        given = tl.load(parameters + n * 2 * D + D + d, mask=inside, other=0.0)
        v = tl.minimum(tl.maximum(given, -BOUND), BOUND)
        grad = tl.load(of_sample + n * D + d, mask=inside, other=0.0)
        noise = _mean_normal(key, row, d, COUNT)
        of_v = 0.5 * (grad * tl.exp(0.5 * v) * noise + of_rate * (tl.exp(v) - 1) + of_h)
        tl.store(out + n * 2 * D + d, grad + of_rate * mu, mask=inside)
        tl.store(out + n * 2 * D + D + d, tl.where(v == given, of_v, 0.0), mask=inside)


@triton.jit
def _chances(logits, n, g, G, K: tl.constexpr):
    """Softmax of groups g of row n, [len(g), K], and the offsets of their logits."""
    k = tl.arange(0, K)
    place = n * G * K + g[:, None] * K + k[None, :]
    x = tl.load(logits + place, mask=(g < G)[:, None], other=0.0)
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None], place


@triton.jit
def _picked(u, upto, K: tl.constexpr):
    """One-hot rows of the number of cumulative probabilities that each uniform has passed."""
    chosen = tl.minimum(tl.sum(tl.where(u[:, None] >= upto, 1, 0), 1), K - 1)
    return tl.where(tl.arange(0, K)[None, :] == chosen[:, None], 1.0, 0.0)


@triton.jit
def categorical_kernel(
    logits, keys, rows, sample, kl, entropy, G,
    K: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    key, row = tl.load(keys), tl.load(rows + n)
    h_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, G, BLOCK):
        g = start + tl.arange(0, BLOCK)
        soft, place = _chances(logits, n, g, G, K)
        p = soft * (1 - SHARE) + SHARE / K
        upto = tl.cumsum(p, 1)
        total = p * 0
        for call in range((COUNT + 3) // 4):
            u0, u1, u2, u3 = _uniforms(key, row, g, call)
            total += _picked(u0, upto, K)
            total += tl.where(4 * call + 1 < COUNT, _picked(u1, upto, K), 0.0)
            total += tl.where(4 * call + 2 < COUNT, _picked(u2, upto, K), 0.0)
            total += tl.where(4 * call + 3 < COUNT, _picked(u3, upto, K), 0.0)
        tl.store(sample + place, total / COUNT, mask=(g < G)[:, None])
        h_sum += tl.where(g < G, -tl.sum(p * tl.log(p), 1), 0.0)
    h = tl.sum(h_sum, 0)
    tl.store(entropy + n, h)
    tl.store(kl + n, G * tl.log(K * 1.0) - h)


@triton.jit
def categorical_backward_kernel(
    logits, of_sample, of_kl, of_entropy, out, G, K: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    of_rate = tl.load(of_kl + n) - tl.load(of_entropy + n)
    for start in range(0, G, BLOCK):
        g = start + tl.arange(0, BLOCK)
        soft, place = _chances(logits, n, g, G, K)
        grad = tl.load(of_sample + place, mask=(g < G)[:, None], other=0.0)
        grad += of_rate * (tl.log(soft * (1 - SHARE) + SHARE / K) + 1)
        grad = soft * (1 - SHARE) * (grad - tl.sum(soft * grad, 1)[:, None])
        tl.store(out + place, grad, mask=(g < G)[:, None])


def forward(family: Family, parameters: Tensor, key: Tensor, rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the tensors of `fused.Draw`."""
    n = len(parameters)
    width = parameters.shape[1] // family.parameter_count(1)
    sample = parameters.new_empty(n, width)
    kl, entropy = parameters.new_empty(n), parameters.new_empty(n)
    bits = (width + 7) // 8 if family.signs else 0
    packed = torch.empty(n, bits, dtype=torch.uint8, device=parameters.device)
    if not n:
        return sample, kl, entropy, packed
    given, found = (parameters, key, rows), (sample, kl, entropy)
    with torch.cuda.device_of(parameters):  # Triton launches on the current device, which may be another
        if isinstance(family, Bernoulli):
            bernoulli_kernel[(n,)](*given, *found, packed, width, bits, COUNT=count, **options(family, width))
        elif isinstance(family, Gaussian):
            gaussian_kernel[(n,)](*given, *found, width, COUNT=count, **options(family, width))
        else:
            assert isinstance(family, Categorical)
            groups = width // family.categories
            categorical_kernel[(n,)](*given, *found, groups, COUNT=count, **options(family, width))
    return sample, kl, entropy, packed


def backward(
    family: Family, parameters: Tensor, key: Tensor, rows: Tensor, count: int, *grads: Tensor
) -> Tensor:
    """Return the gradient of the parameters from those of sample [N, D], KL [N] and entropy [N]."""
    out = torch.empty_like(parameters)
    n, width = grads[0].shape
    if not n:
        return out
    with torch.cuda.device_of(parameters):
        if isinstance(family, Bernoulli):
            bernoulli_backward_kernel[(n,)](parameters, *grads, out, width, **options(family, width))
        elif isinstance(family, Gaussian):
            gaussian_backward_kernel[(n,)](
                parameters, key, rows, *grads, out, width, COUNT=count, **options(family, width)
            )
        else:
            assert isinstance(family, Categorical)
            groups = width // family.categories
            categorical_backward_kernel[(n,)](parameters, *grads, out, groups, **options(family, width))
    return out


def options(family: Family, width: int) -> dict[str, Any]:
    """Block size, warps, and the number of categories if there are any; none spills (tests/latents)."""
    if isinstance(family, Categorical):
        k = family.categories
        block = max(1, min(triton.next_power_of_2(width // k), BLOCK // 2 // k))
        return {"K": k, "BLOCK": block, "num_warps": 8}
    return {"BLOCK": max(8, min(triton.next_power_of_2(width), BLOCK)), "num_warps": 4}
