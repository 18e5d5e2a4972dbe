"""Augmentation in numba: compiled, vectorised, without the GIL, one image at a time.

Its buffers take 1.2 MB at 224 px, half of that if nothing is blurred. An image takes at most two passes, row
by row, so that a row stays in the L1 cache while all colour operations are applied to it. The first pass runs
only if there is a contrast operation: it runs the operations before the contrast and sums the luma. The
second pass runs the rest, and either normalises into the output or blurs along the row. The blur's column
pass works on strips so narrow that its rows stay in L1 too. Grey images are blurred as one channel.
Operations whose parameter makes them an identity are skipped.

It is tested against `reference.py` on the same parameters. Sums aren't regrouped, and no product is fused
with a sum, so the pixels are bit-identical on every processor; this costs about 1 % (docs/augmentation.md).
Parallelism is over images: the caller gives each of its threads a part of the batch (`augment.augment`, the
loader).
"""

import numpy as np

from pipelines.augment.reference import GREY_WEIGHTS, ORDERS
from pipelines.kernels.compiled import compiled
from pipelines.kernels.elementary import exp
from pipelines.normalise import LEVEL, scale_and_shift
from pipelines.parameters import BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE
from pipelines.views import ViewSettings

ZERO, ONE, TWO, THREE, FOUR, SIX = (np.float32(value) for value in (0, 1, 2, 3, 4, 6))
LUMA = tuple(np.float32(weight) for weight in GREY_WEIGHTS)
THRESHOLD = np.float32(128 / 255)
UNITS, HALF = np.float32(65536), np.float32(0.5)  # lumas are summed as whole numbers of 2^-16
STRIP = 336  # floats of a row in the column pass: 31 kB of rows at a time with 23 taps


def augment_into(crops: np.ndarray, table: np.ndarray, view: ViewSettings, out: np.ndarray) -> None:
    """Augment and normalise N crops.

    Args:
        crops: uint8 [N, R, R, 3]; may be strided, such as every second crop of a larger array.
        table: float32 [N, P]. out: float32 [N, R, R, 3], contiguous, filled.
    """
    if not len(crops):
        return
    side = crops.shape[1]
    if crops.strides[0] < 3 * side * side or crops.strides[1:] != (3 * side, 3, 1):
        crops = np.ascontiguousarray(crops)
    # Pass one flat array, from the first crop's first byte to the last one's last: numba compiles it once and
    # knows that it is contiguous, which it wouldn't know of crops[:, view].
    stride = crops.strides[0]
    span = (len(crops) - 1) * stride + 3 * side * side
    memory = np.lib.stride_tricks.as_strided(crops, (span,), (1,), writeable=False)
    rows = np.ascontiguousarray(table)
    _augment(memory, stride, rows, ORDERS, view.kernel_size, *scale_and_shift(view), out)


@compiled()
def _augment(memory, stride, table, orders, kernel_size, factors, offsets, out):
    side = out.shape[1]
    radius = kernel_size // 2
    scale = np.empty(3 * side, np.float32)  # the normalisation, repeated to the layout of an output row
    shift = np.empty(3 * side, np.float32)
    for x in range(side):
        for c in range(3):
            scale[3 * x + c] = factors[c]
            shift[3 * x + c] = offsets[c]
    planes = np.empty((side, 3, side), np.float32)  # kept between the passes: each row as three planes
    lines = np.empty(3 * side * side, np.float32)  # kept between the blur's passes
    padded = np.empty(3 * (side + 2 * radius), np.float32)
    kernel = np.empty(kernel_size, np.float32)
    for n in range(len(out)):
        p = table[n]
        image = memory[n * stride : n * stride + 3 * side * side].reshape(side, 3 * side)
        target = out[n].reshape(3 * side * side)
        order = orders[int(p[ORDER])]
        split, mean_luma = 0, ZERO
        if p[CONTRAST] != 1:
            while order[split] != 1:
                split += 1
            mean_luma = _first_pass(image, p, order[:split], padded, planes)
        channels = 1 if p[GREY] != 0 else 3
        solarise = p[SOLARISE] != 0
        blurred = p[SIGMA] > 0 and radius > 0
        if blurred:
            _gaussian(kernel, p[SIGMA])
        for y in range(side):
            row = planes[y]
            if p[CONTRAST] == 1:
                _load(image[y], p[FLIP] != 0, padded, row)
            _colour(row, p, order[split:], mean_luma)
            if channels == 1:
                _grey(row)
            if blurred:
                _pad(row, radius, channels, padded)
                _blur_row(padded, kernel, channels, lines, y * side * channels, side * channels)
            else:
                _interleave(row, channels, target, 3 * side * y)
                _finish(target, 3 * side * y, 3 * side, solarise, scale, shift, 0)
        if blurred:
            _blur_columns(lines, side, kernel, channels, solarise, scale, shift, padded, target)


