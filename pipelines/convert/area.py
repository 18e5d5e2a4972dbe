"""Shrinking an image by area: every new pixel is the mean of the old ones that it covers, in parts, too."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def shrink(pixels, height, width):
    """uint8 [H, W, 3] -> uint8 [height, width, 3], height <= H and width <= W; as OpenCV's INTER_AREA.

    Rows are summed first, over whole lines: that loop is contiguous, and it does most of the work.
    """
    old_height, old_width = pixels.shape[:2]
    lines = pixels.reshape(old_height, old_width * 3)
    line = np.empty(old_width * 3, np.float32)
    out = np.empty((height, width, 3), np.uint8)
    scale_y, scale_x = old_height / height, old_width / width
    for y in range(height):
        line[:] = 0
        top, bottom = y * scale_y, (y + 1) * scale_y
        for row in range(int(top), min(int(np.ceil(bottom)), old_height)):
            weight = np.float32((min(bottom, row + 1) - max(top, row)) / scale_y)
            for i in range(old_width * 3):
                line[i] += weight * lines[row, i]
        for x in range(width):
            left, right = x * scale_x, (x + 1) * scale_x
            red = green = blue = np.float32(0.5)  # rounds when the fraction is cut off
            for column in range(int(left), min(int(np.ceil(right)), old_width)):
                weight = np.float32((min(right, column + 1) - max(left, column)) / scale_x)
                red += weight * line[3 * column]
                green += weight * line[3 * column + 1]
                blue += weight * line[3 * column + 2]
            out[y, x, 0] = np.uint8(min(red, np.float32(255)))
            out[y, x, 1] = np.uint8(min(green, np.float32(255)))
            out[y, x, 2] = np.uint8(min(blue, np.float32(255)))
    return out
