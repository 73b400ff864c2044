"""Matrix products of packed weights with float32 activations.

One rule for the order of every sum, whatever the number of rows: within a block, inputs 0 to 15
are one chain of fused multiply-adds and inputs 16 to 31 another; then the block's scale; then the
next block. So a row's result is the same bits alone, in a batch, or within a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from compute.cpu.jit import inner
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
    prefetch,
    splat,
    store,
)

ZERO = np.float32(0)
ROW_BLOCK = 96  # rows for which a block of weights is unpacked once; their data fits the L1 cache
UNPACKED_BYTES = 4096
_AHEAD_BYTES = 4096  # a page: where the processor's own prefetcher stops


@inner
def _scaled(kind: Any, block: Any, half: Any, a: Any, b: Any, y: Any, sums: Any) -> Any:
    """Add a block's two chains, scaled, to 16 outputs; ``half`` says which 16 of the tile.

    ``sums`` is the address of the two sums of the row's inputs, 16 each.
    """
    if kind == Q4H:
        s = splat(load_one(sums) + load_one(sums + 4))
        at = block + Q4_BYTES + half * 32
        return fma(load_half(at + 64), s, fma(load_half(at), add(a, b), y))
    if kind == Q8H:
        return fma(load_half(block + Q8_BYTES + half * 32), add(a, b), y)
    if kind == Q4S:
        s = splat(load_one(sums) + load_one(sums + 4))
        at = block + Q4_BYTES + half * 64
        return fma(load(at + 128), s, fma(load(at), add(a, b), y))
    if kind == Q8S:
        at = block + Q8_BYTES + half * 64
        y = fma(load(at + 128), b, fma(load(at), a, y))
        y = fma(load(at + 256), splat(load_one(sums)), y)
        return fma(load(at + 384), splat(load_one(sums + 4)), y)
    return add(add(a, b), y)


def _numbers(element_bytes: int, read: Callable[[Any], Any]) -> Any:
    """Reader of 16 numbers of input j of a block, for kinds with a number an element."""

    @inner
    def numbers(block: Any, j: Any, half: Any) -> Any:
        return read(block + (j * 32 + half * 16) * element_bytes)

    return numbers


@inner
def _nibbles(block: Any, j: Any, half: Any) -> Any:
    if j < 16:
        return load_low_nibbles(block + j * 32 + half * 16)
    return load_high_nibbles(block + (j - 16) * 32 + half * 16)


def _row_product(kind: int, numbers: Any) -> Any:
    """The kernel for one row: every weight goes from memory to its product, once."""
    step_bytes = BLOCK_BYTES[kind] // 16
    block_bytes = BLOCK_BYTES[kind]
    lines = -(-step_bytes // 64)

    @inner
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
            y0 = _scaled(kind, block, 0, a0, b0, y0, sums + g * 8)
            y1 = _scaled(kind, block, 1, a1, b1, y1, sums + g * 8)
        store(y, y0)
        store(y + 64, y1)

    return product


def _unpack(numbers: Any) -> Any:
    @inner
    def unpack(block: Any, out: Any) -> None:
        for j in range(16):
            store(out + j * 128, numbers(block, j, 0))
            store(out + j * 128 + 64, numbers(block, j, 1))
            store(out + j * 128 + 2048, numbers(block, j + 16, 0))
            store(out + j * 128 + 2112, numbers(block, j + 16, 1))

    return unpack


_half = _numbers(2, load_half)
_bfloat = _numbers(2, load_bfloat)
_float = _numbers(4, load)
_int8 = _numbers(1, load_int8)
_row_f32, _row_f16, _row_bf16 = (
    _row_product(F32, _float),
    _row_product(F16, _half),
    _row_product(BF16, _bfloat),
)
_row_q4h, _row_q8h = _row_product(Q4H, _nibbles), _row_product(Q8H, _int8)
_row_q4s, _row_q8s = _row_product(Q4S, _nibbles), _row_product(Q8S, _int8)
_unpack_f16, _unpack_bf16 = _unpack(_half), _unpack(_bfloat)
_unpack_q4, _unpack_q8 = _unpack(_nibbles), _unpack(_int8)


@inner
def block_bytes_of(kind: Any) -> Any:
    """Bytes of one block."""
    return BLOCK_BYTES[kind]


@inner
def _bias(bias: Any, tile: Any, half: Any) -> Any:
    if bias == 0:
        return splat(ZERO)
    return load(bias + tile * 128 + half * 64)


@inner
def _one_row(
    kind: Any, matrix: Any, bias: Any, groups: Any, tile: Any, x: Any, sums: Any, y: Any
) -> None:
    at = matrix + tile * groups * block_bytes_of(kind)
    y0 = _bias(bias, tile, 0)
    y1 = _bias(bias, tile, 1)
    if kind == Q4H:
        _row_q4h(at, groups, x, sums, y, y0, y1)
    elif kind == Q8H:
        _row_q8h(at, groups, x, sums, y, y0, y1)
    elif kind == Q4S:
        _row_q4s(at, groups, x, sums, y, y0, y1)
    elif kind == Q8S:
        _row_q8s(at, groups, x, sums, y, y0, y1)
    elif kind == BF16:
        _row_bf16(at, groups, x, sums, y, y0, y1)
    elif kind == F16:
        _row_f16(at, groups, x, sums, y, y0, y1)
    else:
        _row_f32(at, groups, x, sums, y, y0, y1)


@inner
def _unpacked(kind: Any, block: Any, scratch: Any) -> Any:
    """Address of a block's numbers as 32 x 32 float32: in ``scratch``, or where they are."""
    if kind in (Q4H, Q4S):
        _unpack_q4(block, scratch)
    elif kind in (Q8H, Q8S):
        _unpack_q8(block, scratch)
    elif kind == BF16:
        _unpack_bf16(block, scratch)
    elif kind == F16:
        _unpack_f16(block, scratch)
    else:
        return block
    return scratch


