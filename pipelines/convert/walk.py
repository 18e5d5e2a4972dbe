"""The walk over a JPEG's Huffman codes: where does each lead, and does the last one lead to the end?

One look at the next 11 bits steps over as many whole codes as they hold, where a decoder takes one at a time.
Such a step waits for the one before it, so three images are walked at once, each in the others' waiting time;
and there is no branch in it but for what is rare, since where a block ends can't be foreseen, and a processor
that guesses wrong loses more than a step takes. All that a walk is to know is in two numbers, so that those
of three images stay in registers. (What lost: two images, with a branch where a block ends, 0.75 of the
speed; more numbers for each, 0.85; three steps from one word, 0.9; four images, 0.95.)

    state   bits 0-7 the coefficient that is next (0: the block's DC), bits 9-31 the table to look it up in,
            bits 32-63 the block's row in `turns`, which has the state to begin the next block with
    moved   bits 0-13 how many bits further than at the start of the round, bits 14-31 how many blocks

An entry of a table is what a step adds: to `moved` its low 6 bits, how many bits to step over, and bit 14,
END, the end of a block; to `state`, from bit 6 on, the number of coefficients, END, and SWITCH from a DC
table to the AC table behind it. Arrays are read by their addresses: numba counts the references of an array,
atomically, for each function that is given one, which takes as long as a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.compiled import compiled

LOOK = 11  # bits; with 12, the tables are larger than what the first-level cache has for three images
ENTRIES = 1 << LOOK
LONGEST = 22  # bits of one step, so that two fit into a word: 2 * 22 + 11 <= 57
CODES = 51 + 256  # numbers of a Huffman table: see entropy._huffman
# Counts of coefficients, in bits 6 and up of an entry:
ALONE = 192  # no code, or one that is too long for the table: it is looked up alone
END = 1 << 8  # the block ends there
SWITCH = 1 << 9  # the AC table comes next
ROUND = 120  # strides of two steps without a look at the end
ROOM = 1024  # bytes behind the last image that a walk may still read: three steps of 31 bits a stride
SOUND, UNSURE = 0, 1
LANES = 3  # images that are walked at once
NONE = -2

u64 = np.uint64


def _peek(bits: int, swapped: bool = False) -> Any:
    """The number of so many bits at an address; swapped: its first byte on top."""

    def peek(context, address):
        def code(context, builder, signature, arguments):
            value = builder.load(builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer()))
            value.align = 1
            if swapped:
                return builder.bswap(value)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.uint64(types.uint64), code

    return intrinsic(peek)


def _address_of(context, array):
    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.uint64(array), code


def _put(context, address, value):
    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(builder.bswap(arguments[1]), place).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), code


word_at, _number, _int, _entry = _peek(64, swapped=True), _peek(64), _peek(32), _peek(16)


def _if_rare(context, value):
    """Whether a number isn't 0; what it leads to is kept out of the way of the rest."""

    def code(context, builder, signature, arguments):
        bit = ir.IntType(1)
        found = builder.icmp_unsigned("!=", arguments[0], ir.Constant(ir.IntType(64), 0))
        expect = builder.module.declare_intrinsic("llvm.expect", [bit], ir.FunctionType(bit, [bit, bit]))
        return builder.call(expect, [found, ir.Constant(bit, 0)])

    return types.boolean(types.uint64), code


def _one_of(context, which, yes, no):
    """`yes` if `which` isn't 0, else `no`, without a branch."""

    def code(context, builder, signature, arguments):
        condition = builder.icmp_unsigned("!=", arguments[0], ir.Constant(ir.IntType(64), 0))
        chosen = builder.select(condition, arguments[1], arguments[2])
        chosen.set_metadata("unpredictable", builder.module.add_metadata([]))
        return chosen

    return types.uint64(types.uint64, types.uint64, types.uint64), code


address: Any = intrinsic(_address_of)
put_word: Any = intrinsic(_put)
_rare: Any = intrinsic(_if_rare)
_chosen: Any = intrinsic(_one_of)


