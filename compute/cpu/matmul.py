"""Matrix products of packed weights with float32 activations.

One rule for the order of every sum, whatever the number of rows: within a block, inputs 0 to 15
are one chain of fused multiply-adds and inputs 16 to 31 another; then the block's scale; then the
next block. So a row's result is the same bits alone, in a batch, or within a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from compute.cpu.jit import callback, inner, inner_of
from compute.cpu.layout import (
    BF16,
    BLOCK_BYTES,
    F16,
    F32,
    Q4_BYTES,
    Q4H,
    Q4S,
    Q8_BYTES,
    Q8H,
    Q8S,
)
from compute.cpu.vector import (
    add,
    fma,
    load,
    load_bfloat,
    load_half,
    load_high_nibbles,
    load_int8,
    load_low_nibbles,
    load_one,
    operation,
    prefetch,
    splat,
    store,
)

ZERO = np.float32(0)
ROW_BLOCK = 96  # rows for which a block of weights is unpacked once; their data fits the L1 cache
UNPACKED_BYTES = 4096
_AHEAD_BYTES = 4096  # a page: where the processor's own prefetcher stops


def _scaling(kind: int) -> Any:
    """How a block's two chains join 16 outputs; ``half`` says which 16 of the tile.

    ``sums`` is the address of the two sums of the row's inputs, 16 each.
    """

    @inner_of(kind)
    def four_bit(block: Any, half: Any, a: Any, b: Any, y: Any, sums: Any) -> Any:
        s = splat(load_one(sums) + load_one(sums + 4))
        if kind == Q4H:
            at = block + Q4_BYTES + half * 32
            return fma(load_half(at + 64), s, fma(load_half(at), add(a, b), y))
        at = block + Q4_BYTES + half * 64
        return fma(load(at + 128), s, fma(load(at), add(a, b), y))

    @inner_of(kind)
    def eight_bit(block: Any, half: Any, a: Any, b: Any, y: Any, sums: Any) -> Any:
        return fma(load_half(block + Q8_BYTES + half * 32), add(a, b), y)

    @inner_of(kind)
    def eight_bit_by_16(block: Any, half: Any, a: Any, b: Any, y: Any, sums: Any) -> Any:
        at = block + Q8_BYTES + half * 64
        y = fma(load(at + 128), b, fma(load(at), a, y))
        y = fma(load(at + 256), splat(load_one(sums)), y)
        return fma(load(at + 384), splat(load_one(sums + 4)), y)

    @inner_of(kind)
    def unscaled(block: Any, half: Any, a: Any, b: Any, y: Any, sums: Any) -> Any:
        return add(add(a, b), y)

    special = {Q4H: four_bit, Q4S: four_bit, Q8H: eight_bit, Q8S: eight_bit_by_16}
    return special.get(kind, unscaled)


def _numbers(kind: int, element_bytes: int, read: Callable[[Any], Any]) -> Any:
    """Reader of 16 numbers of input j of a block, for kinds with a number an element."""

    @inner_of(kind)
    def numbers(block: Any, j: Any, half: Any) -> Any:
        return read(block + (j * 32 + half * 16) * element_bytes)

    return numbers


@inner
def _nibbles(block: Any, j: Any, half: Any) -> Any:
    if j < 16:
        return load_low_nibbles(block + j * 32 + half * 16)
    return load_high_nibbles(block + (j - 16) * 32 + half * 16)


def _row_product(kind: int, numbers: Any, scaled: Any) -> Any:
    """The kernel for one row: every weight goes from memory to its product, once."""
    step_bytes = BLOCK_BYTES[kind] // 16
    block_bytes = BLOCK_BYTES[kind]
    lines = -(-step_bytes // 64)

    @inner_of(kind)
    def product(tile: Any, groups: Any, x: Any, sums: Any, y: Any, y0: Any, y1: Any) -> None:
        for g in range(groups):
            block = tile + g * block_bytes
            xg = x + g * 128
            a0 = splat(ZERO)
            a1 = splat(ZERO)
            b0 = splat(ZERO)
            b1 = splat(ZERO)
            for j in range(16):
                for line in range(lines):
                    prefetch(block + _AHEAD_BYTES + j * step_bytes + line * 64)
                low = splat(load_one(xg + j * 4))
                high = splat(load_one(xg + j * 4 + 64))
                a0 = fma(numbers(block, j, 0), low, a0)
                a1 = fma(numbers(block, j, 1), low, a1)
                b0 = fma(numbers(block, j + 16, 0), high, b0)
                b1 = fma(numbers(block, j + 16, 1), high, b1)
            y0 = scaled(block, 0, a0, b0, y0, sums + g * 8)
            y1 = scaled(block, 1, a1, b1, y1, sums + g * 8)
        store(y, y0)
        store(y + 64, y1)

    return product


def _unpack(kind: int, numbers: Any) -> Any:
    @inner_of(kind)
    def unpack(block: Any, out: Any) -> None:
        for j in range(16):
            store(out + j * 128, numbers(block, j, 0))
            store(out + j * 128 + 64, numbers(block, j, 1))
            store(out + j * 128 + 2048, numbers(block, j + 16, 0))
            store(out + j * 128 + 2112, numbers(block, j + 16, 1))

    return unpack


@inner
def _bias(bias: Any, tile: Any, half: Any) -> Any:
    if bias == 0:
        return splat(ZERO)
    return load(bias + tile * 128 + half * 64)


def _six_rows(kind: int, scaled: Any) -> Any:
    """Adds one block's share to 6 rows of a tile: 6 x 16 accumulators fit any register file."""

    @inner_of(kind)
    def six_rows(block: Any, w: Any, x: Any, sums: Any, y: Any) -> None:
        for half in range(2):
            wh = w + half * 64
            a0 = splat(ZERO)
            a1 = splat(ZERO)
            a2 = splat(ZERO)
            a3 = splat(ZERO)
            a4 = splat(ZERO)
            a5 = splat(ZERO)
            for j in range(16):
                v = load(wh + j * 128)
                xj = x + j * 4
                a0 = fma(v, splat(load_one(xj)), a0)
                a1 = fma(v, splat(load_one(xj + 128)), a1)
                a2 = fma(v, splat(load_one(xj + 256)), a2)
                a3 = fma(v, splat(load_one(xj + 384)), a3)
                a4 = fma(v, splat(load_one(xj + 512)), a4)
                a5 = fma(v, splat(load_one(xj + 640)), a5)
            b0 = splat(ZERO)
            b1 = splat(ZERO)
            b2 = splat(ZERO)
            b3 = splat(ZERO)
            b4 = splat(ZERO)
            b5 = splat(ZERO)
            for j in range(16, 32):
                v = load(wh + j * 128)
                xj = x + j * 4
                b0 = fma(v, splat(load_one(xj)), b0)
                b1 = fma(v, splat(load_one(xj + 128)), b1)
                b2 = fma(v, splat(load_one(xj + 256)), b2)
                b3 = fma(v, splat(load_one(xj + 384)), b3)
                b4 = fma(v, splat(load_one(xj + 512)), b4)
                b5 = fma(v, splat(load_one(xj + 640)), b5)
            yh = y + half * 64
            store(yh, scaled(block, half, a0, b0, load(yh), sums))
            store(yh + 128, scaled(block, half, a1, b1, load(yh + 128), sums + 8))
            store(yh + 256, scaled(block, half, a2, b2, load(yh + 256), sums + 16))
            store(yh + 384, scaled(block, half, a3, b3, load(yh + 384), sums + 24))
            store(yh + 512, scaled(block, half, a4, b4, load(yh + 512), sums + 32))
            store(yh + 640, scaled(block, half, a5, b5, load(yh + 640), sums + 40))

    return six_rows


