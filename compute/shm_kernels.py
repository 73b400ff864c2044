"""Collectives in memory that several processes map: counters, slots, and the waits between.

Layout, in lines of 128 bytes so that no two writers share a cache line::

    LOST                                    first rank reported lost, plus one
    of every rank: POSTED, SUMMED           number of the last operation it has posted, has summed
                   WHAT                     what it posted: two words, by parity of the number
                   FACTS                    pid; 1 when it has left
    of every pair (from, to): SENT, TAKEN   pieces put into and taken out of its channel
    of every rank: two slots of SLOT_BYTES  by parity of the operation's number
    of every pair: PIECES of PIECE_BYTES    the channel

Operations are numbered alike on all ranks; a long one is cut into several. Posting number n says
that all reading of n - 1 is over, so the slot of n - 2 may be written again. An operation that
does not end within a slice of time returns whom it waits for and is called again: what it has
done is kept in ``state``. Only this module knows addresses; those here are plain integers.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from llvmlite import ir
from numba import types

from compute.cpu.jit import entry, inner
from compute.cpu.sync import give_way, read
from compute.cpu.vector import add, external, load, load_long, load_one, operation, store, store_one

LINE = 128
LINES_A_RANK = 4
POSTED, SUMMED, WHAT, FACTS = range(LINES_A_RANK)
SLOT_BYTES = 128 * 1024
PIECE_BYTES = 64 * 1024
PIECES = 4
ONE_SHOT_BYTES = 16 * 1024

# What an operation returns instead of the rank (>= 0) it still waits for.
DONE, LOST, MISMATCH = -1, -2, -3

# Words of ``state``.
NUMBER, AT, PHASE, WHO, CLOCK = range(5)  # CLOCK takes two
STATE_WORDS = 7

# What is posted: the kind above, the bytes below.
KIND_SHIFT = 48
REDUCE, GATHER, BROADCAST = 1, 2, 3

_YIELD_NS = 1_000_000
_NAP_US = 30
_LONG = ir.IntType(64)
_INT = ir.IntType(32)


@operation(types.void, types.int64, types.int64)
def write(builder: Any, address: Any, value: Any) -> Any:
    """Set the word at an address; whoever reads it sees what was written before."""
    builder.store_atomic(value, builder.inttoptr(address, _LONG.as_pointer()), "release", 8)


@operation(types.void, types.int64, types.int64, types.int64)
def copy(builder: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """Copy bytes between areas that do not overlap."""
    byte = ir.IntType(8).as_pointer()
    function = external(builder, "memcpy", byte, byte, byte, _LONG)
    pointers = [builder.inttoptr(address, byte) for address in (target, source)]
    builder.call(function, [*pointers, num_bytes])


@operation(types.int64, types.int64)
def clock_ns(builder: Any, scratch: Any) -> Any:
    """Steady time in nanoseconds; ``scratch`` is the address of two free words."""
    if sys.platform == "win32":
        ticks = builder.call(external(builder, "GetTickCount64", _LONG), [])
        return builder.mul(ticks, _LONG(1_000_000))
    monotonic = 6 if sys.platform == "darwin" else 1
    words = builder.inttoptr(scratch, _LONG.as_pointer())
    function = external(builder, "clock_gettime", _INT, _INT, _LONG.as_pointer())
    builder.call(function, [_INT(monotonic), words])
    seconds = builder.load(words)
    nanoseconds = builder.load(builder.gep(words, [_INT(1)]))
    return builder.add(builder.mul(seconds, _LONG(1_000_000_000)), nanoseconds)


@operation(types.void, types.int64)
def _nap(builder: Any, microseconds: Any) -> Any:
    """Sleep shortly."""
    if sys.platform == "win32":
        builder.call(external(builder, "Sleep", ir.VoidType(), _INT), [_INT(1)])
        return
    short = builder.trunc(microseconds, _INT)
    builder.call(external(builder, "usleep", _INT, _INT), [short])


def data_offset(world: int) -> int:
    """Where the slots begin."""
    lines = 1 + LINES_A_RANK * world + 2 * world * world
    return -(-lines * LINE // 4096) * 4096


def total_bytes(world: int) -> int:
    """Size of the memory of a group."""
    return data_offset(world) + 2 * world * SLOT_BYTES + world * world * PIECES * PIECE_BYTES


def line_offset(rank: int, line: int) -> int:
    """Where a rank's line is."""
    return LINE * (1 + LINES_A_RANK * rank + line)


@inner
def _line(base: Any, rank: Any, line: Any) -> Any:
    return base + LINE * (1 + LINES_A_RANK * rank + line)


@inner
def _data(base: Any, world: Any) -> Any:
    lines = 1 + LINES_A_RANK * world + 2 * world * world
    return base + (lines * LINE + 4095) // 4096 * 4096


@inner
def _slot(base: Any, world: Any, rank: Any, number: Any) -> Any:
    return _data(base, world) + (2 * rank + number % 2) * SLOT_BYTES


