"""Fair division: sums, bounds and order for any shares; partitions against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.shares import apportion, partition, ranges

SHARES = st.lists(st.one_of(st.integers(1, 50), st.floats(0.01, 100)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("units", "shares", "counts"),
    [
        (3, [1, 1], (2, 1)),
        (3, [2, 1], (2, 1)),
        (3, [1, 2], (1, 2)),
        (48, [2, 1], (32, 16)),
        (9, [1, 1, 1, 1], (3, 2, 2, 2)),
        (4, [100, 1, 1], (2, 1, 1)),
        (10, [0.1, 0.2, 0.7], (1, 2, 7)),
    ],
)
def test_examples(units: int, shares: list[float], counts: tuple[int, ...]) -> None:
    assert apportion(units, shares) == counts


@pytest.mark.slow
@settings(deadline=None)
@given(shares=SHARES, extra=st.integers(0, 200))
def test_every_unit_is_given_once_and_nobody_goes_without(shares: list[float], extra: int) -> None:
    units = len(shares) + extra
    counts = apportion(units, shares)
    assert sum(counts) == units
    assert min(counts) >= 1
    ideal = [share * units / math.fsum(shares) for share in shares]
    if min(ideal) >= 1 + 1e-9:
        assert all(abs(a - b) < 1 + 1e-9 for a, b in zip(counts, ideal, strict=True))
    for (a, x), (b, y) in itertools.combinations(zip(shares, counts, strict=True), 2):
        assert (x - y) * (a - b) >= 0  # nobody gets less for more
    assert counts == apportion(units, [share * 4 for share in shares])


@pytest.mark.parametrize("shares", [[], [1, 1, 1], [1, 0], [1, -1], [math.nan, 1], [math.inf, 1]])
def test_what_cannot_be_divided(shares: list[float]) -> None:
    with pytest.raises(ValueError, match=r"units cannot give one|positive"):
        apportion(2, shares)


def test_ranges_are_neighbours_and_the_last_may_be_short() -> None:
    assert ranges((2, 1), unit=32, size=90) == (range(64), range(64, 90))
    assert ranges((1, 2)) == (range(1), range(1, 3))


@pytest.mark.slow
@settings(deadline=None)
@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_a_partition_has_the_least_peak(costs: list[int], shares: list[int]) -> None:
    if len(costs) < len(shares):
        with pytest.raises(ValueError, match="cannot be cut"):
            partition(len(costs), len(shares), lambda part, a, b: 1.0)
        return

    def cost(part: int, start: int, stop: int) -> float:
        return sum(costs[start:stop]) / shares[part]

    def peak_and_sum(edges: tuple[int, ...]) -> tuple[float, float]:
        each = [cost(p, a, b) for p, (a, b) in enumerate(itertools.pairwise(edges))]
        return max(each), sum(value * value for value in each)

    parts = partition(len(costs), len(shares), cost)
    edges = (0, *(part.stop for part in parts))
    assert [part.start for part in parts] == list(edges[:-1])
    assert edges[-1] == len(costs)
    inner = itertools.combinations(range(1, len(costs)), len(shares) - 1)
    best = min(peak_and_sum((0, *cut, len(costs))) for cut in inner)
    assert peak_and_sum(edges) == pytest.approx(best)