@inner
def _six_rows(kind: Any, block: Any, w: Any, x: Any, sums: Any, y: Any) -> None:
    """Add one block's share to 6 rows of a tile; 6 x 16 accumulators fit any register file."""
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
        store(yh, _scaled(kind, block, half, a0, b0, load(yh), sums))
        store(yh + 128, _scaled(kind, block, half, a1, b1, load(yh + 128), sums + 8))
        store(yh + 256, _scaled(kind, block, half, a2, b2, load(yh + 256), sums + 16))
        store(yh + 384, _scaled(kind, block, half, a3, b3, load(yh + 384), sums + 24))
        store(yh + 512, _scaled(kind, block, half, a4, b4, load(yh + 512), sums + 32))
        store(yh + 640, _scaled(kind, block, half, a5, b5, load(yh + 640), sums + 40))


@inner
def _single_row(kind: Any, block: Any, w: Any, x: Any, sums: Any, y: Any) -> None:
    """Add one block's share to a row that is left over from the sixes."""
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
    store(y, _scaled(kind, block, 0, a0, b0, load(y), sums))
    store(y + 64, _scaled(kind, block, 1, a1, b1, load(y + 64), sums))


@inner
def multiply_tile(
    kind: Any,
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
    """The 32 outputs of one tile for all rows.

    Args:
        kind, matrix, groups: the packed matrix: ``layout`` kind, address, groups a tile.
        bias: address of float32 (padded outputs,), or 0.
        x: address of float32 (groups, rows, 32); padding inputs are 0.
        sums: address of float32 (groups, rows, 2): sums of each 16 inputs.
        y: address of float32 (rows, 32), written.
        scratch: address of ``UNPACKED_BYTES`` of this thread.
    """
    if rows == 1:
        _one_row(kind, matrix, bias, groups, tile, x, sums, y)
        return
    block_bytes = block_bytes_of(kind)
    first = matrix + tile * groups * block_bytes
    for row in range(rows):
        store(y + row * 128, _bias(bias, tile, 0))
        store(y + row * 128 + 64, _bias(bias, tile, 1))
    for start in range(0, rows, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, rows)
        for g in range(groups):
            block = first + g * block_bytes
            for line in range(0, block_bytes, 64):
                prefetch(block + block_bytes + line)
            w = _unpacked(kind, block, scratch)
            row = start
            while row + 6 <= stop:
                at = g * rows + row
                _six_rows(kind, block, w, x + at * 128, sums + at * 8, y + row * 128)
                row += 6
            while row < stop:
                at = g * rows + row
                _single_row(kind, block, w, x + at * 128, sums + at * 8, y + row * 128)
                row += 1