@inner
def _wait(base: Any, address: Any, value: Any, state: Any, spins: Any, slice_ns: Any) -> Any:
    """1 when the word at an address has come to ``value``; 0 at the end of the slice, or LOST.

    Spins first: an answer takes less than a microsecond when everybody has a core. Then lets
    others run, for there may be more ranks than cores; then naps, for a peer may be computing.
    With no spins it naps at once: the wait has been long already.
    """
    spent, until_ns, nap_ns = 0, 0, 0
    while read(address) < value:
        spent += 1
        if spent <= spins:
            continue
        if read(base) != 0:
            return LOST
        now_ns = clock_ns(state + CLOCK * 8)
        if spent == spins + 1:
            until_ns = now_ns + slice_ns
            nap_ns = now_ns + (_YIELD_NS if spins > 0 else 0)
        elif now_ns >= until_ns:
            return 0
        if now_ns < nap_ns:
            give_way(0)
        else:
            _nap(_NAP_US)
    return 1


@inner
def _wait_all(
    base: Any, world: Any, line: Any, value: Any, state: Any, spins: Any, slice_ns: Any
) -> Any:
    """DONE when the line of every rank has come to ``value``, else whom it waits for, or LOST."""
    for rank in range(world):
        came = _wait(base, _line(base, rank, line), value, state, spins, slice_ns)
        if came == LOST:
            return LOST
        if came == 0:
            return rank
    return DONE


@inner
def _word(state: Any, index: Any) -> Any:
    return load_long(state + index * 8)


@inner
def _set(state: Any, index: Any, value: Any) -> None:
    write(state + index * 8, value)


@inner
def _post(base: Any, rank: Any, number: Any, what: Any) -> None:
    write(_line(base, rank, WHAT) + number % 2 * 8, what)
    write(_line(base, rank, POSTED), number)


@inner
def _differs(base: Any, world: Any, number: Any, what: Any, state: Any) -> Any:
    """Whether somebody posted something else; remembers who."""
    for rank in range(world):
        if read(_line(base, rank, WHAT) + number % 2 * 8) != what:
            _set(state, WHO, rank)
            return True
    return False


@inner
def _sum(
    target: Any, base: Any, world: Any, number: Any, start: Any, stop: Any
) -> None:  # floats [start, stop) of all slots, in rank order
    first = _slot(base, world, 0, number)
    stride = 2 * SLOT_BYTES
    at = start
    while at + 16 <= stop:
        total = load(first + at * 4)
        for rank in range(1, world):
            total = add(total, load(first + rank * stride + at * 4))
        store(target + at * 4, total)
        at += 16
    while at < stop:
        one = load_one(first + at * 4)
        for rank in range(1, world):
            one = one + load_one(first + rank * stride + at * 4)
        store_one(target + at * 4, one)
        at += 1


@inner
def _next(state: Any, num_done: Any) -> None:
    _set(state, NUMBER, _word(state, NUMBER) + 1)
    _set(state, AT, _word(state, AT) + num_done)
    _set(state, PHASE, 0)


