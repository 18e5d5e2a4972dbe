"""Equal-bit controls: codes made from a deterministic model's features, which a learned code has to beat.

    N  images   D  features   b  bits

Each is fitted on the training features alone and returns a coder. `encode` maps features [N, D] of any split
to uint8 [N, ceil(b / 8)], and `decode` maps these to float32 vectors, for use where bits won't do. The same
seed gives the same coder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from pipelines.kernels.pack import as_array, pack_bits, unpack_bits

WORDS = 256  # for each part of a product code, a byte; fitting takes at least as many training images


class Coder(Protocol):
    """A fitted code of `bits` bits. If `hamming`, codes are compared by Hamming distance, else by the cosine
    of the decoded vectors."""

    hamming: ClassVar[bool]

    @property
    def bits(self) -> int: ...

    def encode(self, features: Any) -> np.ndarray: ...

    def decode(self, codes: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class LinearHash:
    """1[(h - mean) . direction > 0], one bit for each direction."""

    mean: np.ndarray  # float32 [D]
    directions: np.ndarray | None  # float32 [D, b]; None: the features themselves
    hamming: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        return len(self.mean) if self.directions is None else self.directions.shape[1]

    def encode(self, features: Any) -> np.ndarray:
        return pack_bits(projected(features, self.mean, self.directions) > 0)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return -1 or 1 for each bit."""
        return 2 * unpack_bits(codes, self.bits).astype(np.float32) - 1


@dataclass(frozen=True)
class Int8:
    """A byte for each component: 256 evenly spaced levels from the training set's minimum to its maximum."""

    mean: np.ndarray  # float32 [D]
    directions: np.ndarray | None  # float32 [D, b / 8]; None: the features themselves
    low: np.ndarray  # float32 [b / 8]
    step: np.ndarray  # float32 [b / 8]
    hamming: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        return 8 * len(self.low)

    def encode(self, features: Any) -> np.ndarray:
        levels = (projected(features, self.mean, self.directions) - self.low) / self.step
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.low + codes.astype(np.float32) * self.step


@dataclass(frozen=True)
class ProductCode:
    """faiss's product quantiser: features are split into b / 8 parts, and each is replaced by the nearest of
    256 centroids. For OPQ, features are standardised and rotated first."""

    quantiser: Any
    mean: np.ndarray | float = 0.0  # float32 [D]
    scale: np.ndarray | float = 1.0  # float32 [D]
    rotation: np.ndarray | None = None  # float32 [D, E]; None: there is none
    hamming: ClassVar[bool] = False

    @property
    def bits(self) -> int:
        return 8 * self.quantiser.code_size

    def encode(self, features: Any) -> np.ndarray:
        x = (as_array(features) - self.mean) / self.scale
        if self.rotation is not None:
            x = x @ self.rotation
        return self.quantiser.compute_codes(np.ascontiguousarray(x, np.float32))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.quantiser.decode(np.ascontiguousarray(codes))


def fit_sign(train: Any, bits: int, seed: int = 0) -> LinearHash:
    """Sign bits of the first `bits` features about their training mean; fewer bits than features give a
    truncated prefix. Raises ValueError for more bits than features."""
    h = checked(train, bits, bits_a_number=1)
    directions = None if bits == h.shape[1] else np.eye(h.shape[1], bits, dtype=np.float32)
    return LinearHash(h.mean(axis=0), directions)


def fit_pca(train: Any, bits: int, seed: int = 0) -> LinearHash:
    """Signs of the first principal components. Raises ValueError for more bits than features."""
    h = checked(train, bits, bits_a_number=1)
    return LinearHash(h.mean(axis=0), principal_directions(h, bits))


def fit_itq(train: Any, bits: int, seed: int = 0) -> LinearHash:
    """Iterative quantisation (Gong & Lazebnik 2011): signs of the principal components, rotated to be as near
    as possible to their own signs. Raises ValueError for more bits than features."""
    h = checked(train, bits, bits_a_number=1)
    directions = principal_directions(h, bits)
    rotation = itq_rotation((h - h.mean(axis=0)) @ directions, seed)
    return LinearHash(h.mean(axis=0), directions @ rotation)


def itq_rotation(v: np.ndarray, seed: int, iterations: int = 50) -> np.ndarray:
    """Return an orthogonal R [b, b] that makes |sign(V R) - V R| small, for V [N, b].

    Starts with a random rotation and alternates B = sign(V R) with the R nearest to it (orthogonal
    Procrustes: V' B = U S W', R = U W'). Neither step can increase |B - V R|.
    """
    rotation = random_rotation(v.shape[1], seed).astype(v.dtype)
    one = v.dtype.type(1)  # as integers or fp64, the signs would take twice the memory of v
    for _ in range(iterations):
        u, _, w = np.linalg.svd(v.T @ np.where(v @ rotation > 0, one, -one))
        rotation = u @ w
    return rotation


def fit_lsh(train: Any, bits: int, seed: int = 0) -> LinearHash:
    """Random hyperplanes through the training mean (Charikar 2002): two images differ in a bit with
    probability angle / pi. Any number of bits is possible."""
    h = checked(train, bits)
    directions = np.random.default_rng(seed).standard_normal((h.shape[1], bits), np.float32)
    return LinearHash(h.mean(axis=0), directions)


