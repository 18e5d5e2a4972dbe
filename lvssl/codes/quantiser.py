"""Codes of a chosen length, and the distance of a real-valued query to them.

    N  images   D  numbers of a feature   E  numbers after the projection   P  parts   B  bytes of a code

A quantiser standardises a feature by the training set's statistics, projects it, and stores for each of P
parts which word of its codebook represents it: one of two, a bit (`bits`, `pca`, `itq`), or one of 256, a
byte (`opq`: Ge et al. 2013, "Optimized Product Quantization"). The asymmetric distance to a query, which
isn't quantised itself, is the squared Euclidean distance to the words. For a product code it is that of Jegou
et al. (2011). For bits, whose words are the training set's means on either side, it is the expectation-based
one of Gordo et al. (2014), "Asymmetric Distances for Binary Embeddings".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lvssl.codes import controls
from lvssl.codes.controls import checked, fit_itq, fit_pca, require_finite_rows, standardised
from pipelines.kernels.pack import as_array, pack_bits, packed_bytes, unpack_bits

CHUNK = 4096  # images at a time


@dataclass(frozen=True)
class Quantiser:
    """A fitted code. Features are arrays or tensors [N, D] of any float type, codes uint8 [N, B]."""

    mean: np.ndarray  # float32 [D], of the training set
    scale: np.ndarray  # float32 [D], standard deviation of the training set
    projection: np.ndarray  # float32 [D, E]; [D, 0]: there is none
    words: np.ndarray  # float32 [P, 2 or 256, E / P]

    @property
    def hamming(self) -> bool:
        """Whether two codes can also be compared by Hamming distance."""
        return self.words.shape[1] == 2

    @property
    def bits(self) -> int:
        return len(self.words) * (1 if self.hamming else 8)

    @property
    def digest(self) -> str:
        """SHA-256, in hex; codes of quantisers with different digests can't be compared."""
        digest = hashlib.sha256()
        for array in (self.mean, self.scale, self.projection, self.words):
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array, "<f4").tobytes())
        return digest.hexdigest()

    def project(self, features: Any) -> np.ndarray:
        """Standardise and project features to float32 [N, E]."""
        features = as_array(features)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features [N, {len(self.mean)}] are needed, not {list(features.shape)}")
        x = (features.astype(np.float32) - self.mean) / self.scale
        return x @ self.projection if self.projection.size else x[:, : self.words.shape[0]]

    def encode(self, features: Any) -> np.ndarray:
        """Encode features: a bit is the side of 0, a byte is the nearest word, or the first of several.
        Raises ValueError for another shape, or a vector that isn't finite."""
        x = self.project(features)
        require_finite_rows(x, "features")
        if self.hamming:
            return pack_bits(x > 0)
        codes = np.empty((len(x), len(self.words)), np.uint8)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            codes[part] = self.squares(x[part]).argmin(axis=2)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the words of each part, float32 [N, E]."""
        rows = unpack_bits(codes, self.bits) if self.hamming else codes
        return self.words[np.arange(len(self.words)), rows].reshape(len(codes), -1)

    def cosines(self, projected: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the cosines of one projected feature [E] and each decoded code, float32 [N]. The cosine
        shows better than the distance whether the nearest code is a wrong one (docs/uncertainty.md)."""
        words = self.decode(codes)
        norms = np.linalg.norm(words, axis=1) * np.linalg.norm(projected)
        return words @ projected / np.maximum(norms, np.finfo(np.float32).tiny)

    def squares(self, projected: np.ndarray) -> np.ndarray:
        """Return squared distances float32 [N, P, words] of projected features [N, E] to the parts' words."""
        parts, _, width = self.words.shape
        x = projected.reshape(len(projected), parts, width)
        if width == 1:
            return np.square(x - self.words[None, :, :, 0])
        inner = np.matmul(x.transpose(1, 0, 2), self.words.transpose(0, 2, 1)).transpose(1, 0, 2)
        own = np.square(x).sum(axis=2)[:, :, None] + np.square(self.words).sum(axis=2)
        return np.maximum(own - 2 * inner, 0)

    def tables(self, projected: np.ndarray) -> np.ndarray:
        """Return what each value of each byte of a code adds to the squared distance, float32 [N, B, 256]."""
        squares = self.squares(projected)
        if not self.hamming:
            return np.ascontiguousarray(squares, np.float32)
        squares = np.pad(squares, ((0, 0), (0, -len(self.words) % 8), (0, 0)))
        on = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # [256, 8]
        each = squares.reshape(len(squares), packed_bytes(self.bits), 8, 2).astype(np.float32)
        return np.ascontiguousarray(each[..., 1] @ on.T.astype(np.float32) + each[..., 0] @ (1 - on.T))


def sides(x: np.ndarray) -> np.ndarray:
    """Return the means of numbers [N, P] below and above 0, float32 [P, 2, 1]; 0 where there are none."""
    above = x > 0
    means = [np.where(side, x, 0).sum(axis=0) / np.maximum(side.sum(axis=0), 1) for side in (~above, above)]
    return np.stack(means, axis=1).astype(np.float32)[:, :, None]


def fit_bits(train: Any, bits: int) -> Quantiser:
    """Fit signs of the first `bits` numbers; for the locations of a latent, this is the run's own code."""
    h = checked(train, bits, bits_a_number=1)
    x, mean, scale = standardised(h)
    return Quantiser(mean, scale, np.empty((h.shape[1], 0), np.float32), sides(x[:, :bits]))


def fit_projected(train: Any, bits: int, fit: Callable[..., Any]) -> Quantiser:
    """Fit signs of the numbers after the projection that `fit`, a function of `controls`, finds."""
    h = checked(train, bits, bits_a_number=1)
    x, mean, scale = standardised(h)
    directions = fit(x, bits).directions
    return Quantiser(mean, scale, directions.astype(np.float32), sides(x @ directions))


def fit_opq(train: Any, bits: int) -> Quantiser:
    """Fit optimised product quantisation by `controls.fit_opq`, and raise its errors."""
    import faiss

    found = controls.fit_opq(train, bits)
    assert found.rotation is not None
    words = faiss.vector_to_array(found.quantiser.centroids).reshape(bits // 8, 256, -1)
    return Quantiser(np.asarray(found.mean), np.asarray(found.scale), found.rotation, words)


FITS: dict[str, Callable[..., Quantiser]] = {
    "bits": fit_bits,
    "opq": fit_opq,
    "itq": partial(fit_projected, fit=fit_itq),
    "pca": partial(fit_projected, fit=fit_pca),
}
