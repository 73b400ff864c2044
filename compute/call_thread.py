"""A thread for calls into libraries that may never return."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class CallThread:
    """Runs one call after the other, each as long as its caller cares to wait.

    A call that does not return is left behind: no other may follow. The thread does not keep the
    process from ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._stuck = False
        threading.Thread(target=self._serve, daemon=True, name=name).start()

    def run(self, call: Callable[[], Any], timeout_s: float) -> Any:
        """The result of ``call``.

        Raises:
            TimeoutError: it did not return in time, or one before it did not.
            Exception: what the call raised.
        """
        if self._stuck:
            raise TimeoutError("an earlier call has not returned")
        self._calls.put(call)
        try:
            result, error = self._results.get(timeout=timeout_s)
        except queue.Empty:
            self._stuck = True
            raise TimeoutError(f"no return in {timeout_s:g} s") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the thread when its last call has returned; a second call does nothing."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((call(), None))
            except Exception as exc:  # noqa: BLE001 - raised again where the call was made
                self._results.put((None, exc))