def _two_rows(kind: int, scaled: Any) -> Any:
    """Adds one block's share to 2 rows of a tile: for small batches, and what is left of sixes."""

    @inner_of(kind)
    def two_rows(block: Any, w: Any, x: Any, sums: Any, y: Any) -> None:
        for half in range(2):
            wh = w + half * 64
            a0 = splat(ZERO)
            a1 = splat(ZERO)
            b0 = splat(ZERO)
            b1 = splat(ZERO)
            for j in range(16):
                xj = x + j * 4
                low = load(wh + j * 128)
                high = load(wh + j * 128 + 2048)
                a0 = fma(low, splat(load_one(xj)), a0)
                a1 = fma(low, splat(load_one(xj + 128)), a1)
                b0 = fma(high, splat(load_one(xj + 64)), b0)
                b1 = fma(high, splat(load_one(xj + 192)), b1)
            yh = y + half * 64
            store(yh, scaled(block, half, a0, b0, load(yh), sums))
            store(yh + 128, scaled(block, half, a1, b1, load(yh + 128), sums + 8))

    return two_rows


def _single_row(kind: int, scaled: Any) -> Any:
    """Adds one block's share to a row that is left over."""

    @inner_of(kind)
    def single_row(block: Any, w: Any, x: Any, sums: Any, y: Any) -> None:
        a0 = splat(ZERO)
        a1 = splat(ZERO)
        b0 = splat(ZERO)
        b1 = splat(ZERO)
        for j in range(16):
            low = splat(load_one(x + j * 4))
            high = splat(load_one(x + j * 4 + 64))
            a0 = fma(load(w + j * 128), low, a0)
            a1 = fma(load(w + j * 128 + 64), low, a1)
            b0 = fma(load(w + j * 128 + 2048), high, b0)
            b1 = fma(load(w + j * 128 + 2112), high, b1)
        store(y, scaled(block, 0, a0, b0, load(y), sums))
        store(y + 64, scaled(block, 1, a1, b1, load(y + 64), sums))

    return single_row