@entry
def all_reduce(
    base: Any, state: Any, rank: Any, world: Any, x: Any, count: Any, spins: Any, slice_ns: Any
) -> Any:
    """Sum ``count`` floats at ``x`` over the ranks.

    Few: everybody adds up everything. Many: everybody adds up one part for all, then all collect
    the parts. Either way each sum is made in rank order.
    """
    what = (REDUCE << KIND_SHIFT) + count
    while _word(state, AT) < count:
        number, at, phase = _word(state, NUMBER), _word(state, AT), _word(state, PHASE)
        num = min(count - at, SLOT_BYTES // 4)
        here = x + at * 4
        if phase == 0:
            waiting = _wait_all(base, world, POSTED, number - 1, state, spins, slice_ns)
            if waiting != DONE:
                return waiting
            copy(_slot(base, world, rank, number), here, num * 4)
            _post(base, rank, number, what)
            phase = 1
            _set(state, PHASE, phase)
        one_shot = world == 2 or num * 4 <= ONE_SHOT_BYTES
        part = (num + world - 1) // world
        part = (part + 31) // 32 * 32  # whole cache lines, so that no two ranks write one
        if phase == 1:
            waiting = _wait_all(base, world, POSTED, number, state, spins, slice_ns)
            if waiting != DONE:
                return waiting
            if _differs(base, world, number, what, state):
                return MISMATCH
            if one_shot:
                _sum(here, base, world, number, 0, num)
                _next(state, num)
                continue
            start = min(num, part * rank)
            stop = min(num, part * (rank + 1))
            _sum(_slot(base, world, rank, number), base, world, number, start, stop)
            write(_line(base, rank, SUMMED), number)
            _set(state, PHASE, 2)
        waiting = _wait_all(base, world, SUMMED, number, state, spins, slice_ns)
        if waiting != DONE:
            return waiting
        for other in range(world):
            start = min(num, part * other)
            stop = min(num, part * (other + 1))
            source = _slot(base, world, other, number) + start * 4
            copy(here + start * 4, source, (stop - start) * 4)
        _next(state, num)
    return DONE


@entry
def all_gather(
    base: Any, state: Any, rank: Any, world: Any, x: Any, outs: Any, sizes: Any, longest: Any,
    spins: Any, slice_ns: Any,
) -> Any:  # fmt: skip
    """Copy every rank's bytes to ``outs`` (addresses of words: address and size by rank).

    ``longest`` is the largest size; a group whose sizes are all 0 still meets.
    """
    what = (GATHER << KIND_SHIFT) + longest
    while _word(state, AT) < max(longest, 1):
        number, at = _word(state, NUMBER), _word(state, AT)
        if _word(state, PHASE) == 0:
            waiting = _wait_all(base, world, POSTED, number - 1, state, spins, slice_ns)
            if waiting != DONE:
                return waiting
            num = min(_word(sizes, rank) - at, SLOT_BYTES)
            if num > 0:
                copy(_slot(base, world, rank, number), x + at, num)
            _post(base, rank, number, what)
            _set(state, PHASE, 1)
        waiting = _wait_all(base, world, POSTED, number, state, spins, slice_ns)
        if waiting != DONE:
            return waiting
        if _differs(base, world, number, what, state):
            return MISMATCH
        for other in range(world):
            num = min(_word(sizes, other) - at, SLOT_BYTES)
            if num > 0:
                copy(_word(outs, other) + at, _slot(base, world, other, number), num)
        _next(state, SLOT_BYTES)
    return DONE


@entry
def broadcast(
    base: Any, state: Any, rank: Any, world: Any, x: Any, size: Any, root: Any, spins: Any,
    slice_ns: Any,
) -> Any:  # fmt: skip
    """Copy ``size`` bytes at the root's ``x`` to everybody's."""
    what = (BROADCAST << KIND_SHIFT) + size * world + root
    while _word(state, AT) < max(size, 1):
        number, at = _word(state, NUMBER), _word(state, AT)
        num = min(size - at, SLOT_BYTES)
        slot = _slot(base, world, root, number)
        if _word(state, PHASE) == 0:
            waiting = _wait_all(base, world, POSTED, number - 1, state, spins, slice_ns)
            if waiting != DONE:
                return waiting
            if rank == root:
                copy(slot, x + at, num)
            _post(base, rank, number, what)
            _set(state, PHASE, 1)
        if rank != root:
            line = _line(base, root, POSTED)
            came = _wait(base, line, number, state, spins, slice_ns)
            if came != 1:
                return root if came == 0 else LOST
            if read(_line(base, root, WHAT) + number % 2 * 8) != what:
                _set(state, WHO, root)
                return MISMATCH
            copy(x + at, slot, num)
        _next(state, num if num > 0 else 1)
    return DONE


@inner
def _pair(base: Any, world: Any, source: Any, to: Any) -> Any:
    return base + LINE * (1 + LINES_A_RANK * world + 2 * (source * world + to))


@inner
def _piece(base: Any, world: Any, source: Any, to: Any, piece: Any) -> Any:
    channels = _data(base, world) + 2 * world * SLOT_BYTES
    return channels + ((source * world + to) * PIECES + piece % PIECES) * PIECE_BYTES


_ROOM = PIECE_BYTES - 64  # a piece begins with the size of its whole message


@entry
def send(
    base: Any, state: Any, rank: Any, world: Any, x: Any, size: Any, to: Any, spins: Any,
    slice_ns: Any,
) -> Any:  # fmt: skip
    """Put ``size`` bytes at ``x`` into the channel to a rank."""
    sent = _pair(base, world, rank, to)
    while _word(state, AT) < max(size, 1):
        at = _word(state, AT)
        number = read(sent)
        came = _wait(base, sent + LINE, number - PIECES + 1, state, spins, slice_ns)
        if came != 1:
            return to if came == 0 else LOST
        piece = _piece(base, world, rank, to, number)
        write(piece, size)
        copy(piece + 64, x + at, max(min(size - at, _ROOM), 0))
        write(sent, number + 1)
        _set(state, AT, at + _ROOM)
    return DONE


@entry
def receive(
    base: Any, state: Any, rank: Any, world: Any, x: Any, size: Any, source: Any, spins: Any,
    slice_ns: Any,
) -> Any:  # fmt: skip
    """Take ``size`` bytes out of the channel from a rank."""
    sent = _pair(base, world, source, rank)
    while _word(state, AT) < max(size, 1):
        at = _word(state, AT)
        number = read(sent + LINE)
        came = _wait(base, sent, number + 1, state, spins, slice_ns)
        if came != 1:
            return source if came == 0 else LOST
        piece = _piece(base, world, source, rank, number)
        if load_long(piece) != size:
            _set(state, WHO, source)
            return MISMATCH
        copy(x + at, piece + 64, max(min(size - at, _ROOM), 0))
        write(sent + LINE, number + 1)
        _set(state, AT, at + _ROOM)
    return DONE


def compile_all() -> None:
    """Compile the entries, or find them compiled: so that no operation has to."""
    for kernel in (all_reduce, all_gather, broadcast, send, receive):
        compiled: Any = kernel
        compiled.compile((types.int64,) * len(inspect.signature(compiled.py_func).parameters))
