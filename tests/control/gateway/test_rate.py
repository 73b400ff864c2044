"""Token buckets: never more than was agreed, and a time to wait that is true."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from control.gateway.rate import Bucket, take

waits = st.lists(st.floats(0, 100), min_size=1, max_size=60)


@given(per_minute=st.integers(1, 120), steps=waits)
def test_no_span_of_time_has_more_than_its_share(per_minute: int, steps: list[float]) -> None:
    bucket, now_s, taken = None, 0.0, 0
    for step in steps:
        now_s += step
        bucket, wait_s = take(bucket, per_minute, now_s)
        taken += wait_s == 0
    assert taken <= per_minute + now_s * per_minute / 60 + 1e-3


@given(per_minute=st.integers(1, 1_000_000), tokens=st.floats(0, 0.999), at_s=st.floats(0, 1e6))
def test_who_waits_as_told_is_served(per_minute: int, tokens: float, at_s: float) -> None:
    bucket, wait_s = take(Bucket(tokens, at_s), per_minute, at_s)
    assert 0 < wait_s <= 60 / per_minute * (1 + 1e-9)
    _, again_s = take(bucket, per_minute, at_s + math.ceil(wait_s))
    assert again_s == 0
    _, early_s = take(bucket, per_minute, at_s + wait_s / 2)
    assert early_s > 0


def test_a_minute_in_advance_and_no_more() -> None:
    bucket = None
    for _ in range(3):
        bucket, wait_s = take(bucket, 3, 0.0)
        assert wait_s == 0
    assert take(bucket, 3, 0.0)[1] == 20
    assert take(bucket, 3, 1e9)[0].tokens == 2
    assert take(Bucket(0, 100.0), 3, 50.0)[1] == 20  # a clock that went back
