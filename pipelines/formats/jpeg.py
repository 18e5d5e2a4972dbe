"""JPEG: read the header, check, decode, encode.

libturbojpeg is called directly if it is found (`formats.turbojpeg`). Unlike Pillow it reports damage that a
decoder can paint over, such as a flipped byte, and it releases the GIL. Without it Pillow is used: it gives
the same pixels for sound files and the same bytes when encoding (its wheels bundle libjpeg-turbo; with
another libjpeg, rounding may differ), but the only damage it reports is truncation.
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
MAX_PIXELS = 1 << 28  # of one image: 0.8 GB when decoded; larger ones are most likely unintended
most_pixels = MAX_PIXELS  # this process's limit, see read_up_to
# A JPEG of Huffman codes holds at most some 340 pixels per byte (one bit for each block of one colour), so a
# header that promises gigabytes for a few kilobytes is taken for damaged where stored images are read.
PIXELS_PER_BYTE = 1024
ANY_SIZE = 65_535**2  # the most that a JPEG's header can state
COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")  # Pillow's names of formats to try first
LFS = b"version https://git-lfs"  # start of a Git LFS pointer, which Git leaves in place of a large file
LFS_HINT = "a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"


class DamagedImage(Exception):
    """The error that a decoder reports for bytes that aren't a sound image."""


@dataclass(frozen=True)
class JpegHeader:
    height: int
    width: int
    colour: str  # one of turbojpeg.COLOURS
    orientation: int  # EXIF's, 1 to 8; 1 is upright
    sampling_is_usual: bool = True  # 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1: libjpeg-turbo 2.1 reads no others

    @property
    def is_rgb_or_grey(self) -> bool:
        """Whether a decoder limited to RGB output and usual sampling, such as FFCV's, can read it."""
        return self.colour in ("RGB", "YCbCr", "grey") and self.sampling_is_usual


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_up_to(pixels: int | None) -> None:
    """Set this process's limit of pixels per image; None: MAX_PIXELS. Raises InputError for one below 1."""
    global most_pixels
    if pixels is not None and pixels < 1:
        raise InputError(f"--max-pixels {pixels}: must be at least 1")
    most_pixels = MAX_PIXELS if pixels is None else pixels


def check_size(height: int, width: int, most: int | None = None) -> None:
    """Raise DamagedImage for an image of more than `most` pixels, of any format; None: the limit set by
    `read_up_to`, or MAX_PIXELS."""
    most = most_pixels if most is None else most
    if height * width > most:
        allows = f"--max-pixels {height * width} allows them"
        raise DamagedImage(f"{width} x {height} are more than {most:,} pixels; {allows}")


def read_header(data: bytes, most: int | None = None) -> JpegHeader:
    """Read size, colour space and orientation. Raises DamagedImage if there is no valid JPEG header, or for
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
    """Decode the whole file, and raise DamagedImage at any error or warning from libjpeg-turbo.

    It decodes to grey at an eighth of the size. This reads every coefficient but skips most of the
    arithmetic, and finds the same damage as a full decode in 0.6 of the time.
    """
    if _turbo is None:
        decode(data, header)
    else:
        _decompress(data, header, turbojpeg.GREY, eighths=1)


def decode(data: bytes, header: JpegHeader, shortest: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels, uint8 [H, W, 3], as stored (not rotated). CMYK is converted by Pillow's formula.

    With `shortest` = (height, width), the decoder may scale by n/8 while decoding, to no less than that size:
    this is cheaper than a full decode if the image is downscaled anyway. Raises DamagedImage.
    """
    if not header.is_rgb_or_grey:
        return np.asarray(open_with_pillow(data, most=ANY_SIZE).convert("RGB"))
    eighths = 8
    if shortest is not None:  # only the scales for which libjpeg-turbo has vector code
        enough = [n for n in (1, 2, 4) if np.all(np.greater_equal(_scaled(header, n), shortest))]
        eighths = min(enough, default=8)
    if _turbo is None:
        return np.asarray(open_with_pillow(data, shrink=8 // eighths, most=ANY_SIZE).convert("RGB"))
    return _decompress(data, header, turbojpeg.RGB, eighths)


def encode(pixels: np.ndarray, quality: int, sampling: str = "4:2:0") -> bytes:
    """Encode uint8 [H, W, 3] as a baseline JPEG; quality 1 to 100, `sampling` one of turbojpeg.SAMPLINGS."""
    if _turbo is not None:
        return _compress(np.ascontiguousarray(pixels), quality, turbojpeg.SAMPLINGS[sampling])
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=sampling)
    return out.getvalue()


def library() -> str:
    """The name of the decoder in use, for a manifest."""
    return "libturbojpeg" if _turbo is not None else "pillow"


def orientation(exif: Callable[[], Image.Exif]) -> int:
    """EXIF's orientation, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = exif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block doesn't affect the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _orientation_in(data: bytes) -> int:
    """The orientation in a JPEG's EXIF segment. Segments are stepped over, because a search for EXIF took
    longer than reading the file."""
    place, end = 2, len(data) - 4
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a marker may have any number of fill bytes before it
            place += 1
            continue
        if marker == 0xDA or marker == 0xD9 or marker < 0xC0:  # the image itself, its end, or not a header
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
    """A context in which Pillow opens images of up to ANY_SIZE, in every thread, without a warning."""

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
    """Open an image of any format, loaded, or its header alone. Raises DamagedImage, also for more than
    `most` pixels, see `check_size`.

    `shrink` (1, 2, 4 or 8) has the decoder downscale a JPEG by this factor, with sides rounded up.
    """
    try:
        with _any_size:
            image = _opened(io.BytesIO(data))
        if image.format == "EPS":
            raise DamagedImage("EPS needs Ghostscript, which isn't run here; save it as PNG")
        check_size(image.height, image.width, most)
        if shrink > 1:  # not rounded: Pillow divides the size by this, and takes the largest scale below
            image.draft(None, (image.width / shrink, image.height / shrink))  # type: ignore[arg-type]
        if load:
            image.load()
        return image
    except UnidentifiedImageError as error:  # its own message includes an address, which differs in each run
        if data.startswith(LFS):
            raise DamagedImage(LFS_HINT) from error
        raise DamagedImage("not an image file of a known kind") from error
    except DamagedImage:
        raise
    except Image.DecompressionBombError as error:
        raise DamagedImage("more pixels than any genuine image has") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise DamagedImage(first_line(error)) from error


def _opened(file: io.BytesIO) -> Image.Image:
    """Read an image's header, trying formats in a fixed order, whatever was opened before. TGA comes last: it
    has no signature, and accepts an ICO."""
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
    """Encode into a buffer that each thread keeps, large enough for anything; the result is copied once."""
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
    """A (de)compressor of libjpeg-turbo, destroyed with its owner, when the thread ends."""

    def __init__(self, handle: int) -> None:
        self.handle, self._destroy = handle, _turbo.tjDestroy

    def __del__(self) -> None:
        self._destroy(self.handle)


def _handle() -> int:
    """This thread's decompressor; decompressors can't be shared."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = _Owned(_turbo.tjInitDecompress())
    return _local.decompressor.handle


def _failed(handle: int) -> DamagedImage:
    """Build the error, and discard this decompressor: up to libjpeg-turbo 2.1, one that failed on a header
    resumes from there with the next file, and reports that one as damaged."""
    message = _turbo.tjGetErrorStr2(handle).decode("utf-8", "replace")
    del _local.decompressor
    return DamagedImage(message)
