"""Corruptions by severity, and out-of-distribution images, which a sound uncertainty has to detect.

All are functions of pixels and a seed, and map uint8 [N, R, R, 3] to the same shape.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SEVERITIES = (1, 2, 3, 4, 5)
BLUR = (0.01, 0.02, 0.035, 0.05, 0.08)  # sigma, as a share of the side
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation, as a share of the range
JPEG = (50, 25, 12, 6, 3)  # quality
HIDDEN = (0.05, 0.1, 0.2, 0.35, 0.5)  # share of the area covered by a grey square
KEPT = (0.8, 0.6, 0.4, 0.25, 0.12)  # share of the area kept by a crop


def corrupt(images: np.ndarray, kind: str, severity: int, seed: int = 0) -> np.ndarray:
    """Apply one of CORRUPTIONS to the images, at severity 1 to 5; severity 0 returns them unchanged.

    Raises ValueError for an unknown kind or severity, or images that aren't uint8 [N, R, R, 3].
    """
    if kind not in CORRUPTIONS or severity not in (0, *SEVERITIES):
        raise ValueError(f"no corruption {kind!r} of severity {severity}: {', '.join(CORRUPTIONS)}; 0 to 5")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, R, R, 3], not {images.dtype} {list(images.shape)}")
    if severity == 0 or not len(images):
        return images
    generator = np.random.default_rng([seed, list(CORRUPTIONS).index(kind), severity])
    return CORRUPTIONS[kind](images, severity - 1, generator)


def blur(images: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    sigma = BLUR[level] * images.shape[1]
    return as_bytes(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="reflect"))


def noise(images: np.ndarray, level: int, generator: np.random.Generator) -> np.ndarray:
    added = generator.normal(scale=255 * NOISE[level], size=images.shape).astype(np.float32)
    return as_bytes(images + added)


def jpeg(images: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    def stored(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=JPEG[level])
        return np.asarray(Image.open(buffer).convert("RGB"))

    return np.stack([stored(image) for image in images])


def occlusion(images: np.ndarray, level: int, generator: np.random.Generator) -> np.ndarray:
    side = images.shape[1]
    width = max(1, round(side * HIDDEN[level] ** 0.5))
    covered = images.copy()
    for image, (top, left) in zip(covered, generator.integers(0, side - width + 1, (len(images), 2))):
        image[top : top + width, left : left + width] = 128
    return covered


def crop(images: np.ndarray, level: int, generator: np.random.Generator) -> np.ndarray:
    side = images.shape[1]
    width = max(1, round(side * KEPT[level] ** 0.5))
    places = generator.integers(0, side - width + 1, (len(images), 2)).tolist()

    def part(image: np.ndarray, top: int, left: int) -> np.ndarray:
        box = (left, top, left + width, top + width)
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box))

    return np.stack([part(image, *place) for image, place in zip(images, places)])


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "occlusion": occlusion,
    "crop": crop,
}


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# Out-of-distribution images --------------------------------------------------------------------------------


def noise_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return images of uniform noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def texture_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return textures without objects: Gaussian fields of random scale, orientation and two colours."""
    generator = np.random.default_rng(seed)
    made = np.empty((count, side, side, 3), np.uint8)
    for image in made:
        sigma = side * generator.uniform(0.01, 0.12, size=2)
        field = gaussian_filter(generator.normal(size=(side, side)), sigma, mode="wrap")
        share = 1 / (1 + np.exp(-2 * field / (field.std() + 1e-12)))[..., None]
        first, second = generator.uniform(0, 255, (2, 3))
        image[:] = as_bytes(share * first + (1 - share) * second)
    return made


def digit_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return scikit-learn's handwritten digits, enlarged."""
    from sklearn.datasets import load_digits  # slow to load, and rarely needed

    pixels = load_digits().images
    chosen = np.random.default_rng(seed).choice(len(pixels), count, replace=count > len(pixels))
    grey = [Image.fromarray(as_bytes(pixels[i] * (255 / 16))) for i in chosen]
    resized = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in grey]
    return np.stack(resized)[..., None].repeat(3, axis=3)


OUT_OF_DISTRIBUTION: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "noise": noise_images,
    "textures": texture_images,
    "digits": digit_images,
}