def fit_int8(train: Any, bits: int, seed: int = 0) -> Int8:
    """A byte for each of the first bits / 8 principal components or, with 8 bits per feature, for the
    features themselves. Raises ValueError unless bits / 8 is a whole number from 1 to D."""
    h = checked(train, bits, bits_a_number=8)
    mean = h.mean(axis=0)
    directions = None if bits == 8 * h.shape[1] else principal_directions(h, bits // 8)
    x = projected(h, mean, directions)
    low, high = x.min(axis=0), x.max(axis=0)
    return Int8(mean, directions, low, np.maximum((high - low) / 255, np.finfo(np.float32).tiny))


def fit_pq(train: Any, bits: int, seed: int = 0) -> ProductCode:
    """Product quantisation (Jegou et al. 2011) by faiss, with 8 bits per part. Raises ValueError unless D is
    divisible by bits / 8 and there are at least 256 images; ImportError without faiss."""
    import faiss

    h = checked(train, bits, bits_a_number=8)
    parts = bits // 8
    if h.shape[1] % parts:
        raise ValueError(f"product quantisation: {h.shape[1]} features can't be cut into {parts} equal parts")
    if len(h) < WORDS:
        raise ValueError(
            f"product quantisation needs {WORDS} training images for its centroids, not {len(h)}"
        )
    quantiser = faiss.ProductQuantizer(h.shape[1], parts, 8)
    quantiser.cp.seed, quantiser.cp.min_points_per_centroid = seed + 1, 1
    with by_matrix_products():
        quantiser.train(np.ascontiguousarray(h))
    return ProductCode(quantiser)


def fit_opq(train: Any, bits: int, seed: int = 0) -> ProductCode:
    """Optimised product quantisation (Ge et al. 2013) of standardised features by faiss: a rotation, then 256
    words for each of bits / 8 parts.

    Raises ValueError unless bits / 8 is a whole number of at most D and there are at least 256 images;
    ImportError without faiss.
    """
    import faiss

    h = checked(train, bits, bits_a_number=8)
    if len(h) < WORDS:
        raise ValueError(
            f"a product quantiser needs {WORDS} training images for its words, not {len(h)}; itq needs fewer"
        )
    x, mean, scale = standardised(h)
    parts, width = bits // 8, h.shape[1]
    kept = width - width % parts  # numbers after the rotation, equally many for each part
    quantiser = faiss.ProductQuantizer(kept, parts, 8)
    quantiser.cp.seed, quantiser.cp.min_points_per_centroid = seed + 1, 1  # no warning below 39
    turn = faiss.OPQMatrix(width, parts, kept)
    turn.pq, turn.niter, turn.max_train_points = quantiser, 20, 20_000
    x = np.ascontiguousarray(x)
    with by_matrix_products():
        turn.train(x)
        quantiser.train(turn.apply(x))
    rotation = faiss.vector_to_array(turn.A).reshape(kept, width).T
    return ProductCode(quantiser, mean, scale, np.ascontiguousarray(rotation))


@contextmanager
def by_matrix_products() -> Iterator[None]:
    """Context in which faiss computes distances by matrix products from 20 images on, as it did before 1.15.
    That version does so from 128,000 on, which makes OPQ of 256 numbers take four times as long."""
    import faiss

    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


CONTROLS: dict[str, Callable[..., Coder]] = {
    "sign": fit_sign,
    "PCA + sign": fit_pca,
    "ITQ": fit_itq,
    "LSH": fit_lsh,
    "int8": fit_int8,
    "PQ": fit_pq,
    "OPQ": fit_opq,
}


def standardised(train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (standardised features [N, D], mean [D], standard deviation [D], or 1 where it is 0)."""
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = train.std(axis=0, dtype=np.float64).astype(np.float32)
    scale[scale < 1e-6 * max(float(scale.max()), 1e-30)] = 1
    return (train - mean) / scale, mean, scale


def principal_directions(h: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` directions of largest variance of h [N, D], float32 [D, count], each with its
    largest component positive, so that the result is unique."""
    centred = (h - h.mean(axis=0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    first = vectors[:, ::-1][:, :count]
    largest = np.abs(first).argmax(axis=0)
    return (first * np.sign(first[largest, np.arange(count)])).astype(np.float32)


def projected(features: Any, mean: np.ndarray, directions: np.ndarray | None) -> np.ndarray:
    h = as_array(features).astype(np.float32)
    if h.ndim != 2 or mean.shape != h.shape[1:]:
        raise ValueError(
            f"features [N, D] and a mean [D] are needed, not {list(h.shape)} and {list(mean.shape)}"
        )
    centred = h - mean
    return centred if directions is None else centred @ directions


def random_rotation(size: int, seed: int) -> np.ndarray:
    """Draw uniformly from the orthogonal matrices."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def checked(train: Any, bits: int, bits_a_number: int = 0) -> np.ndarray:
    """Return training features as float32 [N, D]. Raises ValueError for another shape, a vector that isn't
    finite, or a length that the code can't have: it has at most `bits_a_number` bits for each of the D
    numbers, unless that is 0, and whole bytes if it is 8."""
    h = as_array(train).astype(np.float32, copy=False)
    if h.ndim != 2 or not h.size:
        raise ValueError(f"training features [N, D] are needed, not {list(h.shape)}")
    require_finite_rows(h, "training features")
    most = bits_a_number * h.shape[1]
    if bits < 1 or (most and bits > most):
        raise ValueError(f"{h.shape[1]} features give codes of 1 to {most or 'any number of'} bits")
    if bits_a_number == 8 and bits % 8:
        raise ValueError(f"this code takes whole bytes, not {bits} bits")
    return h


def require_finite_rows(rows: np.ndarray, what: str) -> None:
    """Raise ValueError, with its number, at the first row that isn't finite."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"{what}: vector {finite.argmin()} isn't finite")
