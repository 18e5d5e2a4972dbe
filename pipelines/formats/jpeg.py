"""JPEG: look at the header, check, decode, encode.

libturbojpeg is called directly where it is found (`formats.turbojpeg`): unlike Pillow it reports damaged
data that a decoder can paint over, such as a flipped byte, and it leaves Python's lock free. Without it,
Pillow does the work: the same pixels of whole files and the same bytes where it encodes (its wheels bundle
libjpeg-turbo; one built with another libjpeg may differ by rounding), but of damage it finds truncation only.
"""

from __future__ import annotations

import ctypes
import io
import threading
from collections.abc import Callable
from ctypes import byref, c_int, c_ulong, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.errors import InputError, first_line
from pipelines.formats import turbojpeg

_ORIENTATION = 0x0112  # EXIF tag
MAX_PIXELS = 1 << 28  # of an image: 0.8 GB when it is decoded; larger ones are most likely not meant
most_pixels = MAX_PIXELS  # that are read in this process, see read_up_to
ANY_SIZE = 65_535**2  # the most that a JPEG's header can say
COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")  # Pillow's names of what is tried first
LFS = b"version https://git-lfs"  # how the pointer begins that Git leaves in place of a large file
LFS_HINT = "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"


class DamagedImage(Exception):
    """What a decoder says of bytes that are no whole image."""


@dataclass(frozen=True)
class JpegHeader:
    height: int
    width: int
    colour: str  # one of turbojpeg.COLOURS
    orientation: int  # EXIF's, 1 to 8; 1 is upright
    sampling_is_usual: bool = True  # 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1; others libjpeg-turbo 2.1 can't read

    @property
    def is_rgb_or_grey(self) -> bool:
        """Whether a decoder that knows only RGB output and usual sampling, such as FFCV's, can read it."""
        return self.colour in ("RGB", "YCbCr", "grey") and self.sampling_is_usual


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_up_to(pixels: int | None) -> None:
    """From here on, images of up to so many pixels are read in this process; None: MAX_PIXELS. Raises
    InputError below 1."""
    global most_pixels
    if pixels is not None and pixels < 1:
        raise InputError(f"--max-pixels {pixels}: must be at least 1")
    most_pixels = MAX_PIXELS if pixels is None else pixels


def check_size(height: int, width: int, most: int | None = None) -> None:
    """Raises DamagedImage for an image of more than `most` pixels, whatever its format; None: as
    `read_up_to` said, or else MAX_PIXELS."""
    most = most_pixels if most is None else most
    if height * width > most:
        allows = f"--max-pixels {height * width} allows them"
        raise DamagedImage(f"{width} x {height} are more than {most:,} pixels; {allows}")


def read_header(data: bytes, most: int | None = None) -> JpegHeader:
    """Size, colour space and orientation. Raises DamagedImage if there is no JPEG header to read, or for
    more than `most` pixels, see `check_size`."""
    header = _header(data)
    check_size(header.height, header.width, most)
    return header


def _header(data: bytes) -> JpegHeader:
    turned = _orientation_in(data)
    if _turbo is None:
        turbojpeg.say_absence()
        image = open_with_pillow(data, load=False, most=ANY_SIZE)
        colour = {"RGB": "YCbCr", "L": "grey"}.get(image.mode, image.mode)
        return JpegHeader(image.height, image.width, colour, turned)
    handle = _handle()
    width, height, sampling, colour_index = numbers = [c_int() for _ in range(4)]
    if _turbo.tjDecompressHeader3(handle, data, len(data), *map(byref, numbers)):
        failed = _failed(handle)
        if "subsampling" not in str(failed):
            raise failed
        image = open_with_pillow(data, load=False, most=ANY_SIZE)
        return JpegHeader(image.height, image.width, "unknown", turned, False)
    known = 0 <= colour_index.value < len(turbojpeg.COLOURS)
    colour = turbojpeg.COLOURS[colour_index.value] if known else "unknown"
    usual = 0 <= sampling.value < turbojpeg.USUAL_SAMPLINGS
    return JpegHeader(height.value, width.value, colour, turned, usual)


def check(data: bytes, header: JpegHeader) -> None:
    """Decode the whole file and raise DamagedImage at any error or warning of libjpeg-turbo's.

    It is decoded to grey at an eighth of the size: that reads every coefficient, skips most of the
    arithmetic, and finds the same damage as a full decode, in 0.6 of the time.
    """
    if _turbo is None:
        decode(data, header)
    else:
        _decompress(data, header, turbojpeg.GREY, eighths=1)


