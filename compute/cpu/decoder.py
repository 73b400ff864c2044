"""The decoder as phases that several threads share: embedding, half layers, output.

A half (attention or MLP) reads the residual and leaves its output in ``PARTIAL``; the next part
adds it to the residual. Between the two an all-reduce may stand: where a shard holds only some
heads and some of the inner features, ``PARTIAL`` is its share of a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.attention import attend, feature, load_index, place_row, sum_of, tanh
from compute.cpu.jit import entry, inner
from compute.cpu.layout import BF16, BLOCK_BYTES, F16, F32, Q4_BYTES, Q4H, Q8_BYTES, Q8H, Q8S
from compute.cpu.matmul import UNPACKED_BYTES, multiply_tile
from compute.cpu.sync import fetch_add, finish, is_open, join, take, wait
from compute.cpu.vector import (
    add,
    div,
    exp,
    fma,
    load,
    load_bfloat_one,
    load_byte_one,
    load_half_one,
    load_one,
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
def _element(kind: Any, matrix: Any, groups: Any, row: Any, column: Any) -> Any:
    """One weight, rounded as the file's format defines it."""
    block = matrix + ((row >> 5) * groups + (column >> 5)) * BLOCK_BYTES[kind]
    lane = row & 31
    j = column & 31
    if kind == F32:
        return load_one(block + (j * 32 + lane) * 4)
    if kind == F16:
        return load_half_one(block + (j * 32 + lane) * 2)
    if kind == BF16:
        return load_bfloat_one(block + (j * 32 + lane) * 2)
    if kind in (Q8H, Q8S):
        byte = load_byte_one(block + j * 32 + lane)
        number = np.float32(byte - ((byte & 128) << 1))
        at = block + Q8_BYTES
        if kind == Q8H:
            return number * load_half_one(at + lane * 2)
        at += (j >> 4) * 128 + lane * 4
        return number * load_one(at) + load_one(at + 256)
    byte = load_byte_one(block + (j & 15) * 32 + lane)
    number = np.float32((byte >> ((j >> 4) * 4)) & 15)
    at = block + Q4_BYTES
    if kind == Q4H:
        return number * load_half_one(at + lane * 2) + load_half_one(at + 64 + lane * 2)
    return number * load_one(at + lane * 4) + load_one(at + 128 + lane * 4)


