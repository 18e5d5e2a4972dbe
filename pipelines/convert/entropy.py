"""A fast check of baseline JPEGs: walk every Huffman code from the first block to the end marker.

All that can be wrong behind the header of a baseline JPEG is wrong in its Huffman codes: the arithmetic that
follows has no errors to report. So it is enough to step over the codes, and that needs no coefficient: the
step is a code's length plus the bits it announces. One look at the next 11 bits steps over as many whole
codes as they hold, where a decoder takes one at a time; and since a step waits for the look before it, two
images are walked at once, each in the other's waiting time.

The walk says "sound" or "not sure", and never "damaged": whatever isn't a plain baseline JPEG (progressive,
arithmetic, several scans) or has anything odd about it is left to libturbojpeg, whose verdict and message
hold. What the walk calls sound, libturbojpeg reads without a warning; the tests hold both against each other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.convert.compiled import compiled

LOOK = 11  # bits; a table of 12 is larger than what the first-level cache has for two images
ENTRIES = 1 << LOOK
REST = 64 - LOOK
LONGEST = 22  # bits of one step, so that three fit into a word: 2 * 22 + 11 <= 57
# An entry: how many bits to step over (6 bits), how many coefficients (8 bits), then one bit each:
END = 1 << 8  # the block ends there
ALONE = 1 << 9  # no code, or one that is too long for the table: it is looked up alone
ROOM = 1024  # bytes behind the last image that a walk which has lost its way may still read
JOBS = 4096  # stretches between restart markers, of all images of a call
LARGEST = 16 << 20  # bytes of a file; what is larger is no photo of a data set, and left to libturbojpeg
SOUND, UNSURE = 0, 1

u16, u64 = np.uint16, np.uint64
_local = threading.local()


class _Workspace:
    """What a thread needs to check up to `images` images of `size` bytes in all."""

    def __init__(self, images: int, size: int):
        self.images, self.size = images, size
        self.stream = np.empty(size + ROOM, np.uint8)  # the images' codes without stuffed zeros
        self.tables = np.zeros((8 * images + 1) * ENTRIES, np.uint16)  # DC 0-3, AC 0-3 each; one of zeros
        self.codes = np.zeros((8 * images, 51 + 256), np.int32)  # of each table, to look one up alone
        self.parts = np.zeros(2 * ENTRIES, np.uint16)
        # Of each block of a unit: where its DC and its AC table begin, and the row of the block behind it.
        self.units = np.zeros((10 * images + 1, 3), np.uint64)
        self.units[-1] = 8 * images * ENTRIES, 8 * images * ENTRIES, 10 * images
        self.jobs = np.zeros((JOBS, 4), np.int64)  # image, first and last byte + 1 in `stream`, blocks
        self.verdicts = np.zeros(JOBS, np.uint8)


def sound(files: Sequence[bytes]) -> list[bool]:
    """Of each JPEG file, whether its codes are whole and lead exactly to its end marker; False: not sure."""
    files = [data if 0 < len(data) <= LARGEST else b"\0" for data in files]
    size = sum(map(len, files))
    room = getattr(_local, "room", None)
    if room is None or room.images < len(files) or room.size < size:
        room = _local.room = _Workspace(max(len(files), 8), max(size, 1 << 20))
    ends = [(0, 0)]  # of what is in use of `stream` and `jobs`
    for number, data in enumerate(files):
        given = np.frombuffer(data, np.uint8), number, *ends[-1]
        ends.append(_read(*given, room.stream, room.tables, room.codes, room.parts, room.units, room.jobs))
    jobs = ends[-1][1]
    _walk(room.stream, room.tables, room.codes, room.units, room.jobs[:jobs], room.verdicts)
    # Without a job, an image wasn't plain enough to be walked.
    return [a < b and not room.verdicts[a:b].any() for (_, a), (_, b) in pairwise(ends)]


# ------------------------------------------------------------------ one image's headers

# What a frame is, in an array of numbers: at these places, per component or table from there on.
COMPONENTS, HEIGHT, WIDTH, RESTART, BLOCKS = range(5)
IDENTIFIER, ACROSS, DOWN, QUANTISATION = 8, 12, 16, 20
DEFINED = 24  # DC tables 0-3, AC tables 0-3, quantisation tables 0-3


@compiled()
def _read(data, image, to, jobs, stream, tables, codes, parts, units, all_jobs):
    """Read all in front of an image's codes, and copy these to `stream`; returns the next free places."""
    frame = np.zeros(36, np.int64)
    n = len(data)
    if n < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return to, jobs
    place = 2
    while True:
        if place + 4 > n or data[place] != 0xFF:
            return to, jobs
        marker = data[place + 1]
        start, end = place + 4, place + 2 + _u16(data, place + 2)
        if end < start or end > n or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return to, jobs
        if marker == 0xDA:
            break
        if not _segment(data, marker, start, end, image, tables, codes, parts, frame):
            return to, jobs
        place = end
    if not _scan(data, start, end, image, frame, units):
        return to, jobs
    return _copy(data, end, image, to, jobs, stream, frame, all_jobs)


