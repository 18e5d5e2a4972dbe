"""A fast check of baseline JPEGs: walk every Huffman code from the first block to the end marker.

All that can be wrong behind the header of a baseline JPEG is wrong in its Huffman codes: the arithmetic that
follows has no errors to report. So it is enough to step over the codes, and that needs no coefficient: the
step is a code's length plus the bits it announces (`walk.py`).

The walk says "sound" or "not sure", and never "damaged": whatever isn't a plain baseline JPEG (progressive,
arithmetic, several scans) or has anything odd about it is left to libturbojpeg, whose verdict and message
hold. What the walk calls sound, libturbojpeg reads without a warning; the tests hold both against each other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pipelines.compiled import compiled
from pipelines.convert.walk import (
    ALONE,
    CODES,
    END,
    ENTRIES,
    LONGEST,
    LOOK,
    ROOM,
    SWITCH,
    address,
    put_word,
    walk,
    word_at,
)

JOBS = 4096  # stretches between restart markers, of all images of a call
LARGEST = 16 << 20  # bytes of a file; what is larger is no photo of a data set, and left to libturbojpeg

u16, u64 = np.uint16, np.uint64
_local = threading.local()


class _Workspace:
    """What a thread needs to check up to `images` images of `size` bytes in all."""

    def __init__(self, images: int, size: int):
        self.images, self.size = images, size
        self.stream = np.empty(size + ROOM, np.uint8)  # the images' codes without stuffed zeros
        self.codes = np.zeros((8 * images, CODES), np.int32)  # DC 0-3, AC 0-3 of each, as its file has them
        # Of each component: its DC and AC table to step by, and the rows of `codes` that they come from; then
        # a pair of tables that lead nowhere.
        self.tables = np.zeros((8 * images + 2) * ENTRIES, np.uint16)
        self.origins = np.zeros(8 * images + 2, np.int64)
        self.parts = np.zeros(2 * ENTRIES, np.uint16)
        self.turns = np.zeros(
            10 * images + 1, np.uint64
        )  # of each block of a unit: the state to begin the next
        self.turns[-1] = (10 * images << 32) | (8 * images << 9)
        self.jobs = np.zeros((JOBS, 5), np.int64)  # image, first and last byte + 1 in `stream`, blocks, state
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
        into = room.stream, room.tables, room.codes, room.origins, room.parts, room.turns, room.jobs
        ends.append(_read(*given, *into))
    jobs = ends[-1][1]
    walk(room.stream, room.tables, room.codes, room.origins, room.turns, room.jobs[:jobs], room.verdicts)
    # Without a job, an image wasn't plain enough to be walked.
    return [a < b and not room.verdicts[a:b].any() for (_, a), (_, b) in pairwise(ends)]


# ------------------------------------------------------------------ one image's headers

# What a frame is, in an array of numbers: at these places, per component or table from there on.
COMPONENTS, HEIGHT, WIDTH, RESTART, BLOCKS = range(5)
IDENTIFIER, ACROSS, DOWN, QUANTISATION = 8, 12, 16, 20
DEFINED = 24  # DC tables 0-3, AC tables 0-3, quantisation tables 0-3


@compiled()
def _read(data, image, to, jobs, stream, tables, codes, origins, parts, turns, all_jobs):
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
        if not _segment(data, marker, start, end, image, codes, frame):
            return to, jobs
        place = end
    if not _scan(data, start, end, image, frame, origins, turns):
        return to, jobs
    _fill_tables(image, frame[COMPONENTS], tables, codes, origins, parts)
    return _copy(data, end, image, to, jobs, stream, frame, turns, all_jobs)


@compiled(inline="always")
def _u16(data, at):
    return (np.int64(data[at]) << 8) | np.int64(data[at + 1])


@compiled()
def _segment(data, marker, start, end, image, codes, frame):
    """One segment before the scan; False if there is anything odd about it."""
    if marker == 0xC0 or marker == 0xC1:  # baseline, or extended with the same codes
        return _frame(data, start, end, frame)
    if marker == 0xC4:
        while start < end:
            start = _huffman(data, start, end, image, codes, frame)
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
def _scan(data, start, end, image, frame, origins, turns):
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
        pair = 8 * image + 2 * c
        origins[pair], origins[pair + 1] = 8 * image + dc, 8 * image + 4 + ac
        for other in range(
            8 * image, pair, 2
        ):  # of two components with the same tables, as Cb and Cr, one does
            if origins[other] == origins[pair] and origins[other + 1] == origins[pair + 1]:
                pair = other
                break
        for row in range(10 * image + blocks, 10 * image + blocks + count):
            turns[max(row - 1, 10 * image)] = (row << 32) | (pair << 9)
        blocks += count
    turns[10 * image + blocks - 1] = (10 * image << 32) | (8 * image << 9)
    frame[BLOCKS] = blocks
    return True


# ------------------------------------------------------------------------- its tables


@compiled()
def _huffman(data, start, end, image, codes, frame):
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
    # For each length: [length] the first code, [17 + length] the last + 1, [34 + length] the first's symbol.
    own, code, k = codes[8 * image + 4 * kind + number], 0, 0
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
    frame[DEFINED + 4 * kind + number] = 1
    return symbols + total


@compiled()
def _fill_tables(image, components, tables, codes, origins, parts):
    """The tables to step by, a pair for each component, but for those that have an earlier one's."""
    for c in range(components):
        pair = 8 * image + 2 * c
        known = False
        for other in range(8 * image, pair, 2):
            known |= origins[other] == origins[pair] and origins[other + 1] == origins[pair + 1]
        if known:
            continue
        for kind in range(2):
            table, own = (
                tables[(pair + kind) * ENTRIES : (pair + kind + 1) * ENTRIES],
                codes[origins[pair + kind]],
            )
            if kind == 1:
                parts[:] = 0
                for look in range(1, LOOK):
                    _fill(parts[1 << look : 2 << look], look, own, 1, parts)
            table[:] = ALONE << 6
            _fill(table, LOOK, own, kind, parts)


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
        return symbol, 1 + SWITCH
    run, bits = symbol >> 4, symbol & 15
    if bits == 0 and run != 15:
        return 0, END
    return bits, run + 1


# -------------------------------------------------------------------------- its codes


@compiled()
def _copy(data, place, image, to, job, stream, frame, turns, jobs):
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
        jobs[job, 4] = turns[10 * image + frame[BLOCKS] - 1]
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
    source, target = address(data), address(stream)
    place, out = u64(start), u64(to)
    while place + u64(8) <= n:
        word = word_at(source + place)
        put_word(target + out, word)
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
