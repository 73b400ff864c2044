"""Waits of the tests: a condition and a deadline, never a sleep for its own sake."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.01


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str = "") -> T:
    """Call ``predicate`` until it is true; return what it gave.

    Raises:
        AssertionError: it was not true within ``timeout_s``.
    """
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := predicate()):
        assert time.monotonic() < deadline_s, _late(predicate, timeout_s, what)
        pause.wait(_POLL_S)
    return value


async def wait_until_async(predicate: Callable[[], T], timeout_s: float, what: str = "") -> T:
    """``wait_until`` that lets the event loop run meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline_s, _late(predicate, timeout_s, what)
        await asyncio.sleep(_POLL_S)
    return value


def _late(predicate: Callable[[], object], timeout_s: float, what: str) -> str:
    return f"not within {timeout_s} s: {what or getattr(predicate, '__qualname__', predicate)}"
