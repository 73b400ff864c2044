"""The registered process ``link_probe``: how far and how wide the links of this machine are.

One peer at a time, the one that was measured longest ago; a machine that is busy measures only
peers that nobody has measured yet. What it finds is kept here, told to whoever asked for it, and
answered to the call ``links``, as a list of maps like those of ``control.topology``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from control.link_exchange import (
    TOKEN_BYTES,
    ExchangeFailed,
    Limits,
    answer,
    listen,
    measure,
)
from control.topology import Kind, Link

log = logging.getLogger("control.link_probe")

NAME = "link_probe"
_TICK = Atom("tick")
_MEASURED = Atom("measured")


class Transport(Protocol):
    """How a peer is measured."""

    async def measure(self, peer: str) -> tuple[float, float]:
        """Latency one way in seconds, and bytes a second. Raises ExchangeFailed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often.

    Attributes:
        every_s: between two exchanges of this machine.
        again_s: before a peer is measured anew; after a failure a quarter of it.
        spread: part of ``every_s`` by which it varies, so that machines do not go in step.
    """

    every_s: float = 2.0
    again_s: float = 300.0
    spread: float = 0.5


@dataclass(slots=True)
class Book:
    """What is known of each peer; pure.

    Attributes:
        tried_s: when each was last measured or failed.
        links: what was found.
    """

    tried_s: dict[str, float] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)

    def next_peer(
        self, peers: Sequence[str], now_s: float, again_s: float, *, busy: bool
    ) -> str | None:
        """Whom to measure: never tried first, then longest ago; None while nobody is due.

        Peers that are gone are forgotten.
        """
        for gone in set(self.tried_s) - set(peers):
            del self.tried_s[gone]
            self.links.pop(gone, None)
        new = sorted(peer for peer in peers if peer not in self.tried_s)
        if new:
            return new[0]
        due = [
            (tried_s, peer)
            for peer, tried_s in self.tried_s.items()
            if now_s - tried_s >= (again_s if peer in self.links else again_s / 4)
        ]
        return min(due)[1] if due and not busy else None


class LinkProbe(GenServer):
    """Measures and answers exchanges of others.

    Args:
        transport: measures a peer.
        host: address of this machine that peers reach, for their exchanges.
        peers: names of the nodes that are up.
        kind_of: what the link to a peer is made of.
        found: is told of every measurement.
        busy: whether this machine has something better to do.
        now_s, random: a clock, and a number from 0 to 1.
    """

    def __init__(
        self,
        transport: Transport,
        host: str,
        *,
        peers: Callable[[], Sequence[str]],
        kind_of: Callable[[str], Kind],
        found: Callable[[str, Link], None],
        busy: Callable[[], bool],
        now_s: Callable[[], float],
        random: Callable[[], float],
        pace: Pace | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        self._transport, self._host = transport, host
        self._peers, self._kind_of, self._found, self._busy = peers, kind_of, found, busy
        self._now_s, self._random = now_s, random
        self._pace, self._limits = pace or Pace(), limits or Limits()
        self._measuring = ""
        self._answering = False
        self.book = Book()

    def format_state(self) -> Term:
        return {Atom("links"): self._links(), Atom("measuring"): self._measuring}

    async def init(self, me: Process) -> None:
        self._arm(me)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "links":
                return self._links()
            case ("open", bytes(token)) if len(token) == TOKEN_BYTES:
                return await self._open(token)
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case "tick":
                self._arm(self.me)
                if not self._measuring:
                    self._begin()
            case ("measured", str(peer), float(latency_s), float(bytes_per_s)):
                self._measuring = ""
                link = Link(self._kind_of(peer), latency_s, bytes_per_s)
                self.book.links[peer] = link
                self._found(peer, link)
            case ("measured", str(peer), str(why)):
                self._measuring = ""
                log.info("cannot measure the link to %s: %s", peer, why)
            case "answered":
                self._answering = False
            case _:
                await super().handle_info(message)

    # -- inside ----------------------------------------------------------------------------

    def _arm(self, me: Process) -> None:
        pace = self._pace
        after_s = pace.every_s * (1 + pace.spread * (self._random() - 0.5))
        me.send_after(after_s, me.pid, _TICK)

    def _begin(self) -> None:
        now_s = self._now_s()
        peer = self.book.next_peer(self._peers(), now_s, self._pace.again_s, busy=self._busy())
        if peer is None:
            return
        self.book.tried_s[peer] = now_s
        self._measuring = peer
        server = self.me.pid

        async def run(me: Process) -> None:
            try:
                latency_s, bytes_per_s = await self._transport.measure(peer)
            except ExchangeFailed as exc:
                me.send(server, (_MEASURED, peer, str(exc)))
            else:
                me.send(server, (_MEASURED, peer, latency_s, bytes_per_s))

        self.me.spawn(run, link=True, label=f"measures {peer}")

    async def _open(self, token: bytes) -> Term:
        """Listen for one exchange; another at the same time would spoil both."""
        if self._answering:
            return (Atom("error"), Atom("busy"))
        try:
            listener = listen(self._host)
        except OSError as exc:
            return (Atom("error"), str(exc))
        self._answering, server = True, self.me.pid
        tcp_port = int(listener.getsockname()[1])

        async def run(me: Process) -> None:
            try:
                await asyncio.to_thread(answer, listener, token, self._limits)
            except ExchangeFailed as exc:
                log.info("an exchange broke off: %s", exc)
            finally:
                me.send(server, Atom("answered"))

        self.me.spawn(run, link=True, label="answers an exchange")
        return (Atom("ok"), tcp_port)

    def _links(self) -> list[Term]:
        return [
            {
                Atom("from"): self.me.node.name,
                Atom("to"): Atom(peer),
                Atom("kind"): Atom(link.kind.value),
                Atom("latency_s"): link.latency_s,
                Atom("bytes_per_s"): link.bytes_per_s,
            }
            for peer, link in sorted(self.book.links.items())
        ]


class TcpTransport:
    """An exchange with the ``link_probe`` of a peer, which is asked for a port first.

    Args:
        node: this one, connected with its peers.
        address_of: where a peer's machine is reached.
    """

    def __init__(
        self, node: Node, address_of: Callable[[str], str], limits: Limits | None = None
    ) -> None:
        self._node, self._address_of, self._limits = node, address_of, limits or Limits()

    async def measure(self, peer: str) -> tuple[float, float]:
        """See ``Transport``."""
        token = secrets.token_bytes(TOKEN_BYTES)
        dest = (NAME, peer)
        request: Any = (Atom("open"), token)
        try:
            reply = await gen_server.node_call(
                self._node, dest, request, timeout_s=self._limits.timeout_s
            )
        except gen_server.CallError as exc:
            raise ExchangeFailed(f"{peer} does not answer: {type(exc).__name__}") from None
        match reply:
            case ("ok", int(tcp_port)):
                address = (self._address_of(peer), tcp_port)
                return await asyncio.to_thread(measure, address, token, self._limits)
            case _:
                raise ExchangeFailed(f"{peer} does not listen: {str(reply)[:80]}")