@compiled()
def walk(stream, tables, codes, origins, turns, jobs, verdicts):
    """Walk all jobs, three at a time, and write down whether they lead to their ends.

    Args:
        stream: uint8, the codes of all images, without stuffed zeros, and ROOM bytes.
        tables: uint16 [T * ENTRIES], for each of T tables its steps; codes, origins: see entropy._Workspace.
        turns: uint64, of each block of a unit the state to begin the next with; the last row leads nowhere.
        jobs: int64 [J, 5]: image, first and last byte + 1 in `stream`, blocks, first state.
        verdicts: uint8 [J], filled with SOUND or UNSURE.
    """
    at = address(stream), address(tables), address(turns), address(codes), address(origins)
    lane_jobs, lefts = np.full(LANES, -1, np.int64), np.zeros(LANES, np.int64)
    states, starts, lasts, moved = np.zeros((4, LANES), np.uint64)
    next_job = strides = 0
    while True:
        for lane in range(LANES):
            stuck = strides > 0 and moved[lane] == u64(0)
            while lane_jobs[lane] != NONE and (lefts[lane] < 2 or starts[lane] > lasts[lane] or stuck):
                if lane_jobs[lane] >= 0:
                    end = _end(states[lane], starts[lane], lasts[lane], lefts[lane], at)
                    verdicts[lane_jobs[lane]] = end
                job, stuck = next_job if next_job < len(jobs) else NONE, False
                lane_jobs[lane] = job
                if job == NONE:  # a place where no step leads anywhere
                    states[lane], starts[lane], lefts[lane] = turns[len(turns) - 1], u64(8) * at[0], 1 << 40
                else:
                    states[lane], lefts[lane] = u64(jobs[job, 4]), jobs[job, 3]
                    starts[lane] = u64(8) * (at[0] + u64(jobs[job, 1]))
                    lasts[lane] = u64(8) * (at[0] + u64(jobs[job, 2]))
                    next_job += 1
        if lane_jobs.max() < 0:
            return
        strides = min(
            lefts.min() - 1, ROUND
        )  # a block has two steps at least: none begins more than are left
        _walk_on(states, starts, moved, strides, at)
        for lane in range(LANES):
            starts[lane] += moved[lane] & u64(0x3FFF)
            lefts[lane] -= np.int64(moved[lane] >> u64(14))


@compiled()
def _walk_on(states, starts, moved, strides, at):
    state_a, state_b, state_c = states[0], states[1], states[2]
    start_a, start_b, start_c = starts[0], starts[1], starts[2]
    moved_a = moved_b = moved_c = u64(0)
    word_a, word_b, word_c = _look(start_a), _look(start_b), _look(start_c)
    for _ in range(strides):
        state_a, moved_a, word_a = _stride(state_a, moved_a, word_a, start_a, at)
        state_b, moved_b, word_b = _stride(state_b, moved_b, word_b, start_b, at)
        state_c, moved_c, word_c = _stride(state_c, moved_c, word_c, start_c, at)
    states[0], states[1], states[2] = state_a, state_b, state_c
    moved[0], moved[1], moved[2] = moved_a, moved_b, moved_c


@compiled(inline="always")
def _look(position):
    """The next 57 bits or more from a position (an address in bits), on top of a word."""
    return word_at(position >> u64(3)) << (position & u64(7))


@compiled(inline="always")
def _step(state, word, ahead, position, at):
    """(state, word, how far it moved) behind a step; `ahead` is the word that becomes the next by a shift."""
    _, tables, turns, codes, origins = at
    table = tables + ((state & u64(0xFFFFFE00)) << u64(LOOK + 1 - 9))
    entry = _entry(table + ((word >> u64(63 - LOOK)) & ~u64(1)))
    after = state + (entry >> u64(6))
    if _rare(after & u64(0xC0)):
        entry = _rare_step(state, entry, position, codes, origins)
        after = state + (entry >> u64(6))
        ahead = _look(position + (entry & u64(63)))
    else:
        ahead = ahead << (entry & u64(63))
    begin_next = _number(turns + ((state >> u64(32)) << u64(3)))
    return _chosen(after & u64(END), begin_next, after), ahead, entry & u64(0x403F)


@compiled(inline="always")
def _stride(state, moved, word, start, at):
    """Two steps. The next stride's word is fetched while the second is looked up, and only shifted then."""
    state, word, first = _step(state, word, word, start + (moved & u64(0x3FFF)), at)
    moved += first
    position = start + (moved & u64(0x3FFF))
    state, word, second = _step(state, word, _look(position), position, at)
    return state, moved + second, word


@compiled()
def _rare_step(state, entry, position, codes, origins):
    """The entry of a step that ends a block by its last coefficient, or that is over one code alone; 0, which
    moves nowhere, if there is no such code or the block has too many coefficients."""
    k, count = state & u64(0xFF), entry >> u64(6)
    if k + count == u64(64):
        return (entry & u64(63)) | u64(END << 6)
    table = (state & u64(0xFFFFFFFF)) >> u64(9)
    code = codes + _number(origins + (table << u64(3))) * u64(4 * CODES)
    word = _look(position)
    for length in range(u64(1), u64(17)):
        number = word >> (u64(64) - length)
        first = _int(code + u64(4) * length)
        if first <= number and number < _int(code + u64(4) * (u64(17) + length)):
            place = _int(code + u64(4) * (u64(34) + length)) + number - first
            symbol = _int(code + u64(4) * (u64(51) + place))
            bits, count = symbol & u64(15), (symbol >> u64(4)) + u64(1)
            if k == u64(0):
                count = u64(1 + SWITCH)
            elif (bits == u64(0) and count != u64(16)) or k + count == u64(64):
                count = u64(END)
            elif k + count > u64(64):
                return u64(0)
            return (count << u64(6)) | (length + bits)
    return u64(0)


@compiled()
def _end(state, position, last, left, at):
    """Walk what is left, and say whether it leads to the last byte."""
    while left > 0 and position <= last:
        word = _look(position)
        state, _, moved = _step(state, word, word, position, at)
        if moved == u64(0):
            return UNSURE
        position, left = position + (moved & u64(0x3FFF)), left - np.int64(moved >> u64(14))
    return SOUND if position <= last < position + u64(8) else UNSURE
