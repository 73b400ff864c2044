"""Feed-forward layers with experts: rows are sorted by expert, multiplied, and added up again.

All rows of one expert form a span and are multiplied together, so that its weights are read once.
A row adds what its experts made of it in the order of their numbers: the same bits in any batch.
How many items a phase has never depends on what was chosen, because a thread that comes late to
a phase looks at the choices of a later layer; items without work pass at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.np.numpy_support import carray

from compute.cpu import tables as t
from compute.cpu.attention import feature, load_index, sum_of
from compute.cpu.jit import callback, inner
from compute.cpu.products import gate_tile, multiply, product, tiles_an_item
from compute.cpu.routing import choose, gather_choices
from compute.cpu.sync import finish, join, take
from compute.cpu.vector import fma, load, load_one, operation, pointer, splat, store, store_one

ZERO = np.float32(0)


@inner
def _max_spans(step: Any, dims: Any) -> Any:
    return min(dims[t.NUM_EXPERTS_HERE], step[t.NUM_ROWS] * dims[t.NUM_ACTIVE])


@inner
def _route(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    layer: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """Phases: logits, choices, choices by expert."""
    rows = step[t.NUM_ROWS]
    counters = step[t.COUNTERS]
    active = dims[t.NUM_ACTIVE]
    router = matrices[layer * t.MATRICES_A_LAYER + t.ROUTER]
    product(step, router, step[t.X], step[t.X_SUMS], step[t.ROUTED], rows, phase, scratch)
    row = take(counters, phase + 1)
    while row < rows:
        choose(
            dims,
            reals,
            step[t.ROUTED],
            rows,
            row,
            layers[layer, t.SCORE_BIAS],
            step[t.CHOSEN] + row * active * 8,
            step[t.FACTORS] + row * active * 4,
            scratch,
        )
        finish(counters, phase + 1)
        row = take(counters, phase + 1)
    join(counters, phase + 1, rows)
    if take(counters, phase + 2) == 0:
        gather_choices(step, dims)
        finish(counters, phase + 2)
    join(counters, phase + 2, 1)


@inner
def _copy_span(step: Any, dims: Any, span: Any) -> None:
    """The inputs of an expert's rows, side by side."""
    rows = step[t.NUM_ROWS]
    width = (dims[t.HIDDEN] + 31) // 32 * 32
    start = load_index(step[t.SPAN_STARTS], span)
    num_rows = load_index(step[t.SPAN_STARTS], span + 1) - start
    x = step[t.EXPERT_X] + start * width * 4
    sums = step[t.EXPERT_X_SUMS] + start * (width // 4)
    for n in range(num_rows):
        row = load_index(step[t.PAIR_ROWS], start + n)
        for i in range(0, width, 16):
            store(feature(x, num_rows, n, i), load(feature(step[t.X], rows, row, i)))
            here = sum_of(step[t.X_SUMS], rows, row, i)
            store_one(sum_of(sums, num_rows, n, i), load_one(here))


@inner
def _gate_span_tile(
    step: Any, dims: Any, matrices: Any, first: Any, span: Any, tile: Any, scratch: Any
) -> None:
    """One tile of the inner activations of an expert's rows."""
    start = load_index(step[t.SPAN_STARTS], span)
    rows = load_index(step[t.SPAN_STARTS], span + 1) - start
    expert = first + load_index(step[t.SPAN_EXPERTS], span) * t.MATRICES_AN_EXPERT
    gate = matrices[expert + t.EXPERT_GATE]
    width = gate[t.TILES] * 32
    x = step[t.X]
    sums = step[t.X_SUMS]
    if step[t.NUM_ROWS] > 1:
        x = step[t.EXPERT_X] + start * gate[t.GROUPS] * 128
        sums = step[t.EXPERT_X_SUMS] + start * gate[t.GROUPS] * 8
    gate_tile(
        gate,
        matrices[expert + t.EXPERT_UP],
        dims[t.USES_GELU],
        tile,
        x,
        sums,
        step[t.EXPERT_INNER] + start * width * 4,
        step[t.EXPERT_INNER_SUMS] + start * (width // 4),
        rows,
        scratch,
    )


@inner
def _down_span_tile(
    step: Any, matrices: Any, first: Any, span: Any, tile: Any, scratch: Any
) -> None:
    """One tile of an expert's outputs, in place of its inputs."""
    start = load_index(step[t.SPAN_STARTS], span)
    rows = load_index(step[t.SPAN_STARTS], span + 1) - start
    expert = first + load_index(step[t.SPAN_EXPERTS], span) * t.MATRICES_AN_EXPERT
    down = matrices[expert + t.EXPERT_DOWN]
    multiply(
        down,
        tile,
        step[t.EXPERT_INNER] + start * down[t.GROUPS] * 128,
        step[t.EXPERT_INNER_SUMS] + start * down[t.GROUPS] * 8,
        step[t.EXPERT_X] + start * down[t.TILES] * 128,
        rows,
        scratch,
    )


@inner
def _combine_row(step: Any, dims: Any, has_shared: Any, row: Any) -> None:
    """A row's ``PARTIAL``: what its experts here made of it, after the shared ones."""
    rows = step[t.NUM_ROWS]
    active = dims[t.NUM_ACTIVE]
    partial = step[t.PARTIAL]
    width = (dims[t.HIDDEN] + 31) // 32 * 32
    if not has_shared:
        for i in range(0, width, 16):
            store(feature(partial, rows, row, i), splat(ZERO))
    for n in range(row * active, row * active + active):
        pair = load_index(step[t.PAIRS], n)
        if pair >= 0:
            span = load_index(step[t.PAIR_SPANS], pair)
            start = load_index(step[t.SPAN_STARTS], span)
            num_rows = load_index(step[t.SPAN_STARTS], span + 1) - start
            made = step[t.EXPERT_X] + start * width * 4
            factor = splat(load_one(step[t.FACTORS] + n * 4))
            for i in range(0, width, 16):
                at = feature(partial, rows, row, i)
                store(at, fma(load(feature(made, num_rows, pair - start, i)), factor, load(at)))


@inner
def _experts_half(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    layer: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """Phases: three of routing, inputs by expert, gate and up, down, sums."""
    _route(step, dims, reals, matrices, layers, layer, phase, scratch)
    phase += 3
    rows = step[t.NUM_ROWS]
    counters = step[t.COUNTERS]
    spans = _max_spans(step, dims)
    if rows > 1:
        span = take(counters, phase)
        while span < spans:
            if span < load_index(step[t.NUM_SPANS], 0):
                _copy_span(step, dims, span)
            finish(counters, phase)
            span = take(counters, phase)
        join(counters, phase, spans)
    first = layers[layer, t.EXPERTS]
    for down in range(2):
        phase += 1
        a_span = matrices[first + t.EXPERT_GATE, t.TILES]
        if down:
            a_span = matrices[first + t.EXPERT_DOWN, t.TILES]
        tiles = a_span * spans
        chunk = tiles_an_item(tiles, rows, step[t.NUM_THREADS])
        items = (tiles + chunk - 1) // chunk
        item = take(counters, phase)
        while item < items:
            for number in range(item * chunk, min(item * chunk + chunk, tiles)):
                span = number // a_span
                if span < load_index(step[t.NUM_SPANS], 0):
                    if down:
                        _down_span_tile(step, matrices, first, span, number % a_span, scratch)
                    else:
                        _gate_span_tile(step, dims, matrices, first, span, number % a_span, scratch)
            finish(counters, phase)
            item = take(counters, phase)
        join(counters, phase, items)
    phase += 1
    has_shared = matrices[layer * t.MATRICES_A_LAYER + t.GATE, t.TILES] > 0
    row = take(counters, phase)
    while row < rows:
        _combine_row(step, dims, has_shared, row)
        finish(counters, phase)
        row = take(counters, phase)
    join(counters, phase, rows)


def _experts(s: int, d: int, r: int, m: int, y: int, layer: int, phase: int, w: int) -> None:
    step = carray(pointer(s), (t.NUM_STEP,), np.int64)
    dims = carray(pointer(d), (t.NUM_DIMS,), np.int64)
    reals = carray(pointer(r), (t.NUM_REALS,), np.float32)
    # how many rows these two have is nothing to a kernel
    matrices = carray(pointer(m), (1, t.NUM_COLUMNS), np.int64)
    layers = carray(pointer(y), (1, t.NUM_LAYER_COLUMNS), np.int64)
    _experts_half(step, dims, reals, matrices, layers, layer, phase, w)


@cache
def _compiled() -> Any:
    return callback(_experts, num_arguments=8)


def experts_function() -> int:
    """Address of the machine code for :func:`experts_half`; compiled when first asked for."""
    return int(_compiled().address)


@operation(types.void, *[types.int64] * 9)
def _call(builder: Any, function: Any, *arguments: Any) -> Any:
    word = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [word] * len(arguments))
    builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)


@inner
def experts_half(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    layer: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """The phases of experts.

    From the normed rows in ``X`` to ``PARTIAL``, which holds the shared experts' share already.
    """
    _call(
        dims[t.EXPERTS_FUNCTION],
        step.ctypes.data,
        dims.ctypes.data,
        reals.ctypes.data,
        matrices.ctypes.data,
        layers.ctypes.data,
        layer,
        phase,
        scratch,
    )