@compiled(inline="always")
def _u16(data, at):
    return (np.int64(data[at]) << 8) | np.int64(data[at + 1])


@compiled()
def _segment(data, marker, start, end, image, tables, codes, parts, frame):
    """One segment before the scan; False if there is anything odd about it."""
    if marker == 0xC0 or marker == 0xC1:  # baseline, or extended with the same codes
        return _frame(data, start, end, frame)
    if marker == 0xC4:
        while start < end:
            start = _huffman(data, start, end, image, tables, codes, parts, frame)
            if start < 0:
                return False
        return True
    if 0xC2 <= marker <= 0xCF:  # other ways to code
        return False
    if marker == 0xDB:
        while start < end:
            size = 129 if data[start] >> 4 else 65
            if data[start] >> 4 > 1 or data[start] & 15 > 3 or start + size > end:
                return False
            frame[DEFINED + 8 + (data[start] & 15)] = 1
            start += size
    elif marker == 0xDD:
        if end - start != 2:
            return False
        frame[RESTART] = _u16(data, start)
    return True


@compiled()
def _frame(data, start, end, frame):
    if frame[COMPONENTS] or end - start < 9 or data[start] != 8:
        return False
    count = np.int64(data[start + 5])
    frame[COMPONENTS], frame[HEIGHT], frame[WIDTH] = count, _u16(data, start + 1), _u16(data, start + 3)
    if count not in (1, 3) or end - start != 6 + 3 * count or frame[HEIGHT] == 0 or frame[WIDTH] == 0:
        return False
    for c in range(count):
        at = start + 6 + 3 * c
        frame[IDENTIFIER + c] = data[at]
        frame[ACROSS + c], frame[DOWN + c] = data[at + 1] >> 4, data[at + 1] & 15
        frame[QUANTISATION + c] = data[at + 2]
        if not (1 <= frame[ACROSS + c] <= 4 and 1 <= frame[DOWN + c] <= 4 and data[at + 2] < 4):
            return False
    return True


@compiled()
def _scan(data, start, end, image, frame, units):
    """The scan's header must be one scan with every component, the whole spectrum at once."""
    components = frame[COMPONENTS]
    if components == 0 or end - start != 4 + 2 * components or data[start] != components:
        return False
    if data[end - 3] != 0 or data[end - 2] != 63 or data[end - 1] != 0:
        return False
    blocks = 0  # of a unit, in the order in which they come
    for c in range(components):
        if data[start + 1 + 2 * c] != frame[IDENTIFIER + c]:
            return False
        for other in range(c):
            if frame[IDENTIFIER + other] == frame[IDENTIFIER + c]:
                return False
        dc, ac = data[start + 2 + 2 * c] >> 4, data[start + 2 + 2 * c] & 15
        if dc > 3 or ac > 3 or not (frame[DEFINED + dc] and frame[DEFINED + 4 + ac]):
            return False
        if not frame[DEFINED + 8 + frame[QUANTISATION + c]]:
            return False
        count = frame[ACROSS + c] * frame[DOWN + c] if components > 1 else 1
        if blocks + count > 10:
            return False
        for row in range(10 * image + blocks, 10 * image + blocks + count):
            units[row, 0], units[row, 1] = (8 * image + dc) * ENTRIES, (8 * image + 4 + ac) * ENTRIES
            units[row, 2] = row + 1
        blocks += count
    units[10 * image + blocks - 1, 2] = 10 * image
    frame[BLOCKS] = blocks
    return True


