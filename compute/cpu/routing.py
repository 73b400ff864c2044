"""Which experts a row goes to, and which rows an expert has.

The choice is a function of the row's own logits alone: every rank, and any batch, comes to the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu import tables as t
from compute.cpu.attention import feature, load_index
from compute.cpu.functions import exp
from compute.cpu.jit import inner
from compute.cpu.vector import (
    add,
    div,
    lane_numbers,
    larger,
    load,
    load_one,
    peak,
    splat,
    store,
    store_long,
    store_one,
    sub,
    total,
    where_less,
)

ZERO, ONE, CHOSEN, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
NEVER = np.float32(-np.inf)
TINY = np.float32(1e-20)  # keeps a sum of scores that all vanish from dividing by zero
SCRATCH_FLOATS = 5  # an expert


@inner
def _score(scores: Any, count: Any, uses_sigmoid: Any) -> None:
    """Logits to scores in place; what lies behind ``count`` comes to nothing."""
    if uses_sigmoid:
        for i in range(0, count, 16):
            at = scores + i * 4
            store(at, div(splat(ONE), add(splat(ONE), exp(sub(splat(ZERO), load(at))))))
        return
    largest = splat(NEVER)
    for i in range(0, count, 16):
        number = add(lane_numbers(), splat(np.float32(i)))
        at = scores + i * 4
        v = where_less(splat(np.float32(count) - HALF), number, splat(NEVER), load(at))
        store(at, v)
        largest = larger(v, largest)
    top = splat(peak(largest))
    sums = splat(ZERO)
    for i in range(0, count, 16):
        v = exp(sub(load(scores + i * 4), top))
        store(scores + i * 4, v)
        sums = add(sums, v)
    whole = splat(total(sums))
    for i in range(0, count, 16):
        store(scores + i * 4, div(load(scores + i * 4), whole))


@inner
def _best(values: Any, marks: Any, start: Any, stop: Any) -> Any:
    """Number of the largest value without a mark; the first of equals; -1 where all have one."""
    best = np.int64(-1)
    for i in range(start, stop):
        if load_one(marks + i * 4) == ZERO and (
            best < 0 or load_one(values + i * 4) > load_one(values + best * 4)
        ):
            best = np.int64(i)
    return best


@inner
def _limit_groups(dims: Any, choice: Any, marks: Any, groups: Any, group_marks: Any) -> None:
    """Mark the experts of all but the best groups."""
    num_groups = dims[t.NUM_GROUPS]
    size = dims[t.NUM_EXPERTS] // num_groups
    for g in range(num_groups):
        best = _best(choice, marks, g * size, (g + 1) * size)
        score = load_one(choice + best * 4)
        if dims[t.ADDS_TWO_BEST] and size > 1:
            store_one(marks + best * 4, ONE)
            second = _best(choice, marks, g * size, (g + 1) * size)
            store_one(marks + best * 4, ZERO)
            score += load_one(choice + second * 4)
        store_one(groups + g * 4, score)
        store_one(group_marks + g * 4, ZERO)
    for _ in range(dims[t.NUM_ACTIVE_GROUPS]):
        store_one(group_marks + _best(groups, group_marks, 0, num_groups) * 4, ONE)
    for g in range(num_groups):
        if load_one(group_marks + g * 4) == ZERO:
            for i in range(g * size, (g + 1) * size):
                store_one(marks + i * 4, ONE)


@inner
def choose(
    dims: Any,
    reals: Any,
    logits: Any,
    rows: Any,
    row: Any,
    bias: Any,
    chosen: Any,
    factors: Any,
    scratch: Any,
) -> None:
    """A row's experts in order, and the factors on what they make of it.

    Args:
        dims, reals: the rule, see ``tables``.
        logits: address of the router's output, float32 (groups, rows, 32).
        bias: address of float32 (experts,), added to scores for the choice alone; 0 for none.
        chosen: address of int64 (active,), written.
        factors: address of float32 (active,), written.
        scratch: address of ``SCRATCH_FLOATS`` for each expert, padded to 32.

    Source: transformers ``modeling_mixtral``, ``modeling_qwen3_moe``, ``modeling_deepseek_v3``.
    """
    count = dims[t.NUM_EXPERTS]
    room = (count + 31) // 32 * 128
    scores = scratch
    choice = scores + room
    marks = choice + room
    for i in range(0, count, 16):
        store(scores + i * 4, load(feature(logits, rows, row, i)))
        store(marks + i * 4, splat(ZERO))
    _score(scores, count, dims[t.USES_SIGMOID])
    for i in range(0, count, 16):
        v = load(scores + i * 4)
        if bias:
            v = add(v, load(bias + i * 4))
        store(choice + i * 4, v)
    if dims[t.NUM_ACTIVE_GROUPS] < dims[t.NUM_GROUPS]:
        _limit_groups(dims, choice, marks, marks + room, marks + room * 2)
    for _ in range(dims[t.NUM_ACTIVE]):
        store_one(marks + _best(choice, marks, 0, count) * 4, CHOSEN)
    whole = ZERO
    n = 0
    for i in range(count):
        if load_one(marks + i * 4) == CHOSEN:
            store_long(chosen + n * 8, i)
            store_one(factors + n * 4, load_one(scores + i * 4))
            whole += load_one(scores + i * 4)
            n += 1
    for i in range(n):
        factor = load_one(factors + i * 4)
        if dims[t.NORMALIZES]:
            factor /= whole + TINY
        store_one(factors + i * 4, factor * reals[t.EXPERT_SCALE])


@inner
def gather_choices(step: Any, dims: Any) -> None:
    """Sort the rows' choices by expert, leaving out experts of other ranks."""
    rows = step[t.NUM_ROWS]
    active = dims[t.NUM_ACTIVE]
    here = dims[t.NUM_EXPERTS_HERE]
    places = step[t.PLACES]
    for expert in range(here):
        store_long(places + expert * 8, 0)
    for n in range(rows * active):
        expert = load_index(step[t.CHOSEN], n) - dims[t.FIRST_EXPERT]
        if 0 <= expert < here:
            store_long(places + expert * 8, load_index(places, expert) + 1)
    place = 0
    span = 0
    for expert in range(here):
        num_rows = load_index(places, expert)
        if num_rows:
            store_long(step[t.SPAN_EXPERTS] + span * 8, expert)
            store_long(step[t.SPAN_STARTS] + span * 8, place)
            store_long(places + expert * 8, place)
            for n in range(place, place + num_rows):
                store_long(step[t.PAIR_SPANS] + n * 8, span)
            place += num_rows
            span += 1
    store_long(step[t.SPAN_STARTS] + span * 8, place)
    store_long(step[t.NUM_SPANS], span)
    for n in range(rows * active):
        expert = load_index(step[t.CHOSEN], n) - dims[t.FIRST_EXPERT]
        pair = -1
        if 0 <= expert < here:
            pair = load_index(places, expert)
            store_long(places + expert * 8, pair + 1)
            store_long(step[t.PAIR_ROWS] + pair * 8, n // active)
        store_long(step[t.PAIRS] + n * 8, pair)
