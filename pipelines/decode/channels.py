"""Which images with more than three channels are refused, since the networks here read RGB.

Grey, palette, CMYK, YCbCr and Lab images become RGB, and one alpha channel is dropped. A TIFF with further
bands beside its colours (such as infrared) is refused instead of being read without them, as is a NumPy
array.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import TiffImagePlugin

from pipelines.formats.jpeg import DamagedImage

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _SAMPLES, _EXTRA = 262, 277, 338  # TIFF tags
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # channels by photometric interpretation; 5: CMYK
_ALPHA = (1, 2)  # values of ExtraSamples that mean alpha, premultiplied or not


def require_colours(data: bytes) -> None:
    """Raise DamagedImage if channels would be lost, or if the data is an array and not an image file."""
    if data.startswith(b"\x93NUMPY"):
        raise DamagedImage(
            "a NumPy array, no image file: save its images as PNG, RGB or grey; from Python, "
            "lvssl.Model.encode takes arrays"
        )
    if not data.startswith(_TIFF):
        return
    try:
        header = data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8]
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bands = int(tags.get(_SAMPLES, 1))
        extra = [int(kind) for kind in np.ravel(tags.get(_EXTRA, ()))]
        colours = _COLOURS.get(int(tags.get(_PHOTOMETRIC, -1)))
    except Exception:  # damaged: reported when it is opened
        return
    alpha = extra[:1] if extra else _ALPHA[:1]  # not all programs declare it
    if colours is not None and bands > colours and (bands > colours + 1 or alpha[0] not in _ALPHA):
        raise DamagedImage(
            f"a TIFF of {bands} channels: images are grey or RGB, with alpha at most; "
            "save three of the channels as RGB"
        )
