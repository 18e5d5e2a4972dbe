"""A procedural data set with exactly known factors: one coloured shape on a dark background.

It serves regression from codes, since natural images have no ground truth. The shapes have no rotational
symmetry, so that the rotation is a function of the image.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("arrow", "L", "half-disc", "wedge")
FACTORS = ("shape", "size", "x", "y", "hue", "rotation")
CYCLIC = ("hue", "rotation")  # 0 and 1 mean the same
BACKGROUND = 40
SUPERSAMPLED = 4  # shapes are drawn this many times larger, then averaged, which anti-aliases edges

HALF_DISC = tuple((math.cos(t), math.sin(t)) for t in np.linspace(-math.pi / 2, math.pi / 2, 24))
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {  # corners in a circle of radius 1
    "arrow": ((1, 0), (0.1, 0.8), (0.1, 0.3), (-0.9, 0.3), (-0.9, -0.3), (0.1, -0.3), (0.1, -0.8)),
    "L": ((-0.5, -0.85), (-0.1, -0.85), (-0.1, 0.45), (0.75, 0.45), (0.75, 0.85), (-0.5, 0.85)),
    "half-disc": HALF_DISC,
    "wedge": ((1, 0), (-0.7, 0.45), (-0.7, -0.45)),
}


@dataclass(frozen=True)
class Shapes:
    """Images uint8 [N, R, R, 3] and their factors float64 [N, 6], with the columns of FACTORS.

    shape: 0..3, index in SHAPES. size: radius as a share of the side, 0.15 to 0.35. x, y: the centre as a
    share of the side, 0.3 to 0.7. hue, rotation: fractions of a turn, [0, 1).
    """

    images: np.ndarray
    factors: np.ndarray


def make_shapes(count: int, side: int, seed: int = 0) -> Shapes:
    """Draw `count` images with independent, uniform factors; equal arguments give equal images."""
    generator = np.random.default_rng(seed)
    factors = np.stack(
        [
            generator.integers(0, len(SHAPES), count).astype(np.float64),
            generator.uniform(0.15, 0.35, count),
            generator.uniform(0.3, 0.7, count),
            generator.uniform(0.3, 0.7, count),
            generator.random(count),
            generator.random(count),
        ],
        axis=1,
    )
    images = [draw(row, side) for row in factors]
    return Shapes(np.stack(images) if count else np.empty((0, side, side, 3), np.uint8), factors)


def draw(factors: np.ndarray, side: int) -> np.ndarray:
    """Return the image uint8 [side, side, 3] of one row of factors."""
    shape, size, x, y, hue, rotation = factors
    large = side * SUPERSAMPLED
    cos, sin = math.cos(2 * math.pi * rotation), math.sin(2 * math.pi * rotation)
    corners = [
        (large * (x + size * (cos * a - sin * b)), large * (y + size * (sin * a + cos * b)))
        for a, b in OUTLINES[SHAPES[int(shape)]]
    ]
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 1.0))
    image = Image.new("RGB", (large, large), (BACKGROUND,) * 3)
    ImageDraw.Draw(image).polygon(corners, fill=colour)
    return np.asarray(image.reduce(SUPERSAMPLED))


def regression_targets(factors: np.ndarray) -> dict[str, np.ndarray]:
    """Return regression targets [N, T] by name: cyclic factors as cosine and sine, the shape one-hot."""
    targets = {}
    for name, column in zip(FACTORS, factors.T):
        if name in CYCLIC:
            targets[name] = np.stack([np.cos(2 * np.pi * column), np.sin(2 * np.pi * column)], axis=1)
        elif name == "shape":
            targets[name] = np.eye(len(SHAPES))[column.astype(int)]
        else:
            targets[name] = column[:, None]
    return targets
