"""Downscale an image by area: every new pixel is the mean of the old pixels, whole or in part, under it."""

import numpy as np

from pipelines.kernels.compiled import compiled


@compiled()
def shrink(pixels, height, width):
    """uint8 [H, W, 3] -> uint8 [height, width, 3], height <= H and width <= W, like OpenCV's INTER_AREA.

    Rows are summed first, over whole lines: that loop is contiguous and does most of the work. The old
    columns that a new column covers are the same in every row, so they are computed once.
    """
    old_height, old_width = pixels.shape[:2]
    lines = pixels.reshape(old_height, old_width * 3)
    line = np.empty(old_width * 3, np.float32)
    out = np.empty((height, width, 3), np.uint8)
    first, weights = _coverage(old_width, width)
    covered = weights.shape[1]
    scale = old_height / height
    for y in range(height):
        top, bottom = y * scale, (y + 1) * scale
        last = min(int(np.ceil(bottom)), old_height)
        first_row = int(top)
        weight = np.float32((min(bottom, first_row + 1) - top) / scale)
        source = lines[first_row]
        for i in range(old_width * 3):
            line[i] = weight * np.float32(source[i])
        for row in range(first_row + 1, last):
            weight = np.float32((min(bottom, row + 1) - row) / scale)
            source = lines[row]
            for i in range(old_width * 3):
                line[i] += weight * np.float32(source[i])
        for x in range(width):
            red = green = blue = np.float32(0.5)  # rounds to nearest when the fraction is cut off
            column = 3 * first[x]
            for j in range(covered):
                weight = weights[x, j]
                red += weight * line[column]
                green += weight * line[column + 1]
                blue += weight * line[column + 2]
                column += 3
            out[y, x, 0] = np.uint8(min(red, np.float32(255)))
            out[y, x, 1] = np.uint8(min(green, np.float32(255)))
            out[y, x, 2] = np.uint8(min(blue, np.float32(255)))
    return out


@compiled()
def _coverage(old, new):
    """For each of `new` columns, the first old one under it, and the fractions, float32 [new, columns]."""
    scale = old / new
    columns = min(int(np.ceil(scale)) + 1, old)
    first = np.empty(new, np.int64)
    weights = np.zeros((new, columns), np.float32)
    for x in range(new):
        left, right = x * scale, (x + 1) * scale
        first[x] = min(int(left), old - columns)  # keep the window within the line
        for j in range(columns):
            column = first[x] + j
            weights[x, j] = max(min(right, column + 1) - max(left, column), 0.0) / scale
    return first, weights
