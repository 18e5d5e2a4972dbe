"""Crop and resize in Triton, anti-aliased as in `resize.py`: one kernel from decoded planes to crops.

An output pixel's weights are a triangle as wide as the scale. With a box of `size` pixels, an output of
`side` pixels and m = max(size, side), source pixel p has the weight 2 m - |(2 p + 1) side - (2 i + 1) size|
for output pixel i, but at least 0. These are whole numbers below 2^24, so only products and sums are rounded.

Rows and columns aren't separate passes. A downscaled crop then takes 4 products for each source pixel
instead of 2, but saves the memory traffic of an intermediate result.
"""

import threading

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 256, 4  # pixels of a crop per program, and warps per program
LAUNCHING = threading.Lock()  # the first call compiles for all; Triton's interpreter isn't thread-safe
FIELDS = 8  # per crop in the table: address, height and width of its image; top, left, height, width; flip


def crop_and_resize(images: list[Tensor], boxes: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
    """Crop all images on their device; they must stay alive until the device has made the crops.

    Args:
        images: B tensors, uint8 [3, H, W], on one device.
        boxes: int [B, V, 4]: top, left, height, width, within the images. flips: bool [B, V].
        side: R, the side of the crops.

    Returns:
        uint8 [B, V, R, R, 3].
    """
    images = [image.contiguous() for image in images]  # those that torchvision decodes on a CPU aren't
    device = images[0].device if images else torch.device("cpu")
    out = torch.empty((*boxes.shape[:2], side, side, 3), dtype=torch.uint8, device=device)
    if out.numel():
        of_images = np.array([(image.data_ptr(), *image.shape[1:]) for image in images], np.int64)
        table = np.empty((*boxes.shape[:2], FIELDS), np.int64)
        table[..., :3], table[..., 3:7], table[..., 7] = of_images[:, None], boxes, flips
        with LAUNCHING, torch.cuda.device_of(out):  # Triton launches on the current device
            grid = (boxes.shape[0] * boxes.shape[1] * triton.cdiv(side * side, BLOCK),)
            crops[grid](torch.from_numpy(table).to(device), out, SIDE=side, BLOCK=BLOCK, num_warps=WARPS)
    return out


@triton.jit
def crops(table, out, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Make BLOCK pixels of one crop, in row-major order."""
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // blocks
    row = table + 8 * n.to(tl.int64)
    image = tl.load(row).to(tl.pointer_type(tl.uint8))
    plane = tl.load(row + 1) * tl.load(row + 2)
    stride = tl.load(row + 2).to(tl.int32)
    top, left = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    height, width = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.minimum(place, SIDE * SIDE - 1)
    y, x = pixel // SIDE, pixel % SIDE
    x = tl.where(tl.load(row + 7) != 0, SIDE - 1 - x, x)
    first_y, first_x = _first(y, height, SIDE), _first(x, width, SIDE)
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, _taps(height, SIDE)):
        down = _weight(first_y + j, y, height, SIDE)
        line = image + (top + tl.minimum(first_y + j, height - 1)) * stride + left
        for i in range(0, _taps(width, SIDE)):
            weight = down * _weight(first_x + i, x, width, SIDE)
            source = line + tl.minimum(first_x + i, width - 1)
            red += weight * tl.load(source).to(tl.float32)
            green += weight * tl.load(source + plane).to(tl.float32)
            blue += weight * tl.load(source + 2 * plane).to(tl.float32)
            total += weight
    inside = place < SIDE * SIDE
    target = out + 3 * (n.to(tl.int64) * (SIDE * SIDE) + pixel)
    tl.store(target, (red / total + 0.5).to(tl.int32).to(tl.uint8), inside)
    tl.store(target + 1, (green / total + 0.5).to(tl.int32).to(tl.uint8), inside)
    tl.store(target + 2, (blue / total + 0.5).to(tl.int32).to(tl.uint8), inside)


@triton.jit
def _first(i, size, SIDE: tl.constexpr):
    """The first source pixel with a non-zero weight."""
    return tl.maximum((2 * i + 1) * size - 2 * tl.maximum(size, SIDE) + SIDE, 0) // (2 * SIDE)


@triton.jit
def _taps(size, SIDE: tl.constexpr):
    """The largest number of source pixels with a non-zero weight."""
    return (2 * tl.maximum(size, SIDE) + SIDE - 1) // SIDE + 1


@triton.jit
def _weight(p, i, size, SIDE: tl.constexpr):
    distance = tl.abs((2 * p + 1) * SIDE - (2 * i + 1) * size)
    weight = tl.maximum(2 * tl.maximum(size, SIDE) - distance, 0)
    return tl.where(p < size, weight, 0).to(tl.float32)
