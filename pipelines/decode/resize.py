"""Crop and resize in one go, anti-aliased as PIL and torchvision do it, compiled and without the GIL.

Rows are weighted first, over contiguous bytes, which the compiler vectorises by itself. It can't do so with
columns, whose pixels are three floats: there, two neighbouring pixels are one vector of eight lanes (the last
two have weight zero), which made that half three times as fast as scalars.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.kernels.compiled import compiled

LANES = 8  # two pixels of three channels, and two lanes that count for nothing


@compiled(error_model="numpy")
def _taps(size, out_size, first, weights):
    """Anti-aliased bilinear weights, as PIL's and torchvision's: a triangle as wide as the scale.

    Fills first[i] (first source pixel of output pixel i) and weights[i, :] (zero behind its last tap);
    returns the count of taps.
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


@compiled()
def _by_lane(weights, pairs, lanes):
    """Weights of columns, [columns, taps], as each lane of each pair of pixels needs them."""
    for i in range(len(weights)):
        for pair in range(pairs):
            for c in range(3):
                lanes[i, pair * LANES + c] = weights[i, 2 * pair]
                lanes[i, pair * LANES + 3 + c] = weights[i, 2 * pair + 1]
            lanes[i, pair * LANES + 6] = lanes[i, pair * LANES + 7] = 0


@intrinsic
def _weigh_pixels(typing, line, place, lanes, row, pairs, out, target):
    """One pixel, out[target : target + 3], from `2 * pairs` pixels of `line` that start at line[place].

    line float32 [n], lanes float32 [columns, 8 * pairs] (see `_by_lane`), out uint8 [m], all contiguous.
    Writes one byte too many, and reads two floats too many.
    """
    signature = types.void(line, types.intp, lanes, types.intp, types.intp, out, types.intp)

    def build(context, builder, sig, args):
        def address(argument, index):
            array = cgutils.create_struct_proxy(sig.args[argument])(context, builder, args[argument])
            return builder.gep(array.data, [index])

        def load(start, index):
            vector = ir.VectorType(ir.FloatType(), LANES).as_pointer()
            return builder.load(builder.bitcast(builder.gep(start, [index]), vector), align=4)

        def lanes_of(vector, *chosen):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), list(chosen))
            return builder.shuffle_vector(vector, vector, mask)

        _, place, _, row, pairs, _, target = args
        word = place.type
        step = builder.mul(pairs, word(LANES))
        pixels, weights = address(0, place), address(2, builder.mul(row, step))

        def product(pair):
            values = load(pixels, builder.mul(pair, word(6)))
            return builder.fmul(values, load(weights, builder.mul(pair, word(LANES))))

        total = cgutils.alloca_once_value(builder, product(word(0)))
        with cgutils.for_range(builder, pairs, start=word(1)) as loop:
            builder.store(builder.fadd(builder.load(total), product(loop.index)), total)
        both = builder.load(total)
        half = ir.Constant(ir.VectorType(ir.FloatType(), 4), [0.5] * 4)
        one = builder.fadd(builder.fadd(lanes_of(both, 0, 1, 2, 6), lanes_of(both, 3, 4, 5, 7)), half)
        whole = builder.fptosi(one, ir.VectorType(ir.IntType(32), 4))
        four = builder.trunc(whole, ir.VectorType(ir.IntType(8), 4))
        builder.store(four, builder.bitcast(address(5, target), four.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, build


@compiled(inline="always")
def _columns(line, first, lanes, pairs, flip, out, start):
    side = len(first)
    for x in range(side):
        column = side - 1 - x if flip else x
        _weigh_pixels(line, 3 * first[column], lanes, column, pairs, out, start + 3 * x)  # type: ignore[call-arg]


@compiled()
def resize_crop(image, box, out, flip=False):
    """Crop `box` (top, left, height, width) of image uint8 [H, W, 3], resized to out uint8 [R, R, 3].

    Both arrays are contiguous; `flip` mirrors the crop. Within one level of torchvision's antialiased
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
    lanes = np.empty((side, pairs * LANES), np.float32)
    _by_lane(column_weights, pairs, lanes)
    pixels, target = image.reshape(-1), out.reshape(-1)
    stride, length, last = 3 * image.shape[1], 3 * width, height - 1
    line = np.empty(length + 6 * pairs + 2, np.float32)
    line[length:] = 0  # taps of weight zero past the right edge read this
    last_line = np.empty(3 * side + 1, np.uint8)  # for the byte too many
    for y in range(side):
        for k in range(0, row_taps, 2):  # two rows at once: half the traffic
            one, two = row_weights[y, k], row_weights[y, k + 1]
            start = (top + min(rows_first[y] + k, last)) * stride + 3 * left
            upper = pixels[start : start + length]
            start = (top + min(rows_first[y] + k + 1, last)) * stride + 3 * left
            lower = pixels[start : start + length]
            if k == 0:
                for x in range(length):
                    line[x] = one * np.float32(upper[x]) + two * np.float32(lower[x])
            else:
                for x in range(length):
                    line[x] += one * np.float32(upper[x]) + two * np.float32(lower[x])
        written, start = (target, 3 * y * side) if y < side - 1 else (last_line, 0)
        if pairs == 1:  # constants, so that the loop over pairs goes
            _columns(line, columns_first, lanes, 1, flip, written, start)
        elif pairs == 2:
            _columns(line, columns_first, lanes, 2, flip, written, start)
        else:
            _columns(line, columns_first, lanes, pairs, flip, written, start)
    target[3 * side * (side - 1) :] = last_line[: 3 * side]