def decode(data: bytes, header: JpegHeader, shortest: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels, uint8 [H, W, 3], as stored (not turned). CMYK is converted by Pillow's formula.

    With `shortest` = (height, width), the decoder may scale by n/8 while it decodes, to no less than that
    size: cheaper than decoding everything when the image is to shrink anyway.
    """
    if not header.is_rgb_or_grey:
        return np.asarray(open_with_pillow(data, most=ANY_SIZE).convert("RGB"))
    eighths = 8
    if shortest is not None:  # only the scales that libjpeg-turbo has vector code for
        enough = [n for n in (1, 2, 4) if np.all(np.greater_equal(_scaled(header, n), shortest))]
        eighths = min(enough, default=8)
    if _turbo is None:
        return np.asarray(open_with_pillow(data, shrink=8 // eighths, most=ANY_SIZE).convert("RGB"))
    return _decompress(data, header, turbojpeg.RGB, eighths)


def encode(pixels: np.ndarray, quality: int, sampling: str = "4:2:0") -> bytes:
    """A baseline JPEG of uint8 [H, W, 3]; quality 1 to 100, `sampling` one of turbojpeg.SAMPLINGS."""
    if _turbo is not None:
        return _compress(np.ascontiguousarray(pixels), quality, turbojpeg.SAMPLINGS[sampling])
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=sampling)
    return out.getvalue()


def library() -> str:
    """What decodes here, for a manifest."""
    return "libturbojpeg" if _turbo is not None else "pillow"


def orientation(exif: Callable[[], Image.Exif]) -> int:
    """EXIF's orientation, 1 to 8; 1 where it says nothing, or nothing sensible."""
    try:
        value = exif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _orientation_in(data: bytes) -> int:
    """What the EXIF segment of a JPEG says; the segments are stepped over, not searched: that took longer
    than reading the file."""
    place, end = 2, len(data) - 4
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA or marker == 0xD9 or marker < 0xC0:  # the image itself, its end, or no header
            return 1
        if marker == 0xE1 and data.startswith(b"Exif\0\0", place + 4):
            return orientation(partial(_exif, data[place + 4 : place + 4 + (1 << 16)]))
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return 1


def _exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


class _AnySize:
    """Within it Pillow opens images of up to ANY_SIZE, in every thread; and says nothing about them."""

    def __init__(self) -> None:
        self._lock, self._within, self._before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, ANY_SIZE
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                Image.MAX_IMAGE_PIXELS = self._before


_any_size = _AnySize()


def open_with_pillow(data: bytes, shrink: int = 1, load: bool = True, most: int | None = None) -> Image.Image:
    """An image of any format, loaded, or its header alone. Raises DamagedImage, also for more than `most`
    pixels, see `check_size`.

    `shrink` (1, 2, 4 or 8) has the decoder make a JPEG so many times smaller, sides rounded up.
    """
    try:
        with _any_size:
            image = _opened(io.BytesIO(data))
        if image.format == "EPS":
            raise DamagedImage("EPS is drawn by a program, Ghostscript, which isn't run here; save it as PNG")
        check_size(image.height, image.width, most)
        if shrink > 1:  # not rounded: Pillow divides the size by this, and looks for the largest scale below
            image.draft(None, (image.width / shrink, image.height / shrink))  # type: ignore[arg-type]
        if load:
            image.load()
        return image
    except UnidentifiedImageError as error:  # its own message holds an address, different in each run
        if data.startswith(LFS):
            raise DamagedImage(LFS_HINT) from error
        raise DamagedImage("not an image file of a known kind") from error
    except DamagedImage:
        raise
    except Image.DecompressionBombError as error:
        raise DamagedImage("more pixels than any image has that is meant as one") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise DamagedImage(first_line(error)) from error


def _opened(file: io.BytesIO) -> Image.Image:
    """An image's header, its formats tried in the same order whatever was opened before. TGA comes last: it
    has no signature, and takes an ICO for its own."""
    try:
        return Image.open(file, formats=COMMON)
    except UnidentifiedImageError:
        Image.init()
        others = sorted(set(Image.ID) - {*COMMON}, key=lambda name: (name == "TGA", name))
        return Image.open(file, formats=others)


def _scaled(header: JpegHeader, eighths: int) -> tuple[int, int]:
    return -(-header.height * eighths // 8), -(-header.width * eighths // 8)


def _decompress(data: bytes, header: JpegHeader, pixels: int, eighths: int) -> np.ndarray:
    height, width = _scaled(header, eighths)
    shape = (height, width, 3) if pixels == turbojpeg.RGB else (height, width)
    try:
        out = np.empty(shape, np.uint8)
    except MemoryError as error:
        raise DamagedImage(f"{header.width} x {header.height} pixels do not fit into memory") from error
    handle = _handle()
    target = (out.ctypes.data, width, 0, height, pixels)
    if _turbo.tjDecompress2(handle, data, len(data), *target, turbojpeg.STOP_AT_500_SCANS):
        raise _failed(handle)
    return out


def _compress(pixels: np.ndarray, quality: int, sampling: int) -> bytes:
    """Into a buffer that each thread keeps, large enough for any content, and copied once from there."""
    height, width = pixels.shape[:2]
    needed = _turbo.tjBufSize(width, height, sampling)
    if getattr(_local, "room", 0) < needed:
        _local.room, _local.buffer = needed, ctypes.create_string_buffer(needed)
    if not hasattr(_local, "compressor"):
        _local.compressor = _Owned(_turbo.tjInitCompress())
    start, size = c_void_p(ctypes.addressof(_local.buffer)), c_ulong(needed)
    source = (pixels.ctypes.data, width, 0, height, turbojpeg.RGB)
    how = (sampling, quality, turbojpeg.ACCURATE_DCT | turbojpeg.NO_REALLOCATION)
    handle = _local.compressor.handle
    if _turbo.tjCompress2(handle, *source, byref(start), byref(size), *how):
        raise DamagedImage(_turbo.tjGetErrorStr2(handle).decode("utf-8", "replace"))
    return ctypes.string_at(_local.buffer, size.value)


_turbo: Any = turbojpeg.typed()
_local = threading.local()


class _Owned:
    """A (de)compressor of libjpeg-turbo, destroyed with its owner: the thread that ends."""

    def __init__(self, handle: int) -> None:
        self.handle, self._destroy = handle, _turbo.tjDestroy

    def __del__(self) -> None:
        self._destroy(self.handle)


def _handle() -> int:
    """A decompressor for each thread: one must not be shared."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = _Owned(_turbo.tjInitDecompress())
    return _local.decompressor.handle


def _failed(handle: int) -> DamagedImage:
    """The error, and no more of this decompressor: up to libjpeg-turbo 2.1, one that has failed in a header
    goes on from there with the next file, and calls that damaged."""
    message = _turbo.tjGetErrorStr2(handle).decode("utf-8", "replace")
    del _local.decompressor
    return DamagedImage(message)
