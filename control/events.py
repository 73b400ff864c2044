"""The registered process ``events``: tells whoever subscribed what changed.

================================  ==================================================
cast ``{publish, Kind, Map}``     every subscriber gets ``{phalanx_event, Kind, Map}``
call ``{subscribe, Pid}``         ``ok``; ends with the subscriber
================================  ==================================================

A subscriber that does not read is dropped rather than allowed to hoard messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term

MAX_WAITING = 1000


class Events(GenServer):
    """Keeps the subscribers."""

    def __init__(self) -> None:
        super().__init__()
        self._subscribers: dict[Ref, Pid] = {}

    def format_state(self) -> Term:
        return {Atom("subscribers"): list(self._subscribers.values())}

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("subscribe", Pid() as pid):
                self._subscribers[self.me.monitor(pid)] = pid
                return Atom("ok")
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        match message:
            case ("publish", kind, dict(data)):
                for monitor, pid in list(self._subscribers.items()):
                    process = self.me.node.process(pid)
                    if process is not None and process.mailbox_length > MAX_WAITING:
                        del self._subscribers[monitor]
                        self.me.exit(pid, Atom("too_slow"))
                        continue
                    self.me.send(pid, (Atom("phalanx_event"), kind, data))
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("DOWN", Ref() as monitor, _, _, _):
                self._subscribers.pop(monitor, None)
            case _:
                await super().handle_info(message)


def publish(me: Process, kind: str, data: dict[Any, Term]) -> None:
    """Tell all subscribers of this node; nothing happens where nobody listens."""
    gen_server.cast(me, Atom("events"), (Atom("publish"), Atom(kind), data))


async def subscribe(node: Node) -> AsyncIterator[tuple[str, dict[Any, Term]]]:
    """``(kind, data)`` of each change from now on. Closing the iterator unsubscribes."""
    with node.open_process(label="event feed") as me:
        await gen_server.call(me, Atom("events"), (Atom("subscribe"), me.pid))
        while True:
            match await me.receive():
                case ("phalanx_event", kind, dict(data)):
                    yield str(kind), data
