"""Attention kernels: rotation, storing keys and values, and reading them for each query.

A page of the cache holds 64 positions of every layer and head of the shard: for each, keys as
``(head_dim, 64)`` so that a vector runs over positions, then values as ``(64, head_dim)``.
Every query is computed on its own, in the order of positions: the same bits in any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.functions import exp, tanh
from compute.cpu.jit import inner
from compute.cpu.vector import (
    add,
    div,
    fma,
    lane_numbers,
    larger,
    load,
    load_long,
    load_one,
    mul,
    peak,
    splat,
    store,
    store_one,
    sub,
    total,
    where_less,
)

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
NEVER = np.float32(-np.inf)
PAGE = t.PAGE_TOKENS


@inner
def load_index(base: Any, index: Any) -> Any:
    """The int64 at ``base[index]``."""
    return load_long(base + index * 8)


@inner
def feature(base: Any, rows: Any, row: Any, index: Any) -> Any:
    """Address of a feature in activations ``(groups, rows, 32)``; 16 lie side by side."""
    return base + ((index >> 5) * rows + row) * 128 + (index & 31) * 4


@inner
def sum_of(sums: Any, rows: Any, row: Any, index: Any) -> Any:
    """Address of the sum of 16 features in ``(groups, rows, 2)``."""
    return sums + ((index >> 5) * rows + row) * 8 + ((index >> 4) & 1) * 4


@inner
def page_of(step: Any, dims: Any, layer: Any, head: Any, slot: Any, page: Any) -> Any:
    """Address of the keys of a layer and head in one page of a slot; the values follow."""
    number = load_index(step[t.PAGES], slot * step[t.PAGES_A_SLOT] + page)
    at = (layer * dims[t.NUM_KV_HEADS] + head) * dims[t.HEAD_DIM] * (PAGE * 8)
    return step[t.CACHE] + number * step[t.PAGE_BYTES] + at


@inner
def _normalise(
    base: Any, rows: Any, row: Any, start: Any, size: Any, weight: Any, eps: Any
) -> None:
    """RMS norm of one head in place."""
    squares = splat(ZERO)
    for d in range(0, size, 16):
        v = load(feature(base, rows, row, start + d))
        squares = fma(v, v, squares)
    scale = splat(ONE / np.sqrt(total(squares) / np.float32(size) + eps))
    for d in range(0, size, 16):
        at = feature(base, rows, row, start + d)
        store(at, mul(mul(load(at), scale), load(weight + d * 4)))


@inner
def _rotate(base: Any, rows: Any, row: Any, start: Any, dim: Any, table: Any) -> None:
    """Rotate one head in place; feature i is paired with i + dim / 2."""
    pairs = dim // 2
    if pairs % 16 == 0 and start % 16 == 0:
        for i in range(0, pairs, 16):
            at = feature(base, rows, row, start + i)
            to = feature(base, rows, row, start + i + pairs)
            a = load(at)
            b = load(to)
            c = load(table + i * 4)
            s = load(table + (pairs + i) * 4)
            store(at, sub(mul(a, c), mul(b, s)))
            store(to, add(mul(b, c), mul(a, s)))
    else:
        for i in range(pairs):
            at = feature(base, rows, row, start + i)
            to = feature(base, rows, row, start + i + pairs)
            x = load_one(at)
            y = load_one(to)
            cosine = load_one(table + i * 4)
            sine = load_one(table + (pairs + i) * 4)
            store_one(at, x * cosine - y * sine)
            store_one(to, y * cosine + x * sine)


@inner
def place_row(step: Any, dims: Any, reals: Any, layers: Any, layer: Any, row: Any) -> None:
    """Norm and rotate a row's queries and keys, scale the queries, store keys and values."""
    rows = step[t.NUM_ROWS]
    size = dims[t.HEAD_DIM]
    rope_dim = dims[t.ROPE_DIM]
    slot = load_index(step[t.SLOTS], row)
    position = load_index(step[t.POSITIONS], row)
    table = layers[layer, t.ROPE] + position * rope_dim * 4
    queries = step[t.QUERIES]
    keys = step[t.KEYS]
    values = step[t.VALUES]
    scale = splat(reals[t.ATTENTION_SCALE])
    for head in range(dims[t.NUM_HEADS]):
        start = head * size
        if layers[layer, t.Q_NORM]:
            _normalise(queries, rows, row, start, size, layers[layer, t.Q_NORM], reals[t.EPS])
        _rotate(queries, rows, row, start, rope_dim, table)
        for d in range(0, size, 16):
            at = feature(queries, rows, row, start + d)
            store(at, mul(load(at), scale))
    for head in range(dims[t.NUM_KV_HEADS]):
        start = head * size
        if layers[layer, t.K_NORM]:
            _normalise(keys, rows, row, start, size, layers[layer, t.K_NORM], reals[t.EPS])
        _rotate(keys, rows, row, start, rope_dim, table)
        page = page_of(step, dims, layer, head, slot, position // PAGE)
        here = position % PAGE
        for d in range(size):
            store_one(page + (d * PAGE + here) * 4, load_one(feature(keys, rows, row, start + d)))
        at = page + size * PAGE * 4 + here * size * 4
        for d in range(0, size, 16):
            store(at + d * 4, load(feature(values, rows, row, start + d)))


@inner
def _scores_of_page(keys: Any, query: Any, size: Any, out: Any) -> None:
    """Products of one query with the 64 keys of a page."""
    a0 = splat(ZERO)
    a1 = splat(ZERO)
    a2 = splat(ZERO)
    a3 = splat(ZERO)
    for d in range(size):
        q = splat(load_one(query + d * 4))
        at = keys + d * (PAGE * 4)
        a0 = fma(load(at), q, a0)
        a1 = fma(load(at + 64), q, a1)
        a2 = fma(load(at + 128), q, a2)
        a3 = fma(load(at + 192), q, a3)
    store(out, a0)
    store(out + 64, a1)
    store(out + 128, a2)
    store(out + 192, a3)


@inner
def _softmax(scores: Any, low: Any, high: Any, softcap: Any) -> Any:
    """Weights of positions ``low`` to ``high`` (both included), not yet divided by their sum.

    Returns:
        One over the sum.
    """
    first = low // 16 * 16
    largest = splat(NEVER)
    lanes = lane_numbers()
    for p in range(first, high + 1, 16):
        s = load(scores + p * 4)
        if softcap > 0:
            s = mul(splat(softcap), tanh(div(s, splat(softcap))))
        here = add(lanes, splat(np.float32(p)))
        s = where_less(splat(np.float32(high) + HALF), here, splat(NEVER), s)
        s = where_less(here, splat(np.float32(low) - HALF), splat(NEVER), s)
        store(scores + p * 4, s)
        largest = larger(s, largest)
    top = splat(peak(largest))
    sums = splat(ZERO)
    for p in range(first, high + 1, 16):
        e = exp(sub(load(scores + p * 4), top))
        store(scores + p * 4, e)
        sums = add(sums, e)
    return ONE / total(sums)


@inner
def _add_values(values: Any, weights: Any, start: Any, stop: Any, size: Any, out: Any) -> None:
    """Add weighted values of positions ``start`` to ``stop`` of one page to an output."""
    d = 0
    while d + 64 <= size:
        at = out + d * 4
        a0 = load(at)
        a1 = load(at + 64)
        a2 = load(at + 128)
        a3 = load(at + 192)
        for p in range(start, stop):
            w = splat(load_one(weights + p * 4))
            v = values + (p * size + d) * 4
            a0 = fma(load(v), w, a0)
            a1 = fma(load(v + 64), w, a1)
            a2 = fma(load(v + 128), w, a2)
            a3 = fma(load(v + 192), w, a3)
        store(at, a0)
        store(at + 64, a1)
        store(at + 128, a2)
        store(at + 192, a3)
        d += 64
    while d < size:
        a0 = load(out + d * 4)
        for p in range(start, stop):
            w = splat(load_one(weights + p * 4))
            a0 = fma(load(values + (p * size + d) * 4), w, a0)
        store(out + d * 4, a0)
        d += 16


@inner
def attend(
    step: Any, dims: Any, reals: Any, layers: Any, layer: Any, run: Any, head: Any, scratch: Any
) -> None:
    """Attention of a run of rows of one sequence, for the queries of one key/value head.

    A page is read for all queries of the run while it is in the cache. ``scratch`` holds, for
    each of them, the query, the output and the scores.
    """
    rows = step[t.NUM_ROWS]
    size = dims[t.HEAD_DIM]
    window = layers[layer, t.WINDOW]
    per_head = dims[t.NUM_HEADS] // dims[t.NUM_KV_HEADS]
    first_row = load_index(step[t.RUN_STARTS], run)
    num_rows = load_index(step[t.RUN_LENGTHS], run)
    slot = load_index(step[t.SLOTS], first_row)
    position = load_index(step[t.POSITIONS], first_row)
    num_queries = num_rows * per_head
    queries = scratch
    outputs = queries + num_queries * size * 4
    scores = outputs + num_queries * size * 4
    room = step[t.SCORES_TOKENS] * 4
    for n in range(num_queries):
        row = first_row + n // per_head
        start = (head * per_head + n % per_head) * size
        for d in range(0, size, 16):
            at = (n * size + d) * 4
            store(queries + at, load(feature(step[t.QUERIES], rows, row, start + d)))
            store(outputs + at, splat(ZERO))
    low = 0
    if window > 0:
        low = max(0, position - window + 1)
    high = position + num_rows - 1
    for page in range(low // PAGE, high // PAGE + 1):
        keys = page_of(step, dims, layer, head, slot, page)
        for n in range(num_queries):
            if page * PAGE <= position + n // per_head:
                out = scores + n * room + page * (PAGE * 4)
                _scores_of_page(keys, queries + n * size * 4, size, out)
    for n in range(num_queries):
        mine = position + n // per_head
        lowest = 0
        if window > 0:
            lowest = max(0, mine - window + 1)
        scale = _softmax(scores + n * room, lowest, mine, reals[t.ATTENTION_SOFTCAP])
        store_one(queries + n * size * 4, scale)  # the query has done its work
    for page in range(low // PAGE, high // PAGE + 1):
        values = page_of(step, dims, layer, head, slot, page) + size * (PAGE * 4)
        for n in range(num_queries):
            mine = position + n // per_head
            start = page * PAGE
            stop = min(start + PAGE, mine + 1)
            weights = scores + n * room + start * 4
            first = 0
            if window > 0:
                first = max(0, mine - window + 1 - start)
            _add_values(values, weights, first, stop - start, size, outputs + n * size * 4)
    for n in range(num_queries):
        row = first_row + n // per_head
        start = (head * per_head + n % per_head) * size
        scale = splat(load_one(queries + n * size * 4))
        for d in range(0, size, 16):
            out = mul(load(outputs + (n * size + d) * 4), scale)
            store(feature(step[t.MIXED], rows, row, start + d), out)
            store_one(sum_of(step[t.MIXED_SUMS], rows, row, start + d), total(out))
    if head == dims[t.NUM_KV_HEADS] - 1 and dims[t.NUM_HEADS] * size % 32:
        start = dims[t.NUM_HEADS] * size  # the last group's empty half
        for n in range(num_rows):
            store(feature(step[t.MIXED], rows, first_row + n, start), splat(ZERO))
            store_one(sum_of(step[t.MIXED_SUMS], rows, first_row + n, start), ZERO)
