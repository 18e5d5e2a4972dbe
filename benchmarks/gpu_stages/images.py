"""Images for runs without any: JPEGs of realistic size, smooth shapes under noise, made once with Pillow."""

import io
from pathlib import Path

import numpy as np

CLASSES = 10


def jpeg(rng: np.random.Generator, label: int, height: int, width: int) -> bytes:
    """Blobs of colour whose mean depends on the class, under noise that gives the file a typical size."""
    from PIL import Image

    coarse = rng.integers(0, 160, (6, 8, 3)) + 90 * np.array([label % 2, label // 2 % 2, label // 4]) % 256
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + rng.normal(0, 9, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def made(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    """A folder of class folders with `count` images, 1.6 times as wide as `side`, or as wide up to 64 px."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        height = side if side <= 64 else int(1.2 * side + rng.integers(0, side // 4))
        width = side if side <= 64 else int(1.6 * side)
        target = folder / f"class{n % CLASSES}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{n:06d}.jpg").write_bytes(jpeg(rng, n % CLASSES, height, width))
    return folder


def beton(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    """Such images, converted by the project's converter; made once."""
    from pipelines.convert.conversion import convert

    out = folder / f"made-{count}-{side}-{seed}.beton"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        convert(str(made(folder / f"files-{count}-{side}-{seed}", count, side, seed)), out)
    return out
