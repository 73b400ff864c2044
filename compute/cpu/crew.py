"""The threads that run a step together."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Crew:
    """Threads beside the caller's, which call a function when woken and sleep in between.

    The function must release the interpreter lock, and must itself wait until every thread has
    left what they share; so no call waits here.
    """

    def __init__(self, num_threads: int) -> None:
        self._task: Callable[[int], None] = _nothing
        self._wake = [threading.Semaphore(0) for _ in range(num_threads - 1)]
        self._closing = False
        self._helpers = [
            threading.Thread(target=self._help, args=(number,), daemon=True, name=f"crew-{number}")
            for number in range(1, num_threads)
        ]
        for helper in self._helpers:
            helper.start()

    def wake(self, task: Callable[[int], None]) -> None:
        """Call ``task(thread)`` on every helper, from 1; the caller, thread 0, does its own."""
        self._task = task
        for wake in self._wake:
            wake.release()

    def close(self) -> None:
        """End the helpers; a second call does nothing."""
        self._closing = True
        for wake in self._wake:
            wake.release()
        for helper in self._helpers:
            helper.join(timeout=5.0)
        self._helpers = []

    def _help(self, number: int) -> None:
        wake = self._wake[number - 1]
        while True:
            wake.acquire()
            if self._closing:
                return
            self._task(number)


def _nothing(thread: int) -> None:
    """What helpers would run before the first task; they are never woken for it."""