# ------------------------------------------------------------------------- its tables


@compiled()
def _huffman(data, start, end, image, tables, codes, parts, frame):
    """Read one table of a DHT segment; returns where the next begins, or -1."""
    if end - start < 17:
        return -1
    kind, number = np.int64(data[start] >> 4), np.int64(data[start] & 15)
    total = 0
    for i in range(16):
        total += data[start + 1 + i]
    symbols = start + 17
    if kind > 1 or number > 3 or total > 256 or symbols + total > end:
        return -1
    row = 8 * image + 4 * kind + number
    # For each length: [length] the first code, [17 + length] the last + 1, [34 + length] the first's symbol.
    own, code, k = codes[row], 0, 0
    for length in range(1, 17):
        count = np.int64(data[start + length])
        own[length], own[17 + length], own[34 + length] = code, code + count, k
        if code + count >= 1 << length:  # too many, or a code of ones alone, which JPEG does not have
            return -1
        k, code = k + count, (code + count) << 1
    for i in range(total):
        own[51 + i] = data[symbols + i]
        if kind == 0 and own[51 + i] > 15:
            return -1
    table = tables[row * ENTRIES : (row + 1) * ENTRIES]
    if kind == 1:
        parts[:] = 0
        for look in range(1, LOOK):
            _fill(parts[1 << look : 2 << look], look, own, 1, parts)
    table[:] = ALONE << 6
    _fill(table, LOOK, own, kind, parts)
    frame[DEFINED + 4 * kind + number] = 1
    return symbols + total


@compiled()
def _fill(table, look, codes, kind, parts):
    """uint16 [2^look]: the step over all whole codes in the next `look` bits; over 11 bits, over the first.

    Behind the first code and its bits begins what the table of the bits that are left holds already: the
    table of n bits lies in `parts` from 2^n on.
    """
    for length in range(1, look + 1):
        for code in range(codes[length], codes[17 + length]):
            symbol = codes[51 + codes[34 + length] + code - codes[length]]
            bits, step = _step(symbol, kind)
            used = length + bits
            at = code << (look - length)
            first = u16((step << 6) | used)
            if used > look:  # the bits behind the code may lie beyond: they are only stepped over
                lost = u16(ALONE << 6) if look == LOOK else u16(0)
                table[at : at + (1 << (look - length))] = first if LOOK - look + used <= LONGEST else lost
            elif kind == 0 or step >= END or used == look:
                table[at : at + (1 << (look - length))] = first
            else:
                rest = 1 << (look - used)
                for _ in range(1 << bits):
                    for i in range(rest):
                        table[at + i] = first + parts[rest + i]
                    at += rest


@compiled(inline="always")
def _step(symbol, kind):
    """(bits that follow the code, coefficients it stands for, END added if it ends the block)"""
    if kind == 0:
        return symbol, 1
    run, bits = symbol >> 4, symbol & 15
    if bits == 0 and run != 15:
        return 0, END
    return bits, run + 1


# -------------------------------------------------------------------------- its codes


def _load_of(context, array, at):
    """The eight bytes from `at` on as one number, the first on top. There is no check of the array's end."""

    def code(context, builder, signature, arguments):
        value = builder.load(_place(context, builder, signature, arguments))
        value.align = 1
        return builder.bswap(value)

    return types.uint64(array, at), code


def _store_of(context, array, at, value):
    """Write a number as eight bytes, likewise."""

    def code(context, builder, signature, arguments):
        place = _place(context, builder, signature, arguments)
        builder.store(builder.bswap(arguments[2]), place).align = 1
        return context.get_dummy_value()

    return types.void(array, at, value), code


_load: Any = intrinsic(_load_of)
_store: Any = intrinsic(_store_of)


def _place(context, builder, signature, arguments):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(64).as_pointer())


