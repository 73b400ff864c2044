"""Who serves a model: answers for ``find``, those who wait for one, and loads on demand.

A ready instance is found from what coordinators tell every node. What else there is to know of a
model the leader knows: another node asks it, and asks the next one when it is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import NOREPLY
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control.books import Absent, Books, ComingUp, Failed
from control.desired_state import DesiredState
from control.errors import ControlError
from control.lookup import Lookup
from control.routes import Routes

LoadModel = Callable[[str], object]  # raises ControlError

DEMAND_RETRY_S: Final = 10.0  # after a load on demand failed, before the next request tries again
RELAY_S: Final = 600.0
NO_LEADER_S: Final = 15.0  # that somebody waits for a leader who might know more


@dataclass(frozen=True, slots=True)
class _Waiting:
    target: str
    from_: Any
    since_s: float


class Finder:
    """Answers from routes and books; what cannot be answered yet waits here.

    Args:
        me: the scheduler's process, which replies.
        now_s: a clock.
        load: brings a model up on demand; None where ``autoload`` is off.
    """

    def __init__(
        self,
        me: Process,
        routes: Routes,
        books: Books,
        desired: DesiredState,
        lookup: Lookup,
        *,
        now_s: Callable[[], float],
        load: LoadModel | None,
    ) -> None:
        self._me, self._routes, self._books, self._desired = me, routes, books, desired
        self._lookup, self._now_s, self._load = lookup, now_s, load
        self._waiting: list[_Waiting] = []
        self._relays: dict[str, Pid] = {}  # what another node's scheduler is asked
        self._demand_failed: dict[str, tuple[float, str]] = {}  # model -> (when, why)
        self._leaderless_s = now_s()  # since when there is nobody to ask
        self.leader = ""  # whom to ask; empty: nobody, or this node while it takes stock
        self.leading = False

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a server."""
        return len(self._waiting)

    def find(self, name: str, from_: Term) -> Term:
        """Answer for ``find``, or NOREPLY: ``from_`` waits. Raises UnknownModel."""
        target = self.target(name)
        answer = self._answer(target)
        if answer is None:
            self._waiting.append(_Waiting(target, from_, self._now_s()))
            self._ask_leader()
            return NOREPLY
        return answer

    def target(self, name: str) -> str:
        """Model id of ``default``, a loaded model or a card; an instance's id stays itself.

        Raises:
            UnknownModel: no such name.
        """
        if name == "default" and self._desired.now.default:
            return self._desired.now.default
        known = self._books.target_of(name) or self._routes.target_of(name)
        if known is None and any(name in (w.id, w.model) for w in self._desired.now.wanted):
            return name
        return known or self._lookup.card_of(name)

    def _answer(self, target: str) -> Term | None:
        """An answer for ``find``, or None while it is worth waiting."""
        route = self._routes.pick(target)
        if route is not None:
            return (Atom("ok"), route.id, route.pid)
        if not self.leading:
            return None
        match self._books.outlook(target):
            case ComingUp():
                return None
            case Failed(text):
                return (Atom("error"), Atom("failed"), text)
            case Absent() if any(target in (w.id, w.model) for w in self._desired.now.wanted):
                return None  # it is about to be brought up
            case Absent():
                if self._load is not None:
                    return self._demand(target, self._load)
                return (Atom("error"), Atom("not_loaded"), f"no instance of {target} runs here")

    # -- by the leader ---------------------------------------------------------------------

    def _demand(self, model: str, load: LoadModel) -> Term | None:
        """Load ``model`` for whoever asks, unless that has just failed."""
        failed_s, why = self._demand_failed.get(model, (0.0, ""))
        if why and self._now_s() - failed_s < DEMAND_RETRY_S:
            return (Atom("error"), Atom("failed"), why)
        self._demand_failed.pop(model, None)
        try:
            load(model)
        except ControlError as exc:
            return (Atom("error"), Atom(exc.kind), str(exc))
        return None

    def on_demand_failed(self, model: str, why: str) -> None:
        """A load on demand failed: its askers are told, the next one after a while tries again."""
        self._demand_failed[model] = (self._now_s(), why)

    def serve_waiting(self) -> None:
        """Answer those for whom there is an answer now."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            answer = self._answer(one.target)
            if answer is None:
                self._waiting.append(one)
            else:
                gen_server.reply(self._me, one.from_, answer)

    # -- by asking the leader --------------------------------------------------------------

    def follow(self, leader: str, *, leading: bool) -> None:
        """Another node leads, or this one (``leading`` once its books are complete)."""
        if not leader and not leading and (self.leader or self.leading):
            self._leaderless_s = self._now_s()
        if leader != self.leader:
            for relay in self._relays.values():
                self._me.exit(relay, Atom("kill"))
            self._relays.clear()
        self.leader, self.leading = leader, leading
        self.serve_waiting()
        self._ask_leader()

    def _ask_leader(self) -> None:
        """One question a model, however many wait."""
        if not self.leader or self.leading or self.leader == self._me.node.name:
            return
        for target in dict.fromkeys(one.target for one in self._waiting):
            if target not in self._relays:
                self._relays[target] = self._relay(target, self.leader)

    def _relay(self, target: str, leader: str) -> Pid:
        async def ask(me: Process) -> None:
            answer: Term = Atom("lost")
            with contextlib.suppress(gen_server.CallError):
                dest = (Atom("scheduler"), Atom(leader))
                asked: Term = (Atom("find"), target)
                answer = await gen_server.node_call(me.node, dest, asked, timeout_s=RELAY_S)
            me.send(self._me.pid, (Atom("relayed"), target, answer))

        return self._me.spawn(ask, link=True, label=f"ask {leader} for {target}")

    def on_relayed(self, target: str, answer: Term) -> None:
        """What the leader said, or that it was lost."""
        self._relays.pop(target, None)
        if answer == "lost":
            return  # the next tick asks again, whoever leads then
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if one.target == target:
                gen_server.reply(self._me, one.from_, answer)
            else:
                self._waiting.append(one)

    def tick(self) -> None:
        """About once a second: ask again, and tell those who have waited too long for a leader."""
        self._waiting = [one for one in self._waiting if self._is_there(one)]
        self._ask_leader()
        if self.leader or self.leading:
            return
        early_s = self._now_s() - NO_LEADER_S
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if max(one.since_s, self._leaderless_s) > early_s:
                self._waiting.append(one)
                continue
            text = f"no leader for {NO_LEADER_S:.0f} s, and nothing here serves {one.target}"
            gen_server.reply(self._me, one.from_, (Atom("error"), Atom("no_leader"), text))

    def _is_there(self, one: _Waiting) -> bool:
        """Whether the asker may still want to know."""
        asker: Pid = one.from_[0]
        if asker.node == self._me.node.name:
            return self._me.node.process(asker) is not None
        return self._now_s() - one.since_s < RELAY_S  # else its call has timed out
