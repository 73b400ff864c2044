"""The benchmark against stock Erlang: that it measures, and loses nothing. The speed is its own."""

from __future__ import annotations

import asyncio

import pytest

from ops.bench.erlang_calls import run, table
from ops.erlang import from_path, from_wheel

pytestmark = [pytest.mark.slow, pytest.mark.erlang]


def test_calls_and_a_burst_are_measured_and_complete() -> None:
    otp = from_wheel() or from_path()
    if otp is None:
        pytest.skip("no Erlang here")
    found = asyncio.run(run(otp, num_rounds=1, burst=5000))
    calls, burst = found["call_round_trip_us"], found["burst"]
    assert calls["to_python"]["best"] > 0
    assert calls["to_erl"]["best"] > 0
    assert burst["received"] == 5000
    assert burst["in_order"] is True
    assert burst["link_kept"] is True
    assert table(found).row_count == 3