@compiled()
def _first_pass(image, p, order, line, planes):
    """Run the operations before the contrast, and return the mean luma that the contrast is relative to."""
    side = len(image)
    total = 0
    for y in range(side):
        _load(image[y], p[FLIP] != 0, line, planes[y])
        _colour(planes[y], p, order, ZERO)
        total += _luma_sum(planes[y])
    return np.float32(total / (side * side * float(UNITS)))


@compiled()
def _colour(row, p, order, mean_luma):
    for k in range(len(order)):
        operation = order[k]
        if operation == 0 and p[BRIGHTNESS] != 1:
            _affine(row, p[BRIGHTNESS], ZERO)
        elif operation == 1 and p[CONTRAST] != 1:
            _affine(row, p[CONTRAST], (ONE - p[CONTRAST]) * mean_luma)
        elif operation == 2 and p[SATURATION] != 1:
            _saturation(row[0], row[1], row[2], p[SATURATION])
        elif operation == 3 and p[HUE] != 0:
            _hue(row[0], row[1], row[2], p[HUE])


@compiled()
def _load(pixels, flip, line, row):
    """uint8 [R * 3] -> float32 [3, R] in [0, 1], optionally mirrored; two loops that both vectorise."""
    red, green, blue = row[0], row[1], row[2]
    side = len(red)
    for i in range(len(pixels)):
        line[i] = pixels[i] * LEVEL
    if flip:
        for x in range(side):
            red[side - 1 - x] = line[3 * x]
            green[side - 1 - x] = line[3 * x + 1]
            blue[side - 1 - x] = line[3 * x + 2]
    else:
        for x in range(side):
            red[x] = line[3 * x]
            green[x] = line[3 * x + 1]
            blue[x] = line[3 * x + 2]


@compiled(inline="always")
def _clamp(value):
    return min(max(value, ZERO), ONE)


@compiled()
def _affine(row, factor, shift):
    """Brightness (shift 0) and contrast."""
    values = row.reshape(row.size)
    for i in range(len(values)):
        values[i] = _clamp(values[i] * factor + shift)


@compiled()
def _luma_sum(row):
    """Sum a row's lumas in units of 2^-16, each rounded: sums of whole numbers are the same in any order."""
    red, green, blue = row[0], row[1], row[2]
    total = np.int32(0)
    for x in range(len(red)):
        luma = LUMA[0] * red[x] + LUMA[1] * green[x] + LUMA[2] * blue[x]
        total = np.int32(total + np.int32(luma * UNITS + HALF))
    return total


@compiled()
def _saturation(red, green, blue, factor):
    rest = ONE - factor
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        luma = rest * (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)
        red[x] = _clamp(r * factor + luma)
        green[x] = _clamp(g * factor + luma)
        blue[x] = _clamp(b * factor + luma)


@compiled()
def _grey(row):
    """Write the luma into the first plane."""
    red, green, blue = row[0], row[1], row[2]
    for x in range(len(red)):
        red[x] = _clamp(LUMA[0] * red[x] + LUMA[1] * green[x] + LUMA[2] * blue[x])


@compiled()
def _hue(red, green, blue, shift):
    """HSV and back without a branch: h wraps once each way into [0, 6); each channel is a tent over h."""
    turn = shift * SIX
    for x in range(len(red)):
        r, g, b = red[x], green[x], blue[x]
        value = max(max(r, g), b)
        spread = value - min(min(r, g), b)
        inverse = ONE / (spread if spread > ZERO else ONE)
        blue_or_green = TWO + (b - r) * inverse if value == g else FOUR + (r - g) * inverse
        h = ((g - b) * inverse if value == r else blue_or_green) + turn
        h = h + SIX if h < ZERO else h
        h = h - SIX if h >= SIX else h
        low = value - spread
        red[x] = low + spread * _clamp(abs(h - THREE) - ONE)
        green[x] = low + spread * _clamp(TWO - abs(h - TWO))
        blue[x] = low + spread * _clamp(TWO - abs(h - FOUR))


@compiled()
def _interleave(row, channels, line, start):
    """float32 [3, R] -> line[start : start + 3 R], interleaving a pixel's colours, or repeating its grey."""
    if channels == 1:
        _repeat(row[0], line, start, row.shape[1])
        return
    red, green, blue = row[0], row[1], row[2]
    start = np.uint64(start)
    for x in range(np.uint64(len(red))):
        line[start + np.uint64(3) * x] = red[x]
        line[start + np.uint64(3) * x + np.uint64(1)] = green[x]
        line[start + np.uint64(3) * x + np.uint64(2)] = blue[x]


@compiled()
def _repeat(grey, line, start, count):
    start = np.uint64(start)
    for x in range(np.uint64(count)):
        line[start + np.uint64(3) * x] = grey[x]
        line[start + np.uint64(3) * x + np.uint64(1)] = grey[x]
        line[start + np.uint64(3) * x + np.uint64(2)] = grey[x]


