"""The registered process ``events``: tells whoever subscribed what changed, on any node.

=====================================  ============================================================
cast ``{publish, Kind, Map}``          told to the subscribers of every node (``gossip``)
cast ``{publish_here, Kind, Map}``     to those of this node: what every node sees for itself
call ``{subscribe, Pid}``              ``ok``; then ``{phalanx_event, Kind, Map}`` for each event
call ``{recent, N}``                   the last events known here, the oldest first
cast ``{node_up | node_down, Node}``   of ``membership``: whom events are told to
=====================================  ============================================================

``Map`` gets ``origin`` (node), ``at`` (seconds since 1970) and ``number`` besides. A subscriber
that does not read is dropped rather than allowed to hoard messages.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Pid, Ref, Term
from control.gossip import (
    Book,
    Event,
    Given,
    Want,
    digest_of,
    event_of,
    event_term,
    events_of,
)

MAX_WAITING: Final = 1000
COMPARE_S: Final = 5.0  # how often a digest goes to one other node, which finds the last holes
_NAME: Final = "events"


class Events(GenServer):
    """Keeps the subscribers, and the book of what happened."""

    def __init__(self) -> None:
        super().__init__()
        self._subscribers: dict[Ref, Pid] = {}
        self._peers: list[str] = []
        self._rng = random.Random()

    def format_state(self) -> Term:
        return {
            Atom("subscribers"): list(self._subscribers.values()),
            Atom("peers"): [Atom(node) for node in self._peers],
        }

    async def init(self, me: Process) -> None:
        self._book = Book(str(me.node.name), time.time_ns() // 1_000_000)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("subscribe", Pid() as pid):
                self._subscribers[self.me.monitor(pid)] = pid
                return Atom("ok")
            case ("recent", int(count)):
                found = self._book.recent(max(0, min(count, MAX_WAITING)))
                return [(Atom(event.kind), _data(event)) for event in found]
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        match message:
            case ("publish", kind, dict(data)):
                event = self._book.write(str(kind), data, time.time())
                self._tell_here([event])
                for node in self._peers:
                    self._send(node, (Atom("event"), self.me.pid, event_term(event)))
            case ("publish_here", kind, dict(data)):
                here = str(self.me.node.name)
                self._tell_here([Event(here, 0, 0, time.time(), str(kind), data)])
            case ("node_up", str(node)):
                self._node_up(str(node))
            case ("node_down", str(node)) if node in self._peers:
                self._peers.remove(node)
            case ("node_down", _):
                pass
            case (_, Pid() as sender, *_):
                try:
                    self._hear(sender, message)
                except ValueError as exc:
                    await super().handle_cast((Atom("bad"), str(exc)))
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("DOWN", Ref() as monitor, _, _, _):
                self._subscribers.pop(monitor, None)
            case "compare":
                if self._peers:
                    self._send_digest(self._rng.choice(self._peers))
                    self._compare_later()
            case _:
                await super().handle_info(message)

    # -- other nodes -----------------------------------------------------------------------

    def _node_up(self, node: str) -> None:
        if node in self._peers:
            return
        self._peers.append(node)
        if len(self._peers) == 1:
            self._compare_later()
        self._send_digest(node)

    def _hear(self, sender: Pid, message: Any) -> None:
        """What another node says. Raises ValueError for what is not understood."""
        node = str(sender.node)
        match message:
            case ("event", _, term):
                news, want = self._book.take(event_of(term))
                self._tell_here(news)
                if want is not None:
                    self._ask(node, [want])
            case ("digest", _, term):
                self._ask(node, self._book.lacks(digest_of(term)))
            case ("want", _, str(origin), int(incarnation), int(first), int(last)):
                given = self._book.give(Want(str(origin), incarnation, first, last))
                if given is not None:
                    events: list[Term] = [event_term(event) for event in given.events]
                    head = (Atom("given"), self.me.pid, Atom(origin), incarnation)
                    self._send(node, (*head, given.oldest, events))
            case ("given", _, str(origin), int(incarnation), int(oldest), [*terms]):
                events_given = events_of(terms)
                given = Given(str(origin), incarnation, oldest, events_given)
                self._tell_here(self._book.take_given(given))
            case _:
                raise ValueError(f"from {node}: {show(message)}")

    def _ask(self, node: str, wants: Iterable[Want]) -> None:
        for want in wants:
            head = (Atom("want"), self.me.pid, Atom(want.origin))
            self._send(node, (*head, want.incarnation, want.first, want.last))

    def _send_digest(self, node: str) -> None:
        digest = {Atom(origin): seen for origin, seen in self._book.digest().items()}
        self._send(node, (Atom("digest"), self.me.pid, digest))

    def _send(self, node: str, message: Term) -> None:
        gen_server.cast(self.me, (_NAME, node), message)

    def _compare_later(self) -> None:
        after_s = COMPARE_S * (0.75 + 0.5 * self._rng.random())
        self.me.send_after(after_s, self.me.pid, Atom("compare"))

    # -- this node -------------------------------------------------------------------------

    def _tell_here(self, news: Iterable[Event]) -> None:
        for event in news:
            message = (Atom("phalanx_event"), Atom(event.kind), _data(event))
            for monitor, pid in list(self._subscribers.items()):
                process = self.me.node.process(pid)
                if process is not None and process.mailbox_length > MAX_WAITING:
                    del self._subscribers[monitor]
                    self.me.exit(pid, Atom("too_slow"))
                    continue
                self.me.send(pid, message)


def _data(event: Event) -> dict[Any, Term]:
    return {
        **event.data,
        Atom("origin"): Atom(event.origin),
        Atom("number"): event.number,
        Atom("at"): round(event.at_s, 3),
    }


def publish(me: Process, kind: str, data: dict[Any, Term]) -> None:
    """Tell all subscribers of all nodes; nothing happens where nobody listens."""
    gen_server.cast(me, Atom(_NAME), (Atom("publish"), Atom(kind), data))


def publish_here(me: Process, kind: str, data: dict[Any, Term]) -> None:
    """Tell the subscribers of this node alone what every node sees for itself."""
    gen_server.cast(me, Atom(_NAME), (Atom("publish_here"), Atom(kind), data))


async def subscribe(node: Node) -> AsyncIterator[tuple[str, dict[Any, Term]]]:
    """``(kind, data)`` of each change from now on. Closing the iterator unsubscribes."""
    with node.open_process(label="event feed") as me:
        await gen_server.call(me, Atom(_NAME), (Atom("subscribe"), me.pid))
        while True:
            match await me.receive():
                case ("phalanx_event", kind, dict(data)):
                    yield str(kind), data