@inner
def _embed_row(step: Any, dims: Any, reals: Any, table: Any, row: Any) -> None:
    rows = step[t.NUM_ROWS]
    token = load_index(step[t.TOKENS], row)
    is_here = dims[t.EMBEDDING_START] <= token < dims[t.EMBEDDING_STOP]
    token -= dims[t.EMBEDDING_START]
    for i in range((dims[t.HIDDEN] + 31) // 32 * 32):
        value = ZERO
        if is_here and i < dims[t.HIDDEN]:
            value = _element(table[t.KIND], table[t.ADDRESS], table[t.GROUPS], token, i)
        store_one(feature(step[t.RESIDUAL], rows, row, i), value * reals[t.EMBEDDING_SCALE])


@inner
def _scale_of(base: Any, rows: Any, row: Any, dims: Any, eps: Any) -> Any:
    """One over the root of a row's mean square."""
    a = splat(ZERO)
    b = splat(ZERO)
    for i in range(0, dims[t.HIDDEN], 32):
        at = feature(base, rows, row, i)
        u = load(at)
        v = load(at + 64)
        a = fma(u, u, a)
        b = fma(v, v, b)
    mean = total(add(a, b)) / np.float32(dims[t.HIDDEN])
    return ONE / np.sqrt(mean + eps)


@inner
def _add_row(step: Any, dims: Any, reals: Any, row: Any, post_norm: Any) -> None:
    """Add the half before to a row's residual."""
    rows = step[t.NUM_ROWS]
    residual = step[t.RESIDUAL]
    partial = step[t.PARTIAL]
    post = splat(ONE)
    if post_norm:
        post = splat(_scale_of(partial, rows, row, dims, reals[t.EPS]))
    for i in range(0, dims[t.HIDDEN], 16):
        at = feature(residual, rows, row, i)
        v = load(feature(partial, rows, row, i))
        if post_norm:
            v = mul(mul(v, post), load(post_norm + i * 4))
        store(at, add(load(at), v))


@inner
def _settle_row(
    step: Any,
    dims: Any,
    reals: Any,
    row: Any,
    adds: Any,
    post_norm: Any,
    norm: Any,
    out: Any,
    out_rows: Any,
) -> None:
    """Add the half before to a row's residual; write its norm as row ``out`` of X."""
    rows = step[t.NUM_ROWS]
    residual = step[t.RESIDUAL]
    if adds:
        _add_row(step, dims, reals, row, post_norm)
    scale = splat(_scale_of(residual, rows, row, dims, reals[t.EPS]))
    for i in range(0, (dims[t.HIDDEN] + 31) // 32 * 32, 16):
        v = mul(mul(load(feature(residual, rows, row, i)), scale), load(norm + i * 4))
        store(feature(step[t.X], out_rows, out, i), v)
        store_one(sum_of(step[t.X_SUMS], out_rows, out, i), total(v))


@inner
def _chunk(tiles: Any, rows: Any, threads: Any) -> Any:
    """Tiles in one item of work: few items for one row, single tiles for many."""
    if rows > 8:
        return 1
    if threads == 1:
        return tiles
    return max(1, tiles // (_ITEMS_A_THREAD * threads))


@inner
def _multiply(
    step: Any, matrix: Any, tile: Any, x: Any, sums: Any, y: Any, rows: Any, scratch: Any
) -> None:
    out = y + tile * rows * 128
    multiply_tile(
        matrix[t.FUNCTION],
        matrix[t.ADDRESS],
        matrix[t.BIAS],
        matrix[t.GROUPS],
        tile,
        x,
        sums,
        out,
        rows,
        scratch,
    )


@inner
def _product(
    step: Any, matrix: Any, x: Any, sums: Any, y: Any, rows: Any, phase: Any, scratch: Any
) -> None:
    """One whole matrix as a phase."""
    tiles = matrix[t.TILES]
    chunk = _chunk(tiles, rows, step[t.NUM_THREADS])
    items = (tiles + chunk - 1) // chunk
    item = take(step[t.COUNTERS], phase)
    while item < items:
        for tile in range(item * chunk, min(item * chunk + chunk, tiles)):
            _multiply(step, matrix, tile, x, sums, y, rows, scratch)
        finish(step[t.COUNTERS], phase)
        item = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, items)


@inner
def _queries_keys_values(step: Any, matrices: Any, base: Any, phase: Any, scratch: Any) -> None:
    q = matrices[base + t.Q]
    k = matrices[base + t.K]
    v = matrices[base + t.V]
    rows = step[t.NUM_ROWS]
    end_q = q[t.TILES]
    end_k = end_q + k[t.TILES]
    tiles = end_k + v[t.TILES]
    chunk = _chunk(tiles, rows, step[t.NUM_THREADS])
    items = (tiles + chunk - 1) // chunk
    item = take(step[t.COUNTERS], phase)
    while item < items:
        for tile in range(item * chunk, min(item * chunk + chunk, tiles)):
            matrix = q
            number = tile
            out = step[t.QUERIES]
            if tile >= end_k:
                matrix = v
                number = tile - end_k
                out = step[t.VALUES]
            elif tile >= end_q:
                matrix = k
                number = tile - end_q
                out = step[t.KEYS]
            _multiply(step, matrix, number, step[t.X], step[t.X_SUMS], out, rows, scratch)
        finish(step[t.COUNTERS], phase)
        item = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, items)


@inner
def _settle(
    step: Any, dims: Any, reals: Any, adds: Any, post_norm: Any, norm: Any, phase: Any
) -> None:
    rows = step[t.NUM_ROWS]
    row = take(step[t.COUNTERS], phase)
    while row < rows:
        _settle_row(step, dims, reals, row, adds, post_norm, norm, row, rows)
        finish(step[t.COUNTERS], phase)
        row = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, rows)


