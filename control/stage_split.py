"""Where pipeline stages begin and shares of a tensor group, by numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from models.shares import apportion

Costs = npt.NDArray[np.float64]  # (layers + 1, layers + 1): of giving ``start`` to ``stop``


def least_sum(costs: Sequence[Costs]) -> tuple[range, ...] | None:
    """Runs of layers, one a stage, none empty, at the least sum of costs.

    Args:
        costs: of each stage; infinity forbids a run.

    Returns:
        None where there is no way. Equal sums: earlier stages take fewer layers.
    """
    size = costs[0].shape[0]
    at = np.full(size, math.inf)
    at[0] = 0.0
    came: list[npt.NDArray[np.intp]] = []
    for cost in costs:
        ways = at[:, None] + np.where(np.tri(size, dtype=bool), math.inf, cost)
        came.append(np.argmin(ways, axis=0))
        at = np.min(ways, axis=0)
    if not math.isfinite(at[-1]):
        return None
    edges = [size - 1]
    for origin in reversed(came):
        edges.append(int(origin[edges[-1]]))
    edges.reverse()
    return tuple(range(a, b) for a, b in pairwise(edges))


def least_peak(costs: Sequence[Costs]) -> tuple[range, ...] | None:
    """The same with the dearest stage as cheap as can be, and among those at the least sum.

    It is ``models.shares.partition`` for the many ways that a search looks at.
    """
    size = costs[0].shape[0]
    at = np.full(size, math.inf)
    at[0] = 0.0
    for cost in costs:
        ways = np.maximum(at[:, None], np.where(np.tri(size, dtype=bool), math.inf, cost))
        at = np.min(ways, axis=0)
    if not math.isfinite(at[-1]):
        return None
    limit = at[-1] * (1 + 1e-12)
    return least_sum([np.where(cost <= limit, cost, math.inf) for cost in costs])


def within(wanted: Sequence[float], room: Sequence[float], units: int) -> tuple[float, ...]:
    """Shares in proportion to ``wanted``, but none beyond its room; whole parts of ``units``.

    What one cannot take goes to the others in proportion. Where all rooms together are less than
    the whole, shares follow the rooms: no better can be done, and the caller will find that it
    does not fit.

    Args:
        wanted: positive, such as speeds.
        room: the largest part of the whole for each, from 0.
        units: at least one for each share.
    """
    kept = [max(part, 0.0) for part in room]
    if sum(kept) <= 1.0:
        total = sum(kept)
        parts = [part / total if total else 1 / len(kept) for part in kept]
    else:
        parts = [0.0] * len(kept)
        free = set(range(len(kept)))
        while True:
            left, weight = 1.0 - sum(parts), sum(wanted[i] for i in sorted(free))
            full = [i for i in sorted(free) if wanted[i] / weight * left > kept[i]]
            if not full:
                break
            for i in full:
                parts[i] = kept[i]
                free.discard(i)
        for i in free:
            parts[i] = wanted[i] / weight * left
    least = 1e-6
    counts = apportion(units, [max(part, least) for part in parts])
    return tuple(float(count) for count in counts)