@compiled()
def _copy(data, place, image, to, job, stream, frame, jobs):
    """Copy everything up to the end marker, a job for each stretch between restart markers; returns the next
    free places, which are the same as before if there is anything odd."""
    before = to, job
    components = frame[COMPONENTS]
    # A scan of one component has a block a unit, whatever its sampling factors say.
    across = 8 * frame[ACROSS : ACROSS + components].max() if components > 1 else 8
    down = 8 * frame[DOWN : DOWN + components].max() if components > 1 else 8
    units = -(-frame[WIDTH] // across) * -(-frame[HEIGHT] // down)
    number = 0
    while units > 0:
        here = min(units, frame[RESTART]) if frame[RESTART] else units
        begin = to
        place, to = _unstuffed(data, place, stream, to)
        if place < 0 or job == len(jobs):
            return before
        jobs[job, 0], jobs[job, 1], jobs[job, 2], jobs[job, 3] = image, begin, to, here * frame[BLOCKS]
        job, units = job + 1, units - here
        if data[place + 1] != (0xD0 + (number & 7) if units > 0 else 0xD9):
            return before
        number, place = number + 1, place + 2
    return to, job


@compiled()
def _unstuffed(data, start, stream, to):
    """Copy what stands before the next marker without the zeros behind 0xFF; returns where that marker is,
    or -1, and the next free place."""
    n = u64(len(data))
    place, out = u64(start), u64(to)
    while place + u64(8) <= n:
        word = _load(data, place)
        _store(stream, out, word)
        absent = ~word
        if (absent - u64(0x0101010101010101)) & word & u64(0x8080808080808080) == u64(0):
            place, out = place + u64(8), out + u64(8)
            continue
        stop = place + u64(8)
        while place < stop:
            byte = data[place]
            if byte == 0xFF:
                if place + u64(1) >= n:
                    return -1, to
                if data[place + u64(1)] != 0:
                    return np.int64(place), np.int64(out)
                place += u64(1)
            stream[out] = byte
            place, out = place + u64(1), out + u64(1)
    while place + u64(1) < n:
        byte = data[place]
        if byte == 0xFF:
            if data[place + u64(1)] != 0:
                return np.int64(place), np.int64(out)
            place += u64(1)
        stream[out] = byte
        place, out = place + u64(1), out + u64(1)
    return -1, to


@compiled()
def _walk(stream, tables, codes, units, jobs, verdicts):
    """Walk all jobs, two at a time, and write down whether they lead to their ends.

    Of each: its position in bits, the coefficient k that is next, where the table for it begins, the block's
    row in `units`, the blocks left, its last bit. Three steps are looked up ahead; within which of them a
    block ended is found out afterwards. (That is written out twice, since numba counts the references of an
    array, atomically, for each function that is given it, inlined or not: as long as a block takes.)
    """
    position_a, row_a, left_a, last_a, job_a = _begin(len(jobs), jobs, units)
    position_b, row_b, left_b, last_b, job_b = _begin(len(jobs), jobs, units)
    base_a = base_b = units[row_a, 1]
    k_a = k_b = u64(64)  # what was in hand is done with
    next_job = 0
    while True:
        word_a = _load(stream, position_a >> u64(3)) << (position_a & u64(7))
        word_b = _load(stream, position_b >> u64(3)) << (position_b & u64(7))
        first_a = u64(tables[base_a + (word_a >> u64(REST))])
        first_b = u64(tables[base_b + (word_b >> u64(REST))])
        word_a <<= first_a & u64(63)
        word_b <<= first_b & u64(63)
        second_a = u64(tables[base_a + (word_a >> u64(REST))])
        second_b = u64(tables[base_b + (word_b >> u64(REST))])
        word_a <<= second_a & u64(63)
        word_b <<= second_b & u64(63)
        third_a = u64(tables[base_a + (word_a >> u64(REST))])
        third_b = u64(tables[base_b + (word_b >> u64(REST))])
        after_a = k_a + (first_a >> u64(6)) + (second_a >> u64(6)) + (third_a >> u64(6))
        after_b = k_b + (first_b >> u64(6)) + (second_b >> u64(6)) + (third_b >> u64(6))
        if after_a < u64(64):
            k_a = after_a
            position_a += (first_a & u64(63)) + (second_a & u64(63)) + (third_a & u64(63))
        else:
            bits, k_a, step = _up_to_the_turn(k_a, first_a, second_a, third_a)
            position_a += bits
            if not _ends_block(k_a, step):
                word_a = _load(stream, position_a >> u64(3)) << (position_a & u64(7))
                step = _alone(word_a, codes, base_a, 1)
            position_a, k_a = _behind(position_a, k_a, step, last_a)
            if k_a >= u64(64):
                k_a, left_a, row_a = u64(1), left_a - 1, units[row_a, 2]
                if left_a == 0 or position_a > last_a:
                    verdicts[job_a] = SOUND if position_a <= last_a < position_a + u64(8) else UNSURE
                    position_a, row_a, left_a, last_a, job_a = _begin(next_job, jobs, units)
                    next_job += 1
                    if job_a < 0 and job_b < 0:
                        return
                base_a = units[row_a, 1]
                word_a = _load(stream, position_a >> u64(3)) << (position_a & u64(7))
                step = u64(tables[units[row_a, 0] + (word_a >> u64(REST))])
                if step >> u64(6) == u64(ALONE):
                    step = _alone(word_a, codes, units[row_a, 0], 0)
                position_a = _behind(position_a, u64(1), step, last_a)[0]
        if after_b < u64(64):
            k_b = after_b
            position_b += (first_b & u64(63)) + (second_b & u64(63)) + (third_b & u64(63))
        else:
            bits, k_b, step = _up_to_the_turn(k_b, first_b, second_b, third_b)
            position_b += bits
            if not _ends_block(k_b, step):
                word_b = _load(stream, position_b >> u64(3)) << (position_b & u64(7))
                step = _alone(word_b, codes, base_b, 1)
            position_b, k_b = _behind(position_b, k_b, step, last_b)
            if k_b >= u64(64):
                k_b, left_b, row_b = u64(1), left_b - 1, units[row_b, 2]
                if left_b == 0 or position_b > last_b:
                    verdicts[job_b] = SOUND if position_b <= last_b < position_b + u64(8) else UNSURE
                    position_b, row_b, left_b, last_b, job_b = _begin(next_job, jobs, units)
                    next_job += 1
                    if job_b < 0 and job_a < 0:
                        return
                base_b = units[row_b, 1]
                word_b = _load(stream, position_b >> u64(3)) << (position_b & u64(7))
                step = u64(tables[units[row_b, 0] + (word_b >> u64(REST))])
                if step >> u64(6) == u64(ALONE):
                    step = _alone(word_b, codes, units[row_b, 0], 0)
                position_b = _behind(position_b, u64(1), step, last_b)[0]


@compiled()
def _begin(job, jobs, units):
    """(position, row, blocks left, last bit, job); without a job, a place where no step leads anywhere."""
    if job >= len(jobs):
        return u64(0), u64(len(units) - 1), 1, u64(0), -1
    return u64(8 * jobs[job, 1]), u64(10 * jobs[job, 0]), jobs[job, 3], u64(8 * jobs[job, 2]), job


@compiled()
def _up_to_the_turn(k, first, second, third):
    """(bits of the steps that are taken whole, the coefficient behind them, the step that isn't)"""
    one = k + (first >> u64(6))
    two = one + (second >> u64(6))
    if two < u64(64):
        return (first & u64(63)) + (second & u64(63)), two, third
    return (first & u64(63), one, second) if one < u64(64) else (u64(0), k, first)


@compiled()
def _ends_block(k, step):
    """Whether a step of several codes ends the block with the last of them, and not before."""
    count = step >> u64(6)
    return k + count == u64(64) or (u64(END) <= count < u64(ALONE) and k + count < u64(64 + END))


@compiled()
def _behind(position, k, step, last):
    """(position, k) behind a step; behind the last bit, at the end of a block, if it is none or too long."""
    after = k + (step >> u64(6))
    if step == u64(0) or u64(64) < after < u64(END):
        return last + u64(1), u64(64)
    return position + (step & u64(63)), after


@compiled()
def _alone(word, codes, base, kind):
    """The step over the one code on top of a word, as a table has it; 0 if there is no such code."""
    row = base >> u64(LOOK)
    for length in range(1, 17):
        code = np.int64(word >> u64(64 - length))
        if codes[row, length] <= code < codes[row, 17 + length]:
            symbol = codes[row, 51 + codes[row, 34 + length] + code - codes[row, length]]
            bits, count = _step(symbol, kind)
            return u64((count << 6) | (length + bits))
    return u64(0)