@inner
def _attention_half(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    layer: Any,
    adds: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """Phases: norm, projections, place, attend, output projection."""
    rows = step[t.NUM_ROWS]
    counters = step[t.COUNTERS]
    base = layer * t.MATRICES_A_LAYER
    post_norm = 0
    if layer > 0:
        post_norm = layers[layer - 1, t.MLP_POST_NORM]
    _settle(step, dims, reals, adds, post_norm, layers[layer, t.ATTENTION_NORM], phase)
    _queries_keys_values(step, matrices, base, phase + 1, scratch)
    row = take(counters, phase + 2)
    while row < rows:
        place_row(step, dims, reals, layers, layer, row)
        finish(counters, phase + 2)
        row = take(counters, phase + 2)
    join(counters, phase + 2, rows)
    num_heads = dims[t.NUM_KV_HEADS]
    items = step[t.NUM_RUNS] * num_heads
    item = take(counters, phase + 3)
    while item < items:
        run = item // num_heads
        attend(step, dims, reals, layers, layer, run, item % num_heads, scratch)
        finish(counters, phase + 3)
        item = take(counters, phase + 3)
    join(counters, phase + 3, items)
    _product(
        step,
        matrices[base + t.O],
        step[t.MIXED],
        step[t.MIXED_SUMS],
        step[t.PARTIAL],
        rows,
        phase + 4,
        scratch,
    )


@inner
def _activate(x: Any, uses_gelu: Any) -> Any:
    """SiLU, or GELU in its tanh form."""
    if uses_gelu:
        cube = mul(mul(mul(x, x), x), splat(GELU_CUBE))
        u = mul(add(x, cube), splat(SQRT_2_BY_PI))
        return mul(mul(x, splat(HALF)), add(splat(ONE), tanh(u)))
    return div(x, add(splat(ONE), exp(sub(splat(ZERO), x))))


@inner
def _gate_tile(step: Any, dims: Any, matrices: Any, base: Any, tile: Any, scratch: Any) -> None:
    """One tile of ``act(gate) * up``; the gate is kept in scratch, behind the unpacked block."""
    rows = step[t.NUM_ROWS]
    gate = scratch + UNPACKED_BYTES
    up = step[t.INNER] + tile * rows * 128
    x = step[t.X]
    sums = step[t.X_SUMS]
    _multiply(step, matrices[base + t.GATE], tile, x, sums, gate - tile * rows * 128, rows, scratch)
    _multiply(step, matrices[base + t.UP], tile, x, sums, step[t.INNER], rows, scratch)
    for n in range(rows * 2):
        v = mul(_activate(load(gate + n * 64), dims[t.USES_GELU]), load(up + n * 64))
        store(up + n * 64, v)
        store_one(step[t.INNER_SUMS] + (tile * rows * 2 + n) * 4, total(v))


@inner
def _mlp_half(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    layer: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """Phases: norm, gate and up, down."""
    rows = step[t.NUM_ROWS]
    counters = step[t.COUNTERS]
    base = layer * t.MATRICES_A_LAYER
    post_norm = layers[layer, t.ATTENTION_POST_NORM]
    _settle(step, dims, reals, 1, post_norm, layers[layer, t.MLP_NORM], phase)
    tiles = matrices[base + t.GATE, t.TILES]
    chunk = _chunk(tiles, rows, step[t.NUM_THREADS])
    items = (tiles + chunk - 1) // chunk
    item = take(counters, phase + 1)
    while item < items:
        for tile in range(item * chunk, min(item * chunk + chunk, tiles)):
            _gate_tile(step, dims, matrices, base, tile, scratch)
        finish(counters, phase + 1)
        item = take(counters, phase + 1)
    join(counters, phase + 1, items)
    _product(
        step,
        matrices[base + t.DOWN],
        step[t.INNER],
        step[t.INNER_SUMS],
        step[t.PARTIAL],
        rows,
        phase + 2,
        scratch,
    )


@inner
def _output(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    phase: Any,
    scratch: Any,
) -> None:
    """Phases: norm of the wanted rows, logits."""
    counters = step[t.COUNTERS]
    num_layers = dims[t.NUM_LAYERS]
    num_out = step[t.NUM_OUT]
    post_norm = layers[num_layers - 1, t.MLP_POST_NORM]
    item = take(counters, phase)
    while item < num_out:
        row = load_index(step[t.OUT_ROWS], item)
        _settle_row(step, dims, reals, row, 1, post_norm, dims[t.FINAL_NORM], item, num_out)
        finish(counters, phase)
        item = take(counters, phase)
    join(counters, phase, num_out)
    matrix = matrices[num_layers * t.MATRICES_A_LAYER + t.OUTPUT]
    logits = step[t.LOGITS]
    _product(step, matrix, step[t.X], step[t.X_SUMS], logits, num_out, phase + 1, scratch)


@inner
def _embed(step: Any, dims: Any, reals: Any, matrices: Any, phase: Any) -> None:
    """Phase: a row of the embedding for each token."""
    rows = step[t.NUM_ROWS]
    table = matrices[dims[t.NUM_LAYERS] * t.MATRICES_A_LAYER + t.EMBEDDING]
    row = take(step[t.COUNTERS], phase)
    while row < rows:
        _embed_row(step, dims, reals, table, row)
        finish(step[t.COUNTERS], phase)
        row = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, rows)


@inner
def _hand_on(step: Any, dims: Any, reals: Any, layers: Any, phase: Any) -> None:
    """Phase: the last half joins the residual, as the next layer's norm would have it."""
    rows = step[t.NUM_ROWS]
    post_norm = layers[dims[t.NUM_LAYERS] - 1, t.MLP_POST_NORM]
    row = take(step[t.COUNTERS], phase)
    while row < rows:
        _add_row(step, dims, reals, row, post_norm)
        finish(step[t.COUNTERS], phase)
        row = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, rows)


