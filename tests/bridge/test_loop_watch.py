"""A blocked event loop is noticed, named and given up."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from bridge.loop_watch import LoopWatch
from tests.waiting import wait_until_async

INTERVAL_S = 0.01


def hog(until: threading.Event) -> None:
    assert until.wait(5)  # what a slow computation does to the loop


async def test_a_blocked_loop_is_logged_with_the_culprit_and_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given_up = threading.Event()
    seconds: list[float] = []

    def on_limit(blocked_s: float) -> None:
        seconds.append(blocked_s)
        given_up.set()

    watch = LoopWatch(warn_after_s=0.03, limit_s=0.06, on_limit=on_limit, interval_s=INTERVAL_S)
    watch.start()

    async def culprit() -> None:
        hog(given_up)

    await asyncio.create_task(culprit(), name="the culprit")
    await wait_until_async(lambda: "runs again" in caplog.text, 5)
    watch.stop()
    assert len(seconds) == 1
    assert seconds[0] >= 0.06
    (text,) = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert "the culprit" in text
    assert "until.wait(5)" in text


async def test_a_loop_that_runs_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[float] = []
    watch = LoopWatch(warn_after_s=2.0, limit_s=2.0, on_limit=calls.append, interval_s=INTERVAL_S)
    watch.start()
    beats = watch._beats
    await wait_until_async(lambda: watch._beats > beats + 5, 5)
    watch.stop()
    assert calls == []
    assert caplog.text == ""
