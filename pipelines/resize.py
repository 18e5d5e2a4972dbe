"""Crop and resize in one go, anti-aliased as PIL and torchvision do it, compiled and without the GIL."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _taps(size, out_size, first, weights):
    """Anti-aliased bilinear weights, as PIL's and torchvision's: a triangle as wide as the scale.

    Fills first[i] (first source pixel of output pixel i) and weights[i, :]; returns the count of taps.
    """
    scale = size / out_size
    support = max(scale, 1.0)
    count = 0
    for i in range(out_size):
        centre = scale * (i + 0.5)
        start = max(0, int(centre - support + 0.5))
        stop = min(size, int(centre + support + 0.5))
        total = 0.0
        for k in range(stop - start):
            weight = max(0.0, 1.0 - abs((start + k - centre + 0.5) / support))
            weights[i, k] = weight
            total += weight
        for k in range(stop - start):
            weights[i, k] /= total
        weights[i, stop - start :] = 0
        first[i] = start
        count = max(count, stop - start)
    return count


@njit(cache=True, nogil=True, fastmath=True)
def resize_crop(image, box, out):
    """Crop `box` (top, left, height, width) of image uint8 [H, W, 3], resized to out uint8 [R, R, 3].

    Rows first, so that the inner loop runs over contiguous bytes; then columns, from one row's buffer.
    """
    top, left, height, width = box
    side = out.shape[0]
    rows_first = np.empty(side, np.int64)
    columns_first = np.empty(side, np.int64)
    row_weights = np.empty((side, 2 * int(np.ceil(max(height / side, 1.0))) + 2), np.float32)
    column_weights = np.empty((side, 2 * int(np.ceil(max(width / side, 1.0))) + 2), np.float32)
    row_taps = _taps(height, side, rows_first, row_weights)
    column_taps = _taps(width, side, columns_first, column_weights)
    line = np.empty(3 * (width + column_weights.shape[1]), np.float32)
    line[3 * width :] = 0  # taps of weight zero past the right edge read this
    for y in range(side):
        line[: 3 * width] = 0
        for k in range(min(row_taps, height - rows_first[y])):
            weight = row_weights[y, k]
            source = image[top + rows_first[y] + k].reshape(-1)[3 * left : 3 * (left + width)]
            for x in range(3 * width):
                line[x] += weight * np.float32(source[x])
        for x in range(side):
            red = green = blue = np.float32(0.5)
            start = 3 * columns_first[x]
            for k in range(column_taps):
                weight = column_weights[x, k]
                red += weight * line[start + 3 * k]
                green += weight * line[start + 3 * k + 1]
                blue += weight * line[start + 3 * k + 2]
            out[y, x, 0] = np.uint8(red)
            out[y, x, 1] = np.uint8(green)
            out[y, x, 2] = np.uint8(blue)
