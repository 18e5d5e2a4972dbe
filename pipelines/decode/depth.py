"""Images of more than 8 bits a sample: which of their values is black, and which is white.

The file usually states it: TIFF by SMinSampleValue and SMaxSampleValue or by a BitsPerSample below 16, PNG by
its sBIT chunk, PPM and JPEG 2000 by their headers. Where it doesn't, one white level applies to the whole
set. Without either, 16 bits are assumed to reach up to 65,535, unless the image would come out nearly black:
such an image is refused, as is one without any known range. No image is brightened by its own content.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipelines.formats.jpeg import DamagedImage

FULL = 65_535
DARK = 16_384  # 16-bit values all below this don't use the two upper bits: most likely 14 bits or fewer
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SMIN, _SMAX = 258, 262, 340, 341  # TIFF tags
_ALPHA = {4: 1, 6: 1}  # PNG colour types with an alpha channel
_UPPER_BITS = ("L", "LA", "RGB", "RGBA")  # modes for which Pillow keeps only 8 of 16 bits
_SCALED_BY_PILLOW = ("PPM", "JPEG2000")  # formats that Pillow scales to 16 bits, by their headers


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether an image, opened by Pillow from `data`, has samples of more than 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return True
    return image.mode in _UPPER_BITS and (_deep_png(image, data) or _tiff_bits(image) > 8)


def to_8_bits(image: Image.Image, data: bytes, white_level: int | None = None) -> np.ndarray:
    """Convert an image that `is_deep` to samples 0 to 255, uint8 [H, W] or [H, W, 3].

    `white_level`: the white value, with 0 as black, of images that don't state theirs. Raises DamagedImage if
    it is needed but not given, if the image has values beyond it, or if a file of 16-bit colours other than a
    PNG needs one other than 65,535.
    """
    range_ = _stated(image, data) or (None if white_level is None else (0, white_level))
    if image.mode in _UPPER_BITS:
        upper = np.asarray(image)[..., : 1 if image.mode in ("L", "LA") else 3]
        if range_ == (0, FULL) or (range_ is None and upper.max() >= DARK >> 8):
            return upper if upper.shape[2] == 3 else upper[..., 0]
        if range_ is None and not _deep_png(image, data):
            raise _unknown(f"16-bit values end below {DARK:,}", FULL >> 4)
        if not _deep_png(image, data):
            raise DamagedImage(
                "16-bit colours can only be read with a white level of 65535; save it as PNG, or with 8 bits"
            )
    values = _png_samples(data) if _deep_png(image, data) else np.asarray(image)
    if range_ is None:
        range_ = _assumed(image, data, values)
    black, white = range_
    lowest, highest = values.min(), values.max()
    if not (black <= lowest and highest <= white):
        said = f"{lowest:,} to {highest:,}, beyond {black:,} to {white:,}"
        raise DamagedImage(f"its values reach from {said}, the range that it or --white-level states")
    if values.dtype.kind == "f":
        made = np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
    else:
        span = int(white) - int(black)
        made = ((255 * (values.astype(np.int64) - int(black)) + span // 2) // span).astype(np.uint8)
    return 255 - made if _is_negative(image) else made


def _assumed(image: Image.Image, data: bytes, values: np.ndarray) -> tuple[float, float]:
    """The range of an image for which neither its file nor the user states one."""
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range; save it with 8 or 16 bits")
    highest = int(values.max())
    if not (image.mode.startswith("I;16") or _deep_png(image, data)):
        raise _unknown(f"32-bit integers (here up to {highest:,}) have no known range", highest)
    if 0 < highest < DARK:
        raise _unknown(f"16-bit values end at {highest:,}", highest)
    return 0, FULL


def _unknown(what: str, highest: int) -> DamagedImage:
    likely = max(255, 2 ** int(highest).bit_length() - 1)
    other = FULL if likely < FULL else 2**32 - 1
    return DamagedImage(
        f"{what}, and the file doesn't say which value is white: convert the set with --white-level {likely} "
        f"or {other} (if it really is that dark), or save it with 8 bits"
    )


def _stated(image: Image.Image, data: bytes) -> tuple[float, float] | None:
    """(black, white) as the file states them; None if it doesn't."""
    if image.format in _SCALED_BY_PILLOW:
        return 0, FULL
    if _deep_png(image, data):
        return _png_range(data)
    tags = _tiff_tags(image)
    if _SMAX in tags:
        black, white = (np.ravel(tags.get(tag, 0))[0].item() for tag in (_SMIN, _SMAX))
        if black < white:
            return black, white
    bits = _tiff_bits(image)
    return (0, 2**bits - 1) if 8 < bits < 16 else None


def _tiff_tags(image: Image.Image) -> Any:
    """{tag: value}; none for other formats."""
    return image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]


def _tiff_bits(image: Image.Image) -> int:
    """Bits of a TIFF's samples, the most of any channel; 1 for other formats."""
    return int(np.ravel(_tiff_tags(image).get(_BITS_PER_SAMPLE, 1)).max())


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF, which Pillow heeds only up to 8 bits."""
    return _tiff_tags(image).get(_PHOTOMETRIC) == 0


# ------------------------------------------------------------------------- PNG


def _deep_png(image: Image.Image, data: bytes) -> bool:
    return image.format == "PNG" and data[24:25] == b"\x10"  # the bit depth in IHDR, which comes first


def _png_range(data: bytes) -> tuple[int, int] | None:
    """The range that an sBIT chunk states. A writer that follows the standard shifts the bits to the top of
    the 16, and fills the rest with zeros or with the upper bits again; many writers leave them at the
    bottom."""
    bits = _significant_bits(data)
    if bits is None:
        return None
    if bits < 16:
        values = _png_samples(data).astype(np.int64)
        below = (1 << (16 - bits)) - 1  # bits below the significant ones, if the standard is followed
        low = values & below
        if values.max() < 1 << bits and ((low != 0) & (low != (values >> bits) & below)).any():
            return 0, (1 << bits) - 1
    return 0, FULL


def _significant_bits(data: bytes) -> int | None:
    """The largest number of bits of any colour in a PNG's sBIT chunk; None if it has none."""
    at = 8
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"sBIT" and length:
            colours = data[at + 8 : at + 8 + length]
            bits = max(colours[: length - _ALPHA.get(data[25], 0)], default=0)
            return bits if 1 <= bits <= 16 else None
        if kind == b"IDAT":
            return None
        at += 12 + length
    return None


def _png_samples(data: bytes) -> np.ndarray:
    """uint16 [H, W] or [H, W, 3] with all 16 bits, which Pillow only gives for grey images; without alpha."""
    import torch  # takes seconds to import, and few files need it
    from torchvision.io import ImageReadMode, decode_png

    read = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    samples = read.permute(1, 2, 0).numpy()
    return samples[..., 0] if data[25] in (0, 4) else samples[..., :3]
