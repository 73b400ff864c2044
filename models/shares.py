"""Fair division: units over ranks by share, and runs of items over parts at the least peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise


def apportion(units: int, shares: Sequence[float]) -> tuple[int, ...]:
    """How many of ``units`` each share gets, at least one each; their sum is ``units``.

    Where every ideal count is at least one, each count is its ideal rounded down or up. Equal
    remainders favour the lower rank. Exact arithmetic: the same on every machine.

    Raises:
        ValueError: fewer units than shares, or a share that is not positive.

    Source: Hamilton's method (largest remainder), with a minimum of one.
    """
    if units < len(shares) or not shares:
        raise ValueError(f"{units} units cannot give one to each of {len(shares)} shares")
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise ValueError(f"shares must be positive numbers, not {tuple(shares)}")
    total = sum(Fraction(share) for share in shares)
    ideal = [Fraction(share) * units / total for share in shares]
    counts = [max(1, math.floor(value)) for value in ideal]
    while sum(counts) < units:
        short = max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))
        counts[short] += 1
    while sum(counts) > units:  # minimums took more than was left
        able = [i for i in range(len(counts)) if counts[i] > 1]
        counts[max(able, key=lambda i: (counts[i] - ideal[i], i))] -= 1
    return tuple(counts)


def ranges(counts: Sequence[int], *, unit: int = 1, size: int | None = None) -> tuple[range, ...]:
    """Neighbouring ranges of ``counts`` units of ``unit`` each; the last one ends at ``size``."""
    out, at = [], 0
    for count in counts:
        stop = at + count * unit
        out.append(range(at, stop if size is None else min(stop, size)))
        at = stop
    return tuple(out)


Cost = Callable[[int, int, int], float]


def partition(items: int, parts: int, cost: Cost) -> tuple[range, ...]:
    """Cut ``items`` in a row into ``parts`` runs, none empty, so that the dearest is cheapest.

    Among those, the one with the least sum of squared costs.

    Args:
        items: how many there are, at least ``parts``.
        parts: how many runs.
        cost: ``(part, start, stop) -> cost`` of giving items ``start`` to ``stop`` (excluded) to
            a part; infinity forbids it.

    Raises:
        ValueError: no such partition.
    """
    peak = _best(items, parts, cost, lambda before, new: max(before, new))
    if peak is None:
        raise ValueError(f"{items} items cannot be cut into {parts} parts")
    limit = peak[0] * (1 + 1e-12)

    def limited(part: int, start: int, stop: int) -> float:
        value = cost(part, start, stop)
        return value if value <= limit else math.inf

    smooth = _best(items, parts, limited, lambda before, new: before + new * new)
    assert smooth is not None  # the one that gave the limit
    edges = smooth[1]
    return tuple(range(a, b) for a, b in pairwise(edges))


def _best(
    items: int, parts: int, cost: Cost, add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]] | None:
    """Dynamic programme over (part, first item that is not given yet)."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for part in range(parts):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (spent, edges) in best.items():
            last = items - (parts - part - 1)
            for stop in [items] if part == parts - 1 else range(start + 1, last + 1):
                value = cost(part, start, stop) if stop > start else math.inf
                total = add(spent, value)
                if math.isfinite(value) and (stop not in after or total < after[stop][0]):
                    after[stop] = (total, (*edges, stop))
        best = after
    return best.get(items)
