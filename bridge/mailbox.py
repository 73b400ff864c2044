"""One process's messages: arrival order, selective receive, and a receive that waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from itertools import islice
from typing import Any, Final

from bridge.term import Term

Match = Callable[[Term], Any]  # None means "not this message"


class _Nothing:
    """Stands for "no message matched", since every term may be a message."""


NOTHING: Final = _Nothing()


class Handover(asyncio.Future[Any]):
    """A future whose task can be made to go on in the very call that gives the result."""

    _waiting: tuple[Callable[[Any], object], Context] | None = None

    def add_done_callback(
        self, callback: Callable[[Any], object], /, *, context: Context | None = None
    ) -> None:
        """As of any future; the first one with a context is that of the task that waits."""
        if self._waiting is None and context is not None:
            self._waiting = (callback, context)
        super().add_done_callback(callback, context=context)

    def hand_over(self, value: Any) -> None:
        """Set the result and run the waiting task up to its next wait.

        Inside of a task, where a second one cannot run, the task goes on in the loop's next turn.
        """
        if self._waiting is None or asyncio.current_task(self.get_loop()) is not None:
            self.set_result(value)
            return
        wake_up, context = self._waiting
        self.remove_done_callback(wake_up)
        self.set_result(value)
        context.run(wake_up, self)


class Mailbox:
    """Messages of one process. Only its owner takes; anyone puts.

    A message that a waiting receive wants is handed over without touching the queue, and put
    back where it was if that receive is cancelled before it could look.
    """

    __slots__ = ("_future", "_handed", "_match", "_messages")

    def __init__(self) -> None:
        self._messages: deque[Term] = deque()
        self._match: Match | None = None
        self._future: asyncio.Future[Any] | None = None
        self._handed: tuple[int, Term] | None = None

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Term, *, at_once: bool = False) -> None:
        """Add a message. An error in the owner's match function is raised at its receive.

        Args:
            at_once: an owner that waits for it goes on in this very call, if it can. Saves a call
                from another node one turn of the event loop.
        """
        future = self._future
        if future is None or future.done():
            self._messages.append(message)
            return
        value = message
        if self._match is not None:
            try:
                value = self._match(message)
            except Exception as exc:  # noqa: BLE001 -- the owner's fault, not the sender's
                self._messages.append(message)
                future.set_exception(exc)
                return
            if value is None:
                self._messages.append(message)
                return
        self._handed = (len(self._messages), message)
        if at_once and type(future) is Handover:
            future.hand_over(value)
        else:
            future.set_result(value)

    def take(self, match: Match | None, skip: int = 0) -> Any:
        """Remove the first message that ``match`` wants; its value, or NOTHING.

        Args:
            skip: messages at the front that cannot match and are not looked at.
        """
        messages = self._messages
        if match is None:
            return messages.popleft() if messages else NOTHING
        if not messages:
            return NOTHING
        for index, message in enumerate(islice(messages, skip, None), skip):
            value = match(message)
            if value is not None:
                del messages[index]
                return value
        return NOTHING

    def wait(self, match: Match | None, future: asyncio.Future[Any]) -> None:
        """Give ``future`` the next message put that ``match`` wants.

        Raises:
            RuntimeError: a receive of this process is waiting already.
        """
        if self._future is not None:
            raise RuntimeError("two receives of one process at the same time")
        self._match, self._future, self._handed = match, future, None

    def stop_waiting(self, *, give_back: bool) -> None:
        """End a wait; ``give_back`` returns a message handed over but never looked at."""
        if give_back and self._handed is not None:
            index, message = self._handed
            self._messages.insert(index, message)
        self._match = self._future = self._handed = None

    def wake(self, error: BaseException) -> None:
        """Make a waiting receive, if there is one, raise ``error``."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)

    def remove(self, match: Callable[[Term], bool]) -> None:
        """Drop every queued message for which ``match`` holds."""
        self._messages = deque(m for m in self._messages if not match(m))

    def clear(self) -> None:
        """Drop everything queued."""
        self._messages.clear()
