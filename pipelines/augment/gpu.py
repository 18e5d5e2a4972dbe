"""Augmentation in Triton: two kernels, uint8 crops in, normalised channels-last bf16, fp16 or fp32 out.

    luma_sums   only for views with a contrast: runs the operations before the contrast, sums the luma
    views       runs all operations on a tile and its margin, blurs, solarises, normalises, casts, stores

The blur is B_y X B_x^T on each colour, where B is the banded matrix of the Gaussian. Tensor cores run both
passes of a tile without shared-memory indexing; the sums above are all that is written in between.
Each tile of a blurred view recomputes the colours of its margin, which is cheaper than storing them: at 224
px a tile and its margin have 2.25 times the tile's pixels, 4 times for fp32, whose tiles are smaller. For
fp16 and bf16 output the products are fp16 (values lie in [0, 1], so the error is at most 2^-12) and are
summed in fp32. For fp32 output each product is three tf32 products (tf32x3) from Triton 3.6 on; older
versions use plain fp32 without tensor cores, because 3.2 fails for sm_80 with "Failed to emit transfer from
register to shared".

Memory traffic of one view at 224 px in bf16: 150,528 bytes read for the sums, 150,528 read again (mostly
from the L2 cache) and 301,056 written: 0.60 MB. At the memory bandwidth of an A100 80 GB (2.04 TB/s) that is
0.30 us a view, or 3.4 million views a second; at that of an H100 SXM (3.35 TB/s), 0.18 us or 5.6 million.
These are bounds; docs/gpu.md has measurements.

Tested against `reference.py` in Triton's interpreter and on an H100; compiled ahead of time for sm_80, sm_90.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.augment import reference
from pipelines.errors import InputError
from pipelines.parameters import BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE, P
from pipelines.views import ViewSettings

TENSOR_CORES_TAKE_FP32 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
SUM_BLOCK = 2048  # pixels per program of luma_sums

# Column indices of the table, and other constants that the kernels read.
_P = tl.constexpr(P)
_FLIP, _ORDER, _GREY = tl.constexpr(FLIP), tl.constexpr(ORDER), tl.constexpr(GREY)
_BRIGHTNESS, _CONTRAST = tl.constexpr(BRIGHTNESS), tl.constexpr(CONTRAST)
_SATURATION, _HUE = tl.constexpr(SATURATION), tl.constexpr(HUE)
_SIGMA, _SOLARISE = tl.constexpr(SIGMA), tl.constexpr(SOLARISE)
_THRESHOLD = tl.constexpr(128 / 255)
_LEVEL = tl.constexpr(1 / 255)
_PRECISION = tl.constexpr("tf32x3" if TENSOR_CORES_TAKE_FP32 else "ieee")


def augment(crops: Tensor, table: Tensor, view: ViewSettings, dtype: torch.dtype = torch.float32) -> Tensor:
    """Augment and normalise on the crops' device.

    Args:
        crops: uint8 [N, R, R, 3], each crop contiguous.
        table: float32 [N, P], contiguous, on the same device.
        dtype: dtype of the result: float32, float16 or bfloat16.

    Returns:
        [N, 3, R, R], channels-last in memory.

    Raises:
        InputError: R is above 639, for which the blur would need more than 63 taps.
    """
    count, side = crops.shape[:2]
    if view.kernel_size > 63:
        raise InputError(f"crops: the triton form takes at most 639 px a side, got {side}")
    out = torch.empty((count, side, side, 3), dtype=dtype, device=crops.device)
    with torch.cuda.device_of(crops):  # Triton launches on the current device, which may be a different one
        _launch(crops, table, view, out)
    return out.permute(0, 3, 1, 2)


def _launch(crops: Tensor, table: Tensor, view: ViewSettings, out: Tensor) -> None:
    count, side = crops.shape[:2]
    if count:
        blocks = triton.cdiv(side * side, SUM_BLOCK)
        sums = torch.empty((count, blocks), dtype=torch.float32, device=crops.device)
        orders = orders_on(crops.device)
        luma_sums[count, blocks](crops, table, orders, sums, crops.stride(0), **sum_options(side))
        options = view_options(view, side, out.dtype)
        tiles = triton.cdiv(side, options["TILE"])
        views[(tiles * tiles * count,)](  # axis x: the other axes are limited to 65,535 programs
            crops,
            table,
            orders,
            sums,
            out,
            crops.stride(0),
            *view.mean,
            *(1 / s for s in view.std),
            **options,
        )


@cache
def orders_on(device: torch.device) -> Tensor:
    """`ORDERS` on the device, int32 [24, 4]; cached, since a copy from pageable memory waits for the GPU."""
    return torch.from_numpy(reference.ORDERS).to(device, torch.int32)


def sum_options(side: int) -> dict[str, int]:
    """Compile-time arguments of `luma_sums`."""
    return {"SIDE": side, "BLOCK": SUM_BLOCK, "num_warps": 4}


def view_options(view: ViewSettings, side: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Compile-time arguments of `views`. Margins are a multiple of a chunk's 16 pixels.

    Registers on sm_80 / sm_90 at 224 px: 185 / 120 in half precision with tiles of 64, against 255 / 149 with
    chunks of 32. fp32 spills with tiles of 64, and takes 171 / 175 with tiles of 32.
    """
    tile = min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(side)))
    warps = 8 if tile == 64 or (tile == 32 and dtype == torch.float32) else 4
    blocks = triton.cdiv(side * side, SUM_BLOCK)
    return {
        "SIDE": side, "RADIUS": view.kernel_size // 2, "TILE": tile,
        "MARGIN": 16 * triton.cdiv(view.kernel_size // 2, 16), "CHUNK": 16,
        "BLOCKS": blocks, "BLOCKS_2": triton.next_power_of_2(blocks),
        "HALF": dtype != torch.float32, "num_warps": warps,
    }  # fmt: skip


@triton.jit
def luma_sums(crops, table, orders, sums, stride, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """sums[n, b] = luma of block b of crop n, after the operations before the contrast."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = table + n * _P
    if tl.load(row + _CONTRAST) != 1:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < SIDE * SIDE
        source = crops + n * stride + 3 * pixel
        red = tl.load(source, inside, other=0).to(tl.float32) * _LEVEL
        green = tl.load(source + 1, inside, other=0).to(tl.float32) * _LEVEL
        blue = tl.load(source + 2, inside, other=0).to(tl.float32) * _LEVEL
        order = orders + 4 * tl.load(row + _ORDER).to(tl.int32)
        waiting = tl.load(row + _CONTRAST) != 1
        for k in range(4):
            operation = tl.load(order + k)
            waiting = waiting & (operation != 1)
            if waiting:
                red, green, blue = _operation(red, green, blue, row, operation, 0.0)
        luma = tl.where(inside, _luma(red, green, blue), 0.0)
        tl.store(sums + n * tl.num_programs(1) + block, tl.sum(luma))


@triton.jit
def views(
    crops, table, orders, sums, out, stride, mean_r, mean_g, mean_b, scale_r, scale_g, scale_b,
    SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr, MARGIN: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCKS_2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Make one tile of one view. The tiles of a view are consecutive programs, as they read the same crop."""
    across: tl.constexpr = (SIDE + TILE - 1) // TILE
    tile = tl.program_id(0) % (across * across)
    n = (tl.program_id(0) // (across * across)).to(tl.int64)
    left, top = tile % across * TILE, tile // across * TILE
    row, crop = table + n * _P, crops + n * stride
    mean_luma = 0.0
    if tl.load(row + _CONTRAST) != 1:
        block = tl.arange(0, BLOCKS_2)
        mean_luma = tl.sum(tl.load(sums + n * BLOCKS + block, block < BLOCKS, other=0.0)) / (SIDE * SIDE)
    sigma = tl.load(row + _SIGMA)
    if RADIUS > 0 and sigma > 0:
        red, green, blue = _blurred(
            crop, row, orders, mean_luma, top, left, sigma, SIDE, RADIUS, TILE, MARGIN, CHUNK, HALF
        )
    else:
        red, green, blue = _colours(crop, row, orders, mean_luma, top, left, SIDE, TILE)
    if tl.load(row + _SOLARISE) != 0:
        red = tl.where(red >= _THRESHOLD, 1 - red, red)
        green = tl.where(green >= _THRESHOLD, 1 - green, green)
        blue = tl.where(blue >= _THRESHOLD, 1 - blue, blue)
    pixel = tl.arange(0, TILE * TILE)
    y, x = top + pixel // TILE, left + pixel % TILE
    inside = (y < SIDE) & (x < SIDE)
    target = out + n * (3 * SIDE * SIDE) + 3 * (y * SIDE + x)
    kind = out.dtype.element_ty
    tl.store(target, ((red - mean_r) * scale_r).to(kind), inside)
    tl.store(target + 1, ((green - mean_g) * scale_g).to(kind), inside)
    tl.store(target + 2, ((blue - mean_b) * scale_b).to(kind), inside)


@triton.jit
def _blurred(
    crop, row, orders, mean_luma, top, left, sigma,
    SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr, MARGIN: tl.constexpr, CHUNK: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Sum B_i X_ij B_j^T over the chunks (i, j) of the tile and its margin: [TILE * TILE] for each colour."""
    tap = tl.arange(0, 64) - 32  # RADIUS is at most 31
    steepness = -0.5 / (sigma * sigma)
    inverse = 1 / tl.sum(tl.where(tl.abs(tap) <= RADIUS, tl.exp(tap * tap * steepness), 0.0))
    red = tl.zeros((TILE, TILE), tl.float32)
    green = tl.zeros((TILE, TILE), tl.float32)
    blue = tl.zeros((TILE, TILE), tl.float32)
    for j in range(0, (TILE + 2 * MARGIN) // CHUNK):
        x = left - MARGIN + j * CHUNK + tl.arange(0, CHUNK)
        red_j = tl.zeros((TILE, CHUNK), tl.float32)
        green_j = tl.zeros((TILE, CHUNK), tl.float32)
        blue_j = tl.zeros((TILE, CHUNK), tl.float32)
        for i in range(0, (TILE + 2 * MARGIN) // CHUNK):
            first_y, first_x = top - MARGIN + i * CHUNK, left - MARGIN + j * CHUNK
            r, g, b = _colours(crop, row, orders, mean_luma, first_y, first_x, SIDE, CHUNK)
            r = tl.reshape(r, (CHUNK, CHUNK))
            g = tl.reshape(g, (CHUNK, CHUNK))
            b = tl.reshape(b, (CHUNK, CHUNK))
            y = first_y + tl.arange(0, CHUNK)
            band = _band((top + tl.arange(0, TILE))[:, None], y[None, :], steepness, inverse, RADIUS)
            red_j = _dot(band, r, red_j, HALF)
            green_j = _dot(band, g, green_j, HALF)
            blue_j = _dot(band, b, blue_j, HALF)
        band_x = _band((left + tl.arange(0, TILE))[None, :], x[:, None], steepness, inverse, RADIUS)
        red = _dot(red_j, band_x, red, HALF)
        green = _dot(green_j, band_x, green, HALF)
        blue = _dot(blue_j, band_x, blue, HALF)
    return tl.reshape(red, TILE * TILE), tl.reshape(green, TILE * TILE), tl.reshape(blue, TILE * TILE)


@triton.jit
def _band(target, source, steepness, inverse, RADIUS: tl.constexpr):
    """Gaussian weights between positions; 0 beyond the last tap."""
    distance = (source - target).to(tl.float32)
    weight = tl.exp(distance * distance * steepness) * inverse
    return tl.where(tl.abs(distance) <= RADIUS, weight, 0.0)


@triton.jit
def _dot(a, b, c, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), c)
    return tl.dot(a, b, c, input_precision=_PRECISION)


@triton.jit
def _colours(crop, row, orders, mean_luma, top, left, SIDE: tl.constexpr, TILE: tl.constexpr):
    """The colours of a tile, in row-major order, reflected at the borders: [TILE * TILE] each, in [0, 1].

    The index is one-dimensional: for a two-dimensional one, Triton 3.6 lets the threads of a warp run down a
    column, because pixels three bytes apart look alike to it in both axes; each thread then moves 32 bytes
    to get one.
    """
    pixel = tl.arange(0, TILE * TILE)
    y, x = _reflected(top + pixel // TILE, SIDE), _reflected(left + pixel % TILE, SIDE)
    x = tl.where(tl.load(row + _FLIP) != 0, SIDE - 1 - x, x)
    source = crop + 3 * (y * SIDE + x)
    red = tl.load(source).to(tl.float32) * _LEVEL
    green = tl.load(source + 1).to(tl.float32) * _LEVEL
    blue = tl.load(source + 2).to(tl.float32) * _LEVEL
    order = orders + 4 * tl.load(row + _ORDER).to(tl.int32)
    for k in range(4):
        red, green, blue = _operation(red, green, blue, row, tl.load(order + k), mean_luma)
    if tl.load(row + _GREY) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    return red, green, blue


@triton.jit
def _reflected(i, SIDE: tl.constexpr):
    """-1 -> 1, SIDE -> SIDE - 2; positions that no tap reaches are clamped to the border."""
    i = tl.abs(i)
    i = tl.where(i >= SIDE, 2 * (SIDE - 1) - i, i)
    return tl.minimum(tl.maximum(i, 0), SIDE - 1)


@triton.jit
def _operation(red, green, blue, row, operation, mean_luma):
    if operation == 0:
        factor = tl.load(row + _BRIGHTNESS)
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif operation == 1:
        factor = tl.load(row + _CONTRAST)
        shift = (1 - factor) * mean_luma
        red = _clamp(red * factor + shift)
        green = _clamp(green * factor + shift)
        blue = _clamp(blue * factor + shift)
    elif operation == 2:
        factor = tl.load(row + _SATURATION)
        luma = (1 - factor) * _luma(red, green, blue)
        red = _clamp(red * factor + luma)
        green = _clamp(green * factor + luma)
        blue = _clamp(blue * factor + luma)
    else:
        turn = tl.load(row + _HUE)
        if turn != 0:
            red, green, blue = _hue(red, green, blue, turn)
    return red, green, blue


@triton.jit
def _hue(red, green, blue, shift):
    """HSV and back: h is wrapped once each way into [0, 6), and each channel is a tent over h."""
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    spread = value - low
    inverse = 1 / tl.where(spread > 0, spread, 1.0)
    h = tl.where(value == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse)
    h = tl.where(value == red, (green - blue) * inverse, h) + 6 * shift
    h = tl.where(h < 0, h + 6, h)
    h = tl.where(h >= 6, h - 6, h)
    red = low + spread * _clamp(tl.abs(h - 3) - 1)
    green = low + spread * _clamp(2 - tl.abs(h - 2))
    blue = low + spread * _clamp(2 - tl.abs(h - 4))
    return red, green, blue


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)
