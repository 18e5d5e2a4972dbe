"""How one image is stored: byte for byte, re-encoded, as raw pixels, or not at all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from pipelines.datasets.dataset import Dataset
from pipelines.decode.pixels import as_rgb, decode_damaged, decode_other, upright
from pipelines.errors import ON_ERROR, InputError, first_line
from pipelines.formats import jpeg, turbojpeg
from pipelines.formats.beton import JPEG, LONGEST_SIDE, RAW

LINE_ART = ("raw", "jpeg")
SMALL = 64 * 64  # pixels; up to this size, what isn't a JPEG is stored raw: cheaper to read, hardly larger
STORAGE_KINDS = ("refused", "jpeg_untouched", "reencoded", "raw")  # their numbers are written to files


@dataclass(frozen=True)
class Settings:
    """What is stored, and of which images. The bytes of a beton follow from these and the source alone."""

    max_resolution: int | None = None  # longest side in pixels; larger images are shrunk and re-encoded
    jpeg_quality: int = 90  # quality of re-encoded images, 1 to 100
    raw_proportion: float = 0.0  # fraction of the images stored as RGB pixels: large, but nothing to decode
    subset: int | None = None  # number of images, balanced over the classes; None: all
    shuffle_seed: int | None = None  # None keeps the source's order, and draws the subset with seed 0
    on_error: str = "skip"  # one of ON_ERROR: what to do about a damaged image; skipped ones are listed
    white_level: int | None = None  # of images of more than 8 bits that don't state theirs, see `depth`
    image_column: str | None = None  # of a table or a tar's samples, if it has an unusual name
    label_column: str | None = None  # likewise; "none" leaves the labels out
    targets: list[str] = field(default_factory=list)  # columns of numbers to store
    max_pixels: int = jpeg.MAX_PIXELS  # larger images can't be stored
    jpeg_sampling: str = "4:2:0"  # of re-encoded images, one of turbojpeg.SAMPLINGS
    line_art: str = "raw"  # one of LINE_ART: for images whose lossless file is smaller than their JPEG
    only_classes: list[str] = field(default_factory=list)  # names of the classes to store; none: all

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        for option, number, least, most in (
            ("max-resolution", self.max_resolution, 1, LONGEST_SIDE),
            ("jpeg-quality", self.jpeg_quality, 1, 100),
            ("raw-proportion", self.raw_proportion, 0, 1),
            ("shuffle-seed", self.shuffle_seed, 0, 2**32 - 1),
            ("white-level", self.white_level, 1, 2**32 - 1),
        ):
            if number is not None and not least <= number <= most:
                raise InputError(f"--{option} {number}: must be within {least} and {most}")
        for option, number in (("subset", self.subset), ("max-pixels", self.max_pixels)):
            if number is not None and number < 1:
                raise InputError(f"--{option} {number}: must be at least 1")
        for option, name, known in (
            ("jpeg-sampling", self.jpeg_sampling, sorted(turbojpeg.SAMPLINGS)),
            ("line-art", self.line_art, LINE_ART),
            ("on-error", self.on_error, ON_ERROR),
        ):
            if name not in known:
                raise InputError(f"--{option} {name}: must be {' or '.join(known)}")


@dataclass(frozen=True)
class Stored:
    """One image in its stored form."""

    mode: int  # JPEG or RAW
    height: int
    width: int
    data: bytes | memoryview
    storage_kind: str  # one of STORAGE_KINDS
    exif_rotated: bool = False  # EXIF's orientation was applied
    digest: bytes = b""  # SHA-256 of data
    file: bytes | memoryview = b""  # the image as a file, for a tar: JPEG bytes unchanged, pixels as PNG
    file_digest: bytes = b""
    several_frames: bool = False  # of which this is the first

    def digested(self, as_png: bool) -> Stored:
        """Return a copy with digests, and with the image as a file if `as_png`."""
        digest = hashlib.sha256(self.data).digest()
        if not as_png or self.mode == JPEG:
            return replace(self, digest=digest, file=self.data, file_digest=digest)
        out = io.BytesIO()
        pixels = np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)
        Image.fromarray(pixels).save(out, "PNG")
        file = out.getvalue()
        file_digest = hashlib.sha256(file).digest()
        return replace(self, digest=digest, file=file, file_digest=file_digest)


def store_batch(
    source: Dataset, indices: Sequence[int], settings: Settings, as_png: bool
) -> list[Stored | str]:
    """Check, store and digest a source's images; returns each one, or the reason why it can't be stored."""
    results: list[Stored | str] = []
    for index in indices:
        try:
            image: Any = source.read(index)
            # An image that another conversion stored comes unchanged: from the parts of an array job, to be
            # merged.
            stored = image if isinstance(image, Stored) else store(image, settings, index)
            results.append(stored.digested(as_png))
        except InputError:  # concerns the whole set, not this image
            raise
        except OSError as error:
            results.append(f"cannot be read ({error.strerror or error})")
        except Exception as error:  # any decoder error concerns this image alone
            results.append(first_line(error))
    return results


def store(image: bytes | np.ndarray, settings: Settings, index: int = 0) -> Stored:
    """Check one image (a file's bytes, or pixels) and convert it to its stored form.

    An upright JPEG that FFCV can read and that isn't too large keeps its bytes, unless --raw-proportion
    includes it, which `index`, the image's position in its source, decides. Raises jpeg.DamagedImage.
    """
    raw = chosen_raw(settings, index)
    if isinstance(image, np.ndarray):
        return _store_pixels(as_rgb(image), settings, raw, small_is_raw=True)
    if not image:
        raise jpeg.DamagedImage("the file is empty")
    if not jpeg.is_jpeg(image):
        pixels, orientation = decode_other(image, settings.white_level, settings.max_pixels)
        pixels, lossless = upright(pixels, orientation), len(image) if _is_lossless(image) else None
        stored = _store_pixels(pixels, settings, raw, True, orientation != 1, lossless)
        return replace(stored, several_frames=_has_several_frames(image, settings.max_pixels))
    try:
        return _store_jpeg(image, settings, raw)
    except jpeg.DamagedImage:
        kept = decode_damaged(image, settings.max_pixels) if settings.on_error == "keep" else None
        if kept is None:
            raise
        return _store_pixels(kept, settings, raw, small_is_raw=False)


def _store_jpeg(image: bytes, settings: Settings, raw: bool) -> Stored:
    header = jpeg.read_header(image, settings.max_pixels)
    size = _target_size(header.height, header.width, settings.max_resolution)
    same_size = size == (header.height, header.width)
    readable = header.height * header.width <= jpeg.PIXELS_PER_BYTE * len(image)  # not blank arithmetic codes
    if header.is_rgb_or_grey and readable and header.orientation == 1 and same_size and not raw:
        jpeg.check(image, header)
        return Stored(JPEG, *size, image, "jpeg_untouched")
    pixels = jpeg.decode(image, header, None if same_size else size)
    if not same_size:
        pixels = area_resize(pixels, *size)
    exif_rotated = header.orientation != 1
    pixels = upright(pixels, header.orientation)
    return _store_pixels(pixels, settings, raw, small_is_raw=False, exif_rotated=exif_rotated)


def chosen_raw(settings: Settings, index: int) -> bool:
    """Whether --raw-proportion includes this image, which doesn't depend on the order or the subset."""
    text = f"{settings.shuffle_seed or 0}:{index}".encode()  # whose CRC would be far from uniform
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") / 2**32
    return drawn < settings.raw_proportion


def _store_pixels(
    pixels: np.ndarray,
    settings: Settings,
    raw: bool,
    small_is_raw: bool,
    exif_rotated: bool = False,
    lossless: int | None = None,
) -> Stored:
    """`lossless`: size of the file in bytes, if its compression is lossless. If a JPEG would take more bytes
    per pixel, the image is line art or the like. A JPEG would change it by tens of levels, so pixels are
    stored."""
    height, width = pixels.shape[:2]
    size = _target_size(height, width, settings.max_resolution)
    if size != (height, width):
        pixels = area_resize(pixels, *size)
    if raw or (small_is_raw and size[0] * size[1] <= SMALL):
        return Stored(RAW, *size, np.ascontiguousarray(pixels).tobytes(), "raw", exif_rotated)
    data = jpeg.encode(pixels, settings.jpeg_quality, settings.jpeg_sampling)
    is_art = lossless is not None and lossless * size[0] * size[1] < len(data) * height * width
    if is_art and settings.line_art == "raw":
        return Stored(RAW, *size, np.ascontiguousarray(pixels).tobytes(), "raw", exif_rotated)
    return Stored(JPEG, *size, data, "reencoded", exif_rotated)


def _is_lossless(data: bytes) -> bool:
    """Whether this is a PNG, a GIF, a BMP, or a lossless WebP."""
    return data.startswith((b"\x89PNG", b"GIF8", b"BM")) or (data[8:12] == b"WEBP" and b"VP8L" in data[12:64])


def _has_several_frames(data: bytes, most: int | None) -> bool:
    """Whether the file of an image that could be decoded has further pages or frames."""
    if data.startswith(b"\x89PNG"):
        return b"acTL" in data[: data.find(b"IDAT")]  # without opening it: most images are PNGs
    with suppress(Exception):  # damage behind the first one
        return bool(getattr(jpeg.open_with_pillow(data, load=False, most=most), "is_animated", False))
    return False


def _target_size(height: int, width: int, max_resolution: int | None) -> tuple[int, int]:
    """(height, width) with the longest side at most max_resolution; rounded down, but at least 1."""
    longest = max(height, width)
    if longest > LONGEST_SIDE and max_resolution is None:
        raise jpeg.DamagedImage(
            f"{width} x {height} is too large (side over {LONGEST_SIDE}); set --max-resolution"
        )
    if max_resolution is None or longest <= max_resolution:
        return height, width
    return max(1, height * max_resolution // longest), max(1, width * max_resolution // longest)


def area_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Downscale uint8 [H, W, 3] to [height, width, 3]: every pixel is the mean of the area that it covers."""
    from pipelines.convert.area import shrink  # numba takes a second to load, and few conversions need it

    return shrink(np.ascontiguousarray(pixels), height, width)


def select(labels: np.ndarray, subset: int | None, shuffle_seed: int | None) -> np.ndarray:
    """Positions of the images to store, in the order in which to store them, int64 [subset or N].

    The subset is drawn at random by the seed, balanced over the classes as far as they allow. Without a seed
    it is the subset of seed 0, in the source's order. Raises InputError if it is larger than the data.
    """
    total = len(labels)
    if subset is not None and subset > total:
        raise InputError(f"--subset {subset}: there are only {total} images to choose from")
    order = np.arange(total)
    if subset is not None and subset < total:
        random = np.random.RandomState(shuffle_seed or 0)  # frozen: the same draw in every NumPy release
        shuffled = random.permutation(total)
        # Round r takes the r-th image of each class (in random order): sort by round, ties in random order.
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        counts = np.unique(labels, return_counts=True)[1]
        rounds = np.concatenate([np.arange(count) for count in counts])
        ties = random.permutation(total)
        order = np.sort(by_class[np.lexsort((ties, rounds))[:subset]])
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(order)
    return order
