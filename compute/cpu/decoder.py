"""The decoder as parts that several threads share: embedding, half layers, end.

A half (attention or MLP) reads the residual and leaves its output in ``PARTIAL``; the next part
adds it to the residual. Between the two an all-reduce may stand: where a shard holds only some
heads and some of the inner features, ``PARTIAL`` is its share of a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.attention import attend, load_index, place_row
from compute.cpu.experts import experts_half
from compute.cpu.jit import entry, inner
from compute.cpu.products import mlp, multiply, product, tiles_an_item
from compute.cpu.residual import embed, hand_on, settle, settle_row
from compute.cpu.sync import fetch_add, finish, is_open, join, take, wait


@inner
def _queries_keys_values(step: Any, matrices: Any, base: Any, phase: Any, scratch: Any) -> None:
    q = matrices[base + t.Q]
    k = matrices[base + t.K]
    v = matrices[base + t.V]
    rows = step[t.NUM_ROWS]
    end_q = q[t.TILES]
    end_k = end_q + k[t.TILES]
    tiles = end_k + v[t.TILES]
    chunk = tiles_an_item(tiles, rows, step[t.NUM_THREADS])
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
            multiply(matrix, number, step[t.X], step[t.X_SUMS], out, rows, scratch)
        finish(step[t.COUNTERS], phase)
        item = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, items)


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
    settle(step, dims, reals, adds, post_norm, layers[layer, t.ATTENTION_NORM], phase)
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
    product(
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
    """Phases: norm, gate and up, down; or those of experts."""
    base = layer * t.MATRICES_A_LAYER
    post_norm = layers[layer, t.ATTENTION_POST_NORM]
    settle(step, dims, reals, 1, post_norm, layers[layer, t.MLP_NORM], phase)
    if matrices[base + t.GATE, t.TILES] > 0:  # of a dense layer, or of shared experts
        mlp(step, dims, matrices, base, phase + 1, scratch)
    if layers[layer, t.EXPERTS]:
        experts_half(step, dims, reals, matrices, layers, layer, phase + 3, scratch)


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
        settle_row(step, dims, reals, row, 1, post_norm, dims[t.FINAL_NORM], item, num_out)
        finish(counters, phase)
        item = take(counters, phase)
    join(counters, phase, num_out)
    matrix = matrices[num_layers * t.MATRICES_A_LAYER + t.OUTPUT]
    logits = step[t.LOGITS]
    product(step, matrix, step[t.X], step[t.X_SUMS], logits, num_out, phase + 1, scratch)


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
            embed(step, dims, reals, matrices, 0)
        return
    layer = (part - 1) // 2
    phase = t.EMBED_PHASES + layer * t.PHASES_A_LAYER
    if layer == num_layers:
        if not dims[t.IS_LAST]:
            hand_on(step, dims, reals, layers, phase)
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
