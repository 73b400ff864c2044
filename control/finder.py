"""Who serves a model: answers for ``find``, those who wait for one, and loads on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.term import Atom, Term
from control.books import Absent, Books, ComingUp, Failed, Served
from control.desired import DesiredFile
from control.errors import ControlError
from control.lookup import Lookup

LoadModel = Callable[[str], object]  # raises ControlError

DEMAND_RETRY_S = 10.0  # after a load on demand failed, before the next request tries again


class Finder:
    """Answers from the books; what cannot be answered yet waits here.

    Args:
        me: the scheduler's process, which replies.
        load: brings a model up on demand; None where ``autoload`` is off.
    """

    def __init__(
        self,
        me: Process,
        books: Books,
        desired: DesiredFile,
        lookup: Lookup,
        *,
        load: LoadModel | None,
    ) -> None:
        self._me, self._books, self._desired = me, books, desired
        self._lookup, self._load = lookup, load
        self._waiting: list[tuple[str, Term]] = []  # (model id, From)
        self._demand_failed: dict[str, tuple[float, str]] = {}  # model -> (when, why)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a server."""
        return len(self._waiting)

    def find(self, name: str, from_: Term) -> Term:
        """Answer for ``find``, or NOREPLY: ``from_`` waits. Raises UnknownModel."""
        target = self.target(name)
        answer = self._route(target)
        if answer is None:
            self._waiting.append((target, from_))
            return NOREPLY
        return answer

    def target(self, name: str) -> str:
        """Model id of ``default``, a loaded model or a card; an instance's id stays itself.

        Raises:
            UnknownModel: no such name.
        """
        if name == "default" and self._desired.now.default:
            return self._desired.now.default
        return self._books.target_of(name) or self._lookup.card_of(name)

    def _route(self, model: str) -> Term | None:
        """An answer for ``find``, or None while it is worth waiting."""
        match self._books.route(model):
            case Served(instance, coordinator):
                return (Atom("ok"), instance, coordinator)
            case ComingUp():
                return None
            case Failed(text):
                return (Atom("error"), Atom("failed"), text)
            case Absent():
                if self._load is not None:
                    return self._demand(model, self._load)
                return (Atom("error"), Atom("not_loaded"), f"no instance of {model} runs here")

    def _demand(self, model: str, load: LoadModel) -> Term | None:
        """Load ``model`` for whoever asks, unless that has just failed."""
        failed_s, why = self._demand_failed.get(model, (0.0, ""))
        if why and asyncio.get_running_loop().time() - failed_s < DEMAND_RETRY_S:
            return (Atom("error"), Atom("failed"), why)
        self._demand_failed.pop(model, None)
        try:
            load(model)
        except ControlError as exc:
            return (Atom("error"), Atom(exc.kind), str(exc))
        return None

    def on_demand_failed(self, model: str, why: str) -> None:
        """A load on demand failed: its askers are told, the next one after a while tries again."""
        self._demand_failed[model] = (asyncio.get_running_loop().time(), why)

    def serve_waiting(self) -> None:
        """Answer those for whom there is an answer now."""
        waiting, self._waiting = self._waiting, []
        for model, from_ in waiting:
            answer = self._route(model)
            if answer is None:
                self._waiting.append((model, from_))
            else:
                gen_server.reply(self._me, from_, answer)

    def path_of(self, name: str) -> Term:
        """Answer for ``path``. Raises UnknownModel."""
        target = self.target(name)
        record = self._books.first(lambda r: target in (r.id, r.model) and r.spec is not None)
        if record is None or record.spec is None:
            return (Atom("error"), Atom("not_loaded"), f"no instance of {target} runs here")
        return (Atom("ok"), target, str(record.spec.path), record.spec.context_tokens)
