"""One at a time: who may choose a place, and who waits for the end of whom."""

from __future__ import annotations

from collections.abc import Callable

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.term import Term


class Turns:
    """Places chosen at the same time would be the same memory.

    Args:
        me: the process that replies.
    """

    def __init__(self, me: Process) -> None:
        self._me = me
        self._now = ""
        self._waiting: list[tuple[str, Term, Callable[[str], Term]]] = []
        self.waiting_for_room: dict[str, set[str]] = {}

    def ask(self, id_: str, from_: Term, answer: Callable[[str], Term]) -> Term:
        """The answer, or NOREPLY: ``from_`` gets it when the others are done."""
        if not self._now:
            self._now = id_
            return answer(id_)
        self._waiting.append((id_, from_, answer))
        return NOREPLY

    def end(self, id_: str) -> None:
        """``id_`` has chosen, or will not."""
        self._waiting = [one for one in self._waiting if one[0] != id_]
        if self._now == id_:
            self._now = ""
            if self._waiting:
                self._now, from_, answer = self._waiting.pop(0)
                gen_server.reply(self._me, from_, answer(self._now))

    def left(self, id_: str) -> list[str]:
        """``id_`` is gone: who waited for it and for nobody else."""
        self.waiting_for_room.pop(id_, None)
        for waited in self.waiting_for_room.values():
            waited.discard(id_)
        found = [name for name, waited in self.waiting_for_room.items() if not waited]
        for name in found:
            del self.waiting_for_room[name]
        return found

    def clear(self) -> None:
        """Nobody waits any more."""
        self._now, self._waiting = "", []
        self.waiting_for_room = {}
