"""Matrix products as phases that threads share, and the gated MLP made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.functions import exp, tanh
from compute.cpu.jit import inner
from compute.cpu.matmul import UNPACKED_BYTES, multiply_tile
from compute.cpu.sync import finish, join, take
from compute.cpu.vector import (
    add,
    div,
    load,
    mul,
    splat,
    store,
    store_one,
    sub,
    total,
)

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
SQRT_2_BY_PI, GELU_CUBE = np.float32(0.7978845608028654), np.float32(0.044715)
_ITEMS_A_THREAD = 4  # so that a thread that lost its core for a while delays the others little


@inner
def tiles_an_item(tiles: Any, rows: Any, threads: Any) -> Any:
    """Tiles in one item of work: few items for one row, single tiles for many."""
    if rows > 8:
        return 1
    if threads == 1:
        return tiles
    return max(1, tiles // (_ITEMS_A_THREAD * threads))


@inner
def multiply(matrix: Any, tile: Any, x: Any, sums: Any, y: Any, rows: Any, scratch: Any) -> None:
    """One tile of a matrix of ``matrices``; ``y`` is where the first tile's outputs go."""
    multiply_tile(
        matrix[t.FUNCTION],
        matrix[t.ADDRESS],
        matrix[t.BIAS],
        matrix[t.GROUPS],
        tile,
        x,
        sums,
        y + tile * rows * 128,
        rows,
        scratch,
    )


@inner
def product(
    step: Any, matrix: Any, x: Any, sums: Any, y: Any, rows: Any, phase: Any, scratch: Any
) -> None:
    """One whole matrix as a phase."""
    tiles = matrix[t.TILES]
    chunk = tiles_an_item(tiles, rows, step[t.NUM_THREADS])
    items = (tiles + chunk - 1) // chunk
    item = take(step[t.COUNTERS], phase)
    while item < items:
        for tile in range(item * chunk, min(item * chunk + chunk, tiles)):
            multiply(matrix, tile, x, sums, y, rows, scratch)
        finish(step[t.COUNTERS], phase)
        item = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, items)


@inner
def _activate(x: Any, uses_gelu: Any) -> Any:
    """SiLU, or GELU in its tanh form."""
    if uses_gelu:
        cube = mul(mul(mul(x, x), x), splat(GELU_CUBE))
        u = mul(add(x, cube), splat(SQRT_2_BY_PI))
        return mul(mul(x, splat(HALF)), add(splat(ONE), tanh(u)))
    return div(x, add(splat(ONE), exp(sub(splat(ZERO), x))))


@inner
def gate_tile(
    gate: Any,
    up: Any,
    uses_gelu: Any,
    tile: Any,
    x: Any,
    sums: Any,
    y: Any,
    y_sums: Any,
    rows: Any,
    scratch: Any,
) -> None:
    """One tile of ``act(gate) * up`` with its sums; the gate is kept behind the unpacked block."""
    held = scratch + UNPACKED_BYTES
    out = y + tile * rows * 128
    multiply(gate, tile, x, sums, held - tile * rows * 128, rows, scratch)
    multiply(up, tile, x, sums, y, rows, scratch)
    for n in range(rows * 2):
        v = mul(_activate(load(held + n * 64), uses_gelu), load(out + n * 64))
        store(out + n * 64, v)
        store_one(y_sums + (tile * rows * 2 + n) * 4, total(v))


@inner
def mlp(step: Any, dims: Any, matrices: Any, base: Any, phase: Any, scratch: Any) -> None:
    """Phases: gate and up, down. From the normed rows in ``X`` to ``PARTIAL``."""
    rows = step[t.NUM_ROWS]
    counters = step[t.COUNTERS]
    gate = matrices[base + t.GATE]
    up = matrices[base + t.UP]
    x = step[t.X]
    y = step[t.INNER]
    tiles = gate[t.TILES]
    chunk = tiles_an_item(tiles, rows, step[t.NUM_THREADS])
    items = (tiles + chunk - 1) // chunk
    item = take(counters, phase)
    while item < items:
        for tile in range(item * chunk, min(item * chunk + chunk, tiles)):
            gate_tile(
                gate,
                up,
                dims[t.USES_GELU],
                tile,
                x,
                step[t.X_SUMS],
                y,
                step[t.INNER_SUMS],
                rows,
                scratch,
            )
        finish(counters, phase)
        item = take(counters, phase)
    join(counters, phase, items)
    down = matrices[base + t.DOWN]
    product(step, down, y, step[t.INNER_SUMS], step[t.PARTIAL], rows, phase + 1, scratch)
