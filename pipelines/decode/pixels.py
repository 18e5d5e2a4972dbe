"""Pixels of image files: 8-bit RGB, rotated upright."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipelines.datasets.folders import read_regular
from pipelines.decode import depth
from pipelines.decode.channels import require_colours
from pipelines.errors import InputError, first_line
from pipelines.formats import jpeg


def decode_rgb(image: bytes | str | Path, name: str | None = None, keep: bool = False) -> np.ndarray:
    """RGB pixels of an image file (its path or bytes), uint8 [H, W, 3], rotated upright as EXIF says.

    `keep=True` returns what `decode_damaged` makes of a damaged JPEG. Raises InputError, naming the file (or
    `name`), if it can't be read or is damaged.
    """
    name = name or (f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image))
    try:
        data = image if isinstance(image, bytes) else read_regular(os.fspath(image))
        if jpeg.is_jpeg(data):
            return _decode_jpeg(data, keep)
        return upright(*decode_other(data))
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever a decoder raises is about this image alone
        raise InputError(f"{name}: not an image, or damaged ({first_line(error)})") from error


def _decode_jpeg(data: bytes, keep: bool) -> np.ndarray:
    try:
        header = jpeg.read_header(data)
        return upright(jpeg.decode(data, header), header.orientation)
    except jpeg.DamagedImage:
        kept = decode_damaged(data) if keep else None
        if kept is None:
            raise
        return kept


def decode_other(
    data: bytes, white_level: int | None = None, most: int | None = None
) -> tuple[np.ndarray, int]:
    """Decode PNG, WebP, GIF (its first frame) and whatever else Pillow reads: uint8 [H, W, 3] and the EXIF
    orientation.

    Transparency is dropped, and 16 bits become 8; for `white_level` see `depth`. Raises jpeg.DamagedImage,
    also for images with more channels than colours, see `channels`, or with more than `most` pixels, see
    `jpeg.check_size`.
    """
    try:
        require_colours(data)
        image = jpeg.open_with_pillow(data, most=most)
        if depth.is_deep(image, data):
            pixels = as_rgb(depth.to_8_bits(image, data, white_level))
        else:
            pixels = np.asarray(image.convert("RGB"))
        return pixels, jpeg.orientation(image.getexif)
    except jpeg.DamagedImage:
        raise
    except Exception as error:  # any decoder error concerns this image alone
        raise jpeg.DamagedImage(first_line(error)) from error


def decode_damaged(image: bytes | np.ndarray, most: int | None = None) -> np.ndarray | None:
    """What Pillow makes of a JPEG that libjpeg-turbo finds damaged, uint8 [H, W, 3], upright; None if it
    makes nothing of it, or if it isn't a JPEG. Parts may be wrong; with only extraneous bytes at the end none
    are."""
    if isinstance(image, np.ndarray) or not jpeg.is_jpeg(image):
        return None
    try:
        opened = jpeg.open_with_pillow(image, most=most)
        return upright(np.asarray(opened.convert("RGB")), jpeg.orientation(opened.getexif))
    except Exception:  # any decoder error concerns this image alone
        return None


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] -> [H, W, 3]."""
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8) of pixels [H, W, 3]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
