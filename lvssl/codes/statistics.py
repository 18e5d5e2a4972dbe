"""Statistics of a set of codes, and their compression ratios."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.kernels.pack import as_array, pack_bits

CHUNK = 4096  # images at a time
DEAD_BELOW = 0.01  # a bit that is on, or off, for a smaller share of the images says next to nothing


def code_statistics(bits: Any, probabilities: Any = None) -> dict[str, float | int | None]:
    """Return figures of the codes `bits` [N, D] (0 or 1) as plain numbers, ready for JSON.

    - `count`, `nominal_bits`: N and D.
    - `entropy_bits`: sum over bits of the empirical entropy H(mean), at most D; `entropy_per_bit`: its mean.
    - `dead_bits`: bits on for less than 1 % or more than 99 % of the images.
    - `mean_absolute_correlation`: mean of |corr(i, j)| over pairs i < j of bits that vary; None with fewer
      than two.
    - `collisions`: images whose code an earlier image already has (N - distinct codes).
    - `information_bound_bits`: with `probabilities` [N, D], the posterior's p, sum_d [H(mean_n p) - mean_n
      H(p)]. This is an upper bound on I(x; z) of the sampled bits, because H(z) is at most the sum of its
      bits' entropies. None without `probabilities`.
    """
    b_ND = as_array(bits)
    if b_ND.ndim != 2 or not b_ND.size:
        raise ValueError(f"bits must have the shape [N, D] with N, D >= 1, not {list(b_ND.shape)}")
    on_D = b_ND.mean(axis=0, dtype=np.float64)
    entropy_D = binary_entropy(on_D)
    packed = pack_bits(b_ND)
    return {
        "count": b_ND.shape[0],
        "nominal_bits": b_ND.shape[1],
        "entropy_bits": float(entropy_D.sum()),
        "entropy_per_bit": float(entropy_D.mean()),
        "dead_bits": int(((on_D < DEAD_BELOW) | (on_D > 1 - DEAD_BELOW)).sum()),
        "mean_absolute_correlation": mean_absolute_correlation(b_ND),
        "collisions": len(packed) - len(np.unique(packed, axis=0)),
        "information_bound_bits": None if probabilities is None else information_bound(probabilities),
    }


def binary_entropy(p: np.ndarray) -> np.ndarray:
    """H(p) in bits, elementwise; exactly 0 at p = 0 and 1."""
    p = np.asarray(p, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    return np.where(inside, -q * np.log2(q) - (1 - q) * np.log2(1 - q), 0.0)


def information_bound(probabilities: Any) -> float:
    """sum_d [H(mean_n p_nd) - mean_n H(p_nd)] in bits, for probabilities [N, D] in [0, 1]."""
    p_ND = as_array(probabilities)
    if not ((p_ND >= 0) & (p_ND <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]; apply the sigmoid to logits first")
    noise = sum(binary_entropy(p_ND[i : i + CHUNK]).sum() for i in range(0, len(p_ND), CHUNK)) / len(p_ND)
    return float(binary_entropy(p_ND.mean(axis=0, dtype=np.float64)).sum() - noise)


def mean_absolute_correlation(bits: np.ndarray) -> float | None:
    """Mean |Pearson correlation| over pairs of columns of bits [N, D] that vary; None with fewer than two."""
    x_ND = np.asarray(bits, dtype=np.float32)
    x_ND = x_ND - x_ND.mean(axis=0)
    scale_D = np.sqrt((x_ND**2).sum(axis=0))
    varies = scale_D > 0
    if (d := int(varies.sum())) < 2:
        return None
    x_ND = x_ND[:, varies] / scale_D[varies]
    total = np.abs(x_ND.T @ x_ND).sum(dtype=np.float64) - d  # the diagonal is d ones
    return float(max(total, 0.0) / (d * (d - 1)))


def compression_ratios(
    bits: int, resolution: int, channels: int = 3, *, feature_dim: int, jpeg_bytes: float | None = None
) -> dict[str, float]:
    """Return how many times smaller a code of `bits` bits is than each of these, by name.

    - `raw_pixels`: resolution^2 * channels bytes. 2,048 bits at 224 px: 588.
    - `stored_jpeg`: `jpeg_bytes`, the mean size of the stored file; left out without it.
    - `fp32_feature`: 4 * feature_dim bytes.
    """
    if min(bits, resolution, channels, feature_dim) < 1:
        raise ValueError("bits, resolution, channels and feature_dim must be at least 1")
    code_bytes = bits / 8
    against: dict[str, float] = {"raw_pixels": resolution**2 * channels, "fp32_feature": 4 * feature_dim}
    if jpeg_bytes is not None:
        against["stored_jpeg"] = jpeg_bytes
    return {name: size / code_bytes for name, size in against.items()}
