"""Notices a blocked event loop: says which code blocks it, and gives up on it after a limit."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final

_log: Final = logging.getLogger("bridge.loop_watch")

CHECK_INTERVAL_S: Final = 0.25


class LoopWatch:
    """A thread that expects a sign of life from the running event loop.

    Time that the whole process was stopped (a suspended machine, SIGSTOP) does not count: the
    thread only counts what it lived through itself.

    Args:
        warn_after_s: a longer block is logged, once, with the culprit's stack.
        limit_s: after a block this long ``on_limit`` is called, once, from the thread.
        on_limit: gets the seconds blocked; usually ends the process, so that heart restarts it.
    """

    def __init__(
        self,
        *,
        warn_after_s: float,
        limit_s: float,
        on_limit: Callable[[float], None],
        interval_s: float = CHECK_INTERVAL_S,
    ) -> None:
        self._warn_after_s = warn_after_s
        self._limit_s = limit_s
        self._on_limit = on_limit
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._beats = 0
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch the running loop until ``stop``."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread_id = threading.get_ident()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch. Call it in the loop."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._interval_s + 1.0)

    def _beat(self) -> None:
        self._beats += 1
        self._timer = self._loop.call_later(self._interval_s, self._beat)

    def _watch(self) -> None:
        seen, silent_s = self._beats, -self._interval_s
        warned = limited = False
        while not self._stop.wait(self._interval_s):
            if self._beats != seen:
                if warned:
                    _log.warning("the event loop runs again after about %.2f s", silent_s)
                seen, silent_s, warned, limited = self._beats, -self._interval_s, False, False
                continue
            silent_s += self._interval_s
            if silent_s >= self._warn_after_s and not warned:
                warned = True
                _log.error("the event loop is blocked for %.2f s by %s", silent_s, self._culprit())
            if silent_s >= self._limit_s and not limited:
                limited = True
                _log.critical("the event loop is blocked for %.2f s: giving up", silent_s)
                self._on_limit(silent_s)

    def _culprit(self) -> str:
        frame = sys._current_frames().get(self._loop_thread_id)
        stack = "".join(traceback.format_stack(frame)[-12:]) if frame else "(its thread is gone)"
        try:
            task = asyncio.current_task(self._loop)
        except RuntimeError:
            task = None
        return f"{task.get_name() if task else 'a callback'}:\n{stack}"
