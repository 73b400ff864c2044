"""The residual: tokens' embeddings enter it, halves are added to it, and norms of it are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.attention import feature, load_index, sum_of
from compute.cpu.jit import inner
from compute.cpu.layout import BF16, BLOCK_BYTES, F16, F32, Q4_BYTES, Q4H, Q8_BYTES, Q8H, Q8S
from compute.cpu.sync import finish, join, take
from compute.cpu.vector import (
    add,
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
    total,
)

ZERO, ONE = np.float32(0), np.float32(1)


@inner
def element(kind: Any, matrix: Any, groups: Any, row: Any, column: Any) -> Any:
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
            value = element(table[t.KIND], table[t.ADDRESS], table[t.GROUPS], token, i)
        store_one(feature(step[t.RESIDUAL], rows, row, i), value * reals[t.EMBEDDING_SCALE])


@inner
def embed(step: Any, dims: Any, reals: Any, matrices: Any, phase: Any) -> None:
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
def settle_row(
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
def settle(
    step: Any, dims: Any, reals: Any, adds: Any, post_norm: Any, norm: Any, phase: Any
) -> None:
    rows = step[t.NUM_ROWS]
    row = take(step[t.COUNTERS], phase)
    while row < rows:
        settle_row(step, dims, reals, row, adds, post_norm, norm, row, rows)
        finish(step[t.COUNTERS], phase)
        row = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, rows)


@inner
def hand_on(step: Any, dims: Any, reals: Any, layers: Any, phase: Any) -> None:
    """Phase: the last half joins the residual, as the next layer's norm would have it."""
    rows = step[t.NUM_ROWS]
    post_norm = layers[dims[t.NUM_LAYERS] - 1, t.MLP_POST_NORM]
    row = take(step[t.COUNTERS], phase)
    while row < rows:
        _add_row(step, dims, reals, row, post_norm)
        finish(step[t.COUNTERS], phase)
        row = take(step[t.COUNTERS], phase)
    join(step[t.COUNTERS], phase, rows)
