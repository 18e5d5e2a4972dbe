"""The augmentation in numba: one image at a time in a few kilobytes, compiled, cached, without the GIL.

Tested against `reference.py` on the same parameters. Parallelism is over images: the loader's threads each
take a part of the batch.
"""

import numpy as np
from numba import njit

from pipelines.augment.reference import ORDERS
from pipelines.parameters import BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE
from pipelines.views import ViewSettings

ONE = np.float32(1)
ZERO = np.float32(0)
LUMA = (np.float32(0.2989), np.float32(0.587), np.float32(0.114))


def augment_into(crops: np.ndarray, table: np.ndarray, view: ViewSettings, out: np.ndarray) -> None:
    """Augment and normalise N crops.

    Args:
        crops: uint8 [N, R, R, 3]. table: float32 [N, P]. out: float32 [N, R, R, 3], filled.
    """
    _augment(crops, table, ORDERS, view.kernel_size, *statistics(view), out)


def statistics(view: ViewSettings) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the normalisation, float32 [3] each."""
    return np.asarray(view.mean, np.float32), np.asarray(view.std, np.float32)


@njit(cache=True, nogil=True)
def _augment(crops, table, orders, kernel_size, mean, std, out):
    side = crops.shape[1]
    image = np.empty((3, side * side), np.float32)  # planar, so that every loop below vectorises
    lines = np.empty((3, side * side), np.float32)
    for n in range(len(crops)):
        p = table[n]
        _load(crops[n], p[FLIP] != 0, image)
        for k in range(4):
            operation = orders[int(p[ORDER]), k]
            if operation == 0 and p[BRIGHTNESS] != 1:
                _brightness(image, p[BRIGHTNESS])
            elif operation == 1 and p[CONTRAST] != 1:
                _contrast(image, p[CONTRAST])
            elif operation == 2 and p[SATURATION] != 1:
                _saturation(image, p[SATURATION])
            elif operation == 3 and p[HUE] != 0:
                _hue(image, p[HUE])
        if p[GREY] != 0:
            _saturation(image, ZERO)
        if p[SIGMA] > 0 and kernel_size > 1:
            _blur(image, p[SIGMA], kernel_size, side, lines)
        if p[SOLARISE] != 0:
            _solarise(image)
        _store(image, mean, std, out[n])


@njit(cache=True, nogil=True)
def _load(crop, flip, image):
    side = crop.shape[0]
    scale = np.float32(1 / 255)
    for y in range(side):
        for x in range(side):
            source = side - 1 - x if flip else x
            for c in range(3):
                image[c, y * side + x] = crop[y, source, c] * scale


@njit(cache=True, nogil=True)
def _store(image, mean, std, out):
    side = out.shape[0]
    for c in range(3):
        scale = ONE / std[c]
        shift = -mean[c] * scale
        for y in range(side):
            for x in range(side):
                out[y, x, c] = image[c, y * side + x] * scale + shift


@njit(cache=True, nogil=True, inline="always")
def _clamp(value):
    return min(max(value, ZERO), ONE)


@njit(cache=True, nogil=True)
def _brightness(image, factor):
    for c in range(3):
        for i in range(image.shape[1]):
            image[c, i] = _clamp(image[c, i] * factor)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _contrast(image, factor):
    total = 0.0
    for i in range(image.shape[1]):
        total += LUMA[0] * image[0, i] + LUMA[1] * image[1, i] + LUMA[2] * image[2, i]
    shift = (ONE - factor) * np.float32(total / image.shape[1])
    for c in range(3):
        for i in range(image.shape[1]):
            image[c, i] = _clamp(image[c, i] * factor + shift)


@njit(cache=True, nogil=True)
def _saturation(image, factor):
    rest = ONE - factor
    for i in range(image.shape[1]):
        luma = rest * (LUMA[0] * image[0, i] + LUMA[1] * image[1, i] + LUMA[2] * image[2, i])
        image[0, i] = _clamp(image[0, i] * factor + luma)
        image[1, i] = _clamp(image[1, i] * factor + luma)
        image[2, i] = _clamp(image[2, i] * factor + luma)


@njit(cache=True, nogil=True)
def _hue(image, shift):
    six = np.float32(6)
    turn = shift * six
    for i in range(image.shape[1]):
        red, green, blue = image[0, i], image[1, i], image[2, i]
        value = max(red, green, blue)
        spread = value - min(red, green, blue)
        if spread > 0:
            if value == red:
                hue = (green - blue) / spread
            elif value == green:
                hue = np.float32(2) + (blue - red) / spread
            else:
                hue = np.float32(4) + (red - green) / spread
            hue += turn
            image[0, i] = value - spread * _sector(hue + np.float32(5))
            image[1, i] = value - spread * _sector(hue + np.float32(3))
            image[2, i] = value - spread * _sector(hue + ONE)


@njit(cache=True, nogil=True, inline="always")
def _sector(k):
    k = k - np.float32(6) * np.floor(k / np.float32(6))
    return _clamp(min(k, np.float32(4) - k))


@njit(cache=True, nogil=True)
def _blur(image, sigma, kernel_size, side, lines):
    radius = kernel_size // 2
    kernel = np.empty(kernel_size, np.float32)
    total = 0.0
    for k in range(kernel_size):
        kernel[k] = np.exp(-0.5 * ((k - radius) / sigma) ** 2)
        total += kernel[k]
    for k in range(kernel_size):
        kernel[k] /= total
    padded = np.empty(side + 2 * radius, np.float32)
    for c in range(3):
        plane, blurred = image[c], lines[c]
        for y in range(side):  # along rows, from a padded copy of the row
            row = plane[y * side : (y + 1) * side]
            for x in range(-radius, side + radius):
                padded[x + radius] = row[_reflect(x, side)]
            target = blurred[y * side : (y + 1) * side]
            target[:] = 0
            for k in range(kernel_size):
                for x in range(side):
                    target[x] += kernel[k] * padded[x + k]
        for y in range(side):  # along columns, whole rows at a time
            target = plane[y * side : (y + 1) * side]
            target[:] = 0
            for k in range(kernel_size):
                source = _reflect(y + k - radius, side)
                row = blurred[source * side : (source + 1) * side]
                for x in range(side):
                    target[x] += kernel[k] * row[x]


@njit(cache=True, nogil=True, inline="always")
def _reflect(i, side):
    if i < 0:
        i = -i
    return 2 * (side - 1) - i if i >= side else i


@njit(cache=True, nogil=True)
def _solarise(image):
    for c in range(3):
        for i in range(image.shape[1]):
            if image[c, i] >= np.float32(128 / 255):
                image[c, i] = ONE - image[c, i]