@compiled()
def _finish(out, start, count, solarise, scale, shift, first):
    """Solarise and normalise `count` floats of the output in place, from `first` on in the row."""
    start, first = np.uint64(start), np.uint64(first)
    if solarise:
        for i in range(np.uint64(count)):
            value = out[start + i]
            value = ONE - value if value >= THRESHOLD else value
            out[start + i] = value * scale[first + i] + shift[first + i]
    else:
        for i in range(np.uint64(count)):
            out[start + i] = out[start + i] * scale[first + i] + shift[first + i]


@compiled()
def _gaussian(kernel, sigma):
    radius = len(kernel) // 2
    total = 0.0
    for k in range(len(kernel)):
        weight = exp(-0.5 * ((k - radius) / sigma) ** 2)
        kernel[k] = weight
        total += weight
    for k in range(len(kernel)):
        kernel[k] /= total


@compiled()
def _pad(row, radius, channels, padded):
    """Pad a row by reflection, without repeating the border pixel."""
    side = row.shape[1]
    if channels == 1:
        for x in range(side):  # `padded[a:b] = row[0]` would take two seconds more to compile
            padded[radius + x] = row[0, x]
    else:
        _interleave(row, 3, padded, 3 * radius)
    last = radius + side - 1
    for k in range(radius):
        for c in range(channels):
            padded[(radius - 1 - k) * channels + c] = padded[(radius + 1 + k) * channels + c]
            padded[(last + 1 + k) * channels + c] = padded[(last - 1 - k) * channels + c]


@compiled()
def _blur_row(padded, kernel, channels, lines, start, width):
    """Blur one line along itself: tap k lies k pixels, of one or three floats, before and after."""
    radius = len(kernel) // 2
    centre = radius * channels
    _centre_tap(lines, start, width, padded, centre, kernel[radius])
    for k in range(1, radius + 1, 3):  # taps beyond the last have weight 0, and are read at the centre
        a = k * channels
        b, wb = ((k + 1) * channels, kernel[radius + k + 1]) if k + 1 <= radius else (0, ZERO)
        c, wc = ((k + 2) * channels, kernel[radius + k + 2]) if k + 2 <= radius else (0, ZERO)
        _three_pairs(
            lines, start, width, padded,
            centre - a, centre + a, centre - b, centre + b, centre - c, centre + c,
            kernel[radius + k], wb, wc,
        )  # fmt: skip


@compiled()
def _blur_columns(lines, side, kernel, channels, solarise, scale, shift, strip, target):
    """Blur lines along columns, a strip at a time, into the output; tap k lies k lines above and below."""
    radius = len(kernel) // 2
    width = side * channels
    for first in range(0, width, STRIP):
        count = min(STRIP, width - first)
        for y in range(side):
            out, start = (target, y * width + first) if channels == 3 else (strip, 0)
            _centre_tap(out, start, count, lines, y * width + first, kernel[radius])
            for k in range(1, radius + 1, 3):
                wb = kernel[radius + k + 1] if k + 1 <= radius else ZERO
                wc = kernel[radius + k + 2] if k + 2 <= radius else ZERO
                _three_pairs(
                    out, start, count, lines,
                    _mirror(y - k, side) * width + first, _mirror(y + k, side) * width + first,
                    _mirror(y - k - 1, side) * width + first, _mirror(y + k + 1, side) * width + first,
                    _mirror(y - k - 2, side) * width + first, _mirror(y + k + 2, side) * width + first,
                    kernel[radius + k], wb, wc,
                )  # fmt: skip
            if channels == 1:
                _repeat(strip, target, 3 * (y * side + first), count)
                _finish(target, 3 * (y * side + first), 3 * count, solarise, scale, shift, 3 * first)
            else:
                _finish(target, start, count, solarise, scale, shift, first)


@compiled()
def _centre_tap(out, start, count, source, centre, weight):
    start, centre = np.uint64(start), np.uint64(centre)
    for i in range(np.uint64(count)):
        out[start + i] = weight * source[centre + i]


@compiled()
def _three_pairs(out, start, count, source, a0, a1, b0, b1, c0, c1, wa, wb, wc):
    """Add six taps; symmetric ones share a product. LLVM's alias checks allow no more than three pairs.

    The arguments are offsets into two flat arrays instead of slices, each of which would cost two atomic
    operations. They are unsigned so that no index is tested for being negative.
    """
    start, a0, a1 = np.uint64(start), np.uint64(a0), np.uint64(a1)
    b0, b1, c0, c1 = np.uint64(b0), np.uint64(b1), np.uint64(c0), np.uint64(c1)
    for i in range(np.uint64(count)):
        out[start + i] += (
            wa * (source[a0 + i] + source[a1 + i])
            + wb * (source[b0 + i] + source[b1 + i])
            + wc * (source[c0 + i] + source[c1 + i])
        )


@compiled(inline="always")
def _mirror(i, side):
    i = abs(i)
    return 2 * (side - 1) - i if i >= side else i
