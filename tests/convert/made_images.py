"""Images to convert: smooth, so that JPEG keeps them within a few levels, and all different."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [height, width, 3] with a gradient in a different direction in each channel."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.cos(2 * y[..., None] * np.sin(angle) + 2 * x[..., None] * np.cos(angle) + angle)
    return np.rint(127.5 + 100 * waves).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Return the bytes of an image file; `options` are passed to Pillow's save."""
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """Decode an image file with Pillow, the oracle: uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def with_orientation(array: np.ndarray, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, kind, exif=exif.tobytes(), **({"quality": 95} if kind == "JPEG" else {}))


def class_folders(root: Path, files: dict[str, bytes]) -> Path:
    """Write {"class/name.jpg": bytes} below root."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def photos(root: Path, classes: int = 3, each: int = 4) -> Path:
    """Write a folder of class folders with JPEGs of many sizes."""
    files = {
        f"class{c}/{i:03}.jpg": encoded(pixels(20 + 3 * i, 30 + c, seed=10 * c + i))
        for c in range(classes)
        for i in range(each)
    }
    return class_folders(root, files)


def image_of(beton, index: int) -> bytes:
    """Return the bytes that a beton holds for one image."""
    start, size = int(beton.offsets[index]), int(beton.sizes[index])
    return beton.path.read_bytes()[start : start + size]