def _tile_product(kind: int, numbers: Any) -> Any:
    """The kernel of one kind: the 32 outputs of a tile, for any number of rows."""
    scaled = _scaling(kind)
    one_row = _row_product(kind, numbers, scaled)
    unpack, six_rows = _unpack(kind, numbers), _six_rows(kind, scaled)
    two_rows, single_row = _two_rows(kind, scaled), _single_row(kind, scaled)
    block_bytes, is_float = BLOCK_BYTES[kind], kind == F32

    @inner_of(kind)
    def product(
        matrix: Any,
        bias: Any,
        groups: Any,
        tile: Any,
        x: Any,
        sums: Any,
        y: Any,
        rows: Any,
        scratch: Any,
    ) -> None:
        first = matrix + tile * groups * block_bytes
        if rows == 1:
            one_row(first, groups, x, sums, y, _bias(bias, tile, 0), _bias(bias, tile, 1))
            return
        for row in range(rows):
            store(y + row * 128, _bias(bias, tile, 0))
            store(y + row * 128 + 64, _bias(bias, tile, 1))
        for start in range(0, rows, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, rows)
            for g in range(groups):
                block = first + g * block_bytes
                for line in range(0, block_bytes, 64):
                    prefetch(block + block_bytes + line)
                w = scratch
                if is_float:
                    w = block
                else:
                    unpack(block, scratch)
                row = start
                while row + 6 <= stop:
                    at = g * rows + row
                    six_rows(block, w, x + at * 128, sums + at * 8, y + row * 128)
                    row += 6
                while row + 2 <= stop:
                    at = g * rows + row
                    two_rows(block, w, x + at * 128, sums + at * 8, y + row * 128)
                    row += 2
                if row < stop:
                    at = g * rows + row
                    single_row(block, w, x + at * 128, sums + at * 8, y + row * 128)

    return product


_f32 = _tile_product(F32, _numbers(F32, 4, load))
_f16 = _tile_product(F16, _numbers(F16, 2, load_half))
_bf16 = _tile_product(BF16, _numbers(BF16, 2, load_bfloat))
_q4h = _tile_product(Q4H, _nibbles)
_q8h = _tile_product(Q8H, _numbers(Q8H, 1, load_int8))
_q4s = _tile_product(Q4S, _nibbles)
_q8s = _tile_product(Q8S, _numbers(Q8S, 1, load_int8))


# One function a kind, because the compiler's cache goes by name.
def _tile_f32(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _f32(m, b, g, n, x, s, y, r, w)


def _tile_f16(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _f16(m, b, g, n, x, s, y, r, w)


def _tile_bf16(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _bf16(m, b, g, n, x, s, y, r, w)


def _tile_q4h(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _q4h(m, b, g, n, x, s, y, r, w)


def _tile_q8h(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _q8h(m, b, g, n, x, s, y, r, w)


def _tile_q4s(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _q4s(m, b, g, n, x, s, y, r, w)


def _tile_q8s(m: int, b: int, g: int, n: int, x: int, s: int, y: int, r: int, w: int) -> None:
    _q8s(m, b, g, n, x, s, y, r, w)


_TILES = {
    F32: _tile_f32,
    F16: _tile_f16,
    BF16: _tile_bf16,
    Q4H: _tile_q4h,
    Q8H: _tile_q8h,
    Q4S: _tile_q4s,
    Q8S: _tile_q8s,
}


@cache
def _compiled(kind: int) -> Any:
    return callback(_TILES[kind], num_arguments=9)


def tile_function(kind: int) -> int:
    """Address of the kernel of a kind, for :func:`multiply_tile`; compiled when first asked for.

    Kernels are separate machine code behind pointers: a model compiles only the kinds it has.
    """
    return int(_compiled(kind).address)


@operation(types.void, *[types.int64] * 10)
def multiply_tile(builder: Any, function: Any, *arguments: Any) -> Any:
    """The 32 outputs of one tile for all rows.

    Args:
        function: see :func:`tile_function`.
        matrix: address of the packed matrix.
        bias: address of float32 (padded outputs,), or 0.
        groups: groups of 32 inputs.
        tile: which tile.
        x: address of float32 (groups, rows, 32); padding inputs are 0.
        sums: address of float32 (groups, rows, 2): sums of each 16 inputs.
        y: address of float32 (rows, 32), written.
        rows: how many.
        scratch: address of ``UNPACKED_BYTES`` of this thread.
    """
    word = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [word] * len(arguments))
    builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)
