"""Crop and resize in one step, anti-aliased as in PIL and torchvision, compiled and without the GIL.

Rows are weighted first, over contiguous bytes, which the compiler vectorises by itself. It can't vectorise
columns, whose pixels are three floats. There a pixel is a vector of four lanes, whose last lane belongs to
the next pixel, which overwrites it later, so that no lane has to be moved.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.kernels.compiled import compiled

LANES = 4  # a pixel's three channels, and an unused lane


@compiled(error_model="numpy")
def _taps(size, out_size, first, weights):
    """Anti-aliased bilinear weights, as in PIL and torchvision: a triangle as wide as the scale.

    Fills first[i] (the first source pixel of output pixel i) and weights[i, :] (zero after its last tap);
    returns the number of taps.
    """
    scale = size / out_size
    support = max(scale, 1.0)
    slope = 1.0 / support
    count = 0
    for i in range(out_size):
        centre = scale * (i + 0.5)
        start = max(0, int(centre - support + 0.5))
        stop = min(size, int(centre + support + 0.5))
        total = 0.0
        for k in range(stop - start):
            weight = max(0.0, 1.0 - abs(start + k - centre + 0.5) * slope)
            weights[i, k] = weight
            total += weight
        share = np.float32(1.0 / total)
        for k in range(stop - start):
            weights[i, k] *= share
        for k in range(stop - start, weights.shape[1]):
            weights[i, k] = 0
        first[i] = start
        count = max(count, stop - start)
    return count


@intrinsic
def _weigh_pixels(typing, line, place, weights, start, pairs, out, target):
    """Compute one pixel, out[target : target + 3], from the `2 * pairs` pixels of `line` that start at
    line[place], with the weights from weights[start] on; all are float32 [n], contiguous.

    Reads and writes one number beyond the pixels.
    """
    signature = types.void(line, types.intp, weights, types.intp, types.intp, out, types.intp)

    def build(context, builder, sig, args):
        vector = ir.VectorType(ir.FloatType(), LANES)

        def address(argument, index):
            array = cgutils.create_struct_proxy(sig.args[argument])(context, builder, args[argument])
            return builder.gep(array.data, [index])

        def product(tap):
            place = builder.add(args[1], builder.mul(tap, word(3)))
            pixel = builder.load(builder.bitcast(address(0, place), vector.as_pointer()), align=4)
            weight = builder.load(address(2, builder.add(args[3], tap)))
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.IntType(32)(0))
            same = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.fmul(pixel, builder.shuffle_vector(one, one, same))

        word = args[1].type
        sums = [cgutils.alloca_once_value(builder, product(word(tap))) for tap in (0, 1)]
        with cgutils.for_range(builder, args[4], start=word(1)) as loop:
            for tap, total in enumerate(sums):
                term = product(builder.add(builder.mul(loop.index, word(2)), word(tap)))
                builder.store(builder.fadd(builder.load(total), term), total)
        both = builder.fadd(*map(builder.load, sums))
        builder.store(both, builder.bitcast(address(5, args[6]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


@compiled(inline="always")
def _columns(line, places, weights, pairs, out):
    for x in range(len(places)):
        _weigh_pixels(line, places[x], weights, 2 * pairs * x, pairs, out, 3 * x)  # type: ignore[call-arg]


@compiled()
def resize_crop(image, box, out, flip):
    """Crop `box` (top, left, height, width) of image uint8 [H, W, 3] and resize it to out uint8 [R, R, 3].

    Both arrays must be contiguous; `flip` mirrors the crop. Within one level of torchvision's antialiased
    `resized_crop` on uint8, which rounds between its two passes.
    """
    top, left, height, width = box[0], box[1], box[2], box[3]
    side = out.shape[0]
    rows_first = np.empty(side, np.int64)
    columns_first = np.empty(side, np.int64)
    row_weights = np.empty((side, 2 * int(np.ceil(max(height / side, 1.0))) + 2), np.float32)
    column_weights = np.empty((side, 2 * int(np.ceil(max(width / side, 1.0))) + 2), np.float32)
    row_taps = _taps(height, side, rows_first, row_weights)
    pairs = (_taps(width, side, columns_first, column_weights) + 1) // 2
    places, column_weights = 3 * columns_first, column_weights[:, : 2 * pairs].copy()
    if flip:
        places, column_weights = places[::-1].copy(), column_weights[::-1].copy()
    weights = column_weights.reshape(-1)
    pixels, target = image.reshape(-1), out.reshape(-1)
    stride, length, last = 3 * image.shape[1], 3 * width, height - 1
    line = np.empty(length + 6 * pairs + 2, np.float32)
    line[length:] = 0  # read by taps of weight zero past the right edge
    made = np.empty(3 * side + 1, np.float32)  # with room for the extra number
    for y in range(side):
        for k in range(0, row_taps, 2):  # two rows at once: half the memory traffic
            one, two = row_weights[y, k], row_weights[y, k + 1]
            if k > 0 and one == 0:  # this row has fewer taps than the others
                break
            start = (top + min(rows_first[y] + k, last)) * stride + 3 * left
            upper = pixels[start : start + length]
            start = (top + min(rows_first[y] + k + 1, last)) * stride + 3 * left
            lower = pixels[start : start + length]
            if k == 0:
                for x in range(length):
                    line[x] = one * np.float32(upper[x]) + two * np.float32(lower[x])
            elif two == 0:
                for x in range(length):
                    line[x] += one * np.float32(upper[x])
            else:
                for x in range(length):
                    line[x] += one * np.float32(upper[x]) + two * np.float32(lower[x])
        if pairs == 1:  # a constant, so that the loop over pairs disappears
            _columns(line, places, weights, 1, made)
        elif pairs == 2:
            _columns(line, places, weights, 2, made)
        else:
            _columns(line, places, weights, pairs, made)
        row = target[3 * y * side : 3 * (y + 1) * side]
        for x in range(3 * side):
            row[x] = np.uint8(np.int32(made[x] + np.float32(0.5)))