@inner
def _part(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    part: Any,
    scratch: Any,
) -> None:
    num_layers = dims[t.NUM_LAYERS]
    if part == 0:
        if dims[t.IS_FIRST]:
            _embed(step, dims, reals, matrices, 0)
        return
    layer = (part - 1) // 2
    phase = t.EMBED_PHASES + layer * t.PHASES_A_LAYER
    if layer == num_layers:
        if not dims[t.IS_LAST]:
            _hand_on(step, dims, reals, layers, phase)
        elif step[t.NUM_OUT] > 0:
            _output(step, dims, reals, matrices, layers, phase, scratch)
    elif part % 2:
        adds = np.int64(layer > 0)  # before the first half there is nothing to add
        _attention_half(step, dims, reals, matrices, layers, layer, adds, phase, scratch)
    else:
        phase += t.ATTENTION_PHASES
        _mlp_half(step, dims, reals, matrices, layers, layer, phase, scratch)


@entry
def run_step(
    step: Any,
    dims: Any,
    reals: Any,
    matrices: Any,
    layers: Any,
    first: Any,
    last: Any,
    thread: Any,
) -> None:
    """One thread's share of some parts of a step.

    Thread 0 returns when these parts are done; between its calls others' shares of a sum may be
    added. Helper threads make one call for the whole step and wait for parts to be opened.

    Args:
        step, dims, reals, matrices, layers: see ``tables``.
        first, last: parts, ``last`` not included; 0 is the embedding, 1 the first half.
        thread: 0 to ``NUM_THREADS`` - 1; every one of them must take part in the step.
    """
    scratch = step[t.SCRATCH] + thread * step[t.SCRATCH_BYTES]
    if thread:
        for part in range(first, last):
            if not is_open(step[t.OPEN], part):
                break
            _part(step, dims, reals, matrices, layers, part, scratch)
        fetch_add(step[t.EXITS], 1)
        return
    fetch_add(step[t.OPEN], last - first)
    for part in range(first, last):
        _part(step, dims, reals, matrices, layers, part, scratch)
    if last == 2 * dims[t.NUM_LAYERS] + 2:
        wait(step[t.EXITS], step[t.NUM_THREADS] - 1)
