"""The registered process ``link_probe``: how far and how wide the links of this machine are.

=========================  ================================================================
call ``links``             what this machine measured: a list of maps as in ``control.topology``
call ``topology``          the same of all machines that are up, some seconds old at most
call ``{open, Token,       ``{ok, TcpPort}``: listens at ``Host`` for one exchange of another
Host}``                    machine, or ``{error, busy}``, ``{error, Text}``
=========================  ================================================================

One peer at a time, the one that was measured longest ago; a machine that is busy measures only
peers that nobody has measured yet. Who is up, and where, ``membership`` says.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from bridge.text import text_of
from control.link_exchange import (
    TOKEN_BYTES,
    ExchangeFailed,
    Limits,
    answer,
    listen,
    measure,
)
from control.meeting import link_kind, meet, reaches_from
from control.topology import Link, Topology

log = logging.getLogger("control.link_probe")

NAME: Final = "link_probe"
ASK_S: Final = 2.0  # that one machine may take to tell its links
FRESH_S: Final = 5.0  # how long the answers of all machines are kept
_TICK: Final = Atom("tick")
_MEASURED: Final = Atom("measured")
_MEMBERSHIP: Final = Atom("membership")


class PeerBusy(ExchangeFailed):
    """The peer is just being measured by somebody else."""


class Transport(Protocol):
    """How a peer is measured."""

    async def measure(self, me: Process, peer: str) -> Link:
        """The link there. Raises ExchangeFailed, PeerBusy."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often.

    Attributes:
        every_s: between two exchanges of this machine; new_s: where there is a new peer.
        again_s: before a peer is measured anew; after a failure a quarter of it.
        busy_s: before one is asked again that was busy.
        spread: part of the wait by which it varies, so that machines do not go in step.
    """

    every_s: float = 2.0
    new_s: float = 0.5
    again_s: float = 300.0
    busy_s: float = 1.0
    spread: float = 0.5


@dataclass(slots=True)
class Book:
    """What is known of each peer; pure.

    Attributes:
        due_s: when each is to be measured that was tried before.
        links: what was found.
    """

    due_s: dict[str, float] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)

    def keep(self, peers: Sequence[str]) -> None:
        """Forget those that are gone."""
        for gone in set(self.due_s) - set(peers):
            del self.due_s[gone]
            self.links.pop(gone, None)

    def next_peer(self, peers: Sequence[str], now_s: float, *, busy: bool) -> str | None:
        """Whom to measure: never tried first, then who is due longest; None while nobody is.

        Where this machine is ``busy``, only such whose link is not known.
        """
        new = sorted(peer for peer in peers if peer not in self.due_s)
        if new:
            return new[0]
        due = [
            (due_s, peer)
            for peer, due_s in self.due_s.items()
            if now_s >= due_s and not (busy and peer in self.links)
        ]
        return min(due)[1] if due else None


class LinkProbe(GenServer):
    """Measures and answers exchanges of others.

    Args:
        transport: measures a peer.
        hosts: addresses of this machine at which exchanges may be answered.
        inside: what its own GPUs are linked by; None where there are not several.
        busy: whether this machine has something better to do.
        now_s, random: a clock, and a number from 0 to 1.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hosts: Callable[[], Sequence[str]],
        inside: Callable[[], Link | None] = lambda: None,
        busy: Callable[[], bool],
        now_s: Callable[[], float],
        random: Callable[[], float],
        pace: Pace | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        self._transport, self._hosts, self._busy = transport, hosts, busy
        self._inside = inside
        self._own: Link | None = None
        self._now_s, self._random = now_s, random
        self._pace, self._limits = pace or Pace(), limits or Limits()
        self._peers: set[str] = set()
        self._measuring = ""
        self._answering = False
        self._gathered: tuple[float, list[Term]] | None = None
        self._waiting: list[Term] = []  # From of who asked for the topology
        self.book = Book()

    def format_state(self) -> Term:
        return {Atom("links"): self._links(), Atom("measuring"): self._measuring}

    async def init(self, me: Process) -> None:
        _, nodes = await gen_server.call(me, _MEMBERSHIP, (Atom("subscribe"), me.pid))
        self._peers = {str(node) for node in nodes}
        self._own = await asyncio.to_thread(self._inside)
        self._arm(me)

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "links":
                return self._links()
            case "topology":
                return self._topology(from_)
            case ("open", bytes(token), host) if len(token) == TOKEN_BYTES:
                return await self._open(token, text_of(host))
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case "tick":
                self._arm(self.me)
                if not self._measuring:
                    self._begin()
            case ("measured", str(peer), Link() as link):
                self._measuring = ""
                if peer in self._peers:
                    self.book.due_s[peer] = self._now_s() + self._pace.again_s
                    self.book.links[peer] = link
            case ("measured", str(peer), float(wait_s), str(why)):
                self._measuring = ""
                if peer in self._peers:
                    self.book.due_s[peer] = self._now_s() + wait_s
                log.info("cannot measure the link to %s: %s", peer, why)
            case ("node_up", str(node)):
                self._peers.add(str(node))
            case ("node_down", str(node)):
                self._peers.discard(str(node))
                self.book.keep(list(self._peers))
            case ("gathered", list(links)):
                self._tell_all(links)
            case "answered":
                self._answering = False
            case _:
                await super().handle_info(message)

    # -- measuring -------------------------------------------------------------------------

    def _arm(self, me: Process) -> None:
        pace = self._pace
        wait_s = pace.new_s if self._peers - set(self.book.due_s) else pace.every_s
        after_s = wait_s * (1 + pace.spread * (self._random() - 0.5))
        me.send_after(after_s, me.pid, _TICK)

    def _begin(self) -> None:
        peer = self.book.next_peer(list(self._peers), self._now_s(), busy=self._busy())
        if peer is None:
            return
        self._measuring = peer
        server, pace = self.me.pid, self._pace

        async def run(me: Process) -> None:
            try:
                link = await self._transport.measure(me, peer)
            except PeerBusy as exc:
                me.send(server, (_MEASURED, peer, pace.busy_s, str(exc)))
            except ExchangeFailed as exc:
                me.send(server, (_MEASURED, peer, pace.again_s / 4, str(exc)))
            else:
                me.send(server, (_MEASURED, peer, link))

        self.me.spawn(run, link=True, label=f"measures {peer}")

    async def _open(self, token: bytes, host: str) -> Term:
        """Listen for one exchange; another at the same time would spoil both."""
        if self._answering:
            return (Atom("error"), Atom("busy"))
        if host not in self._hosts():
            return (Atom("error"), f"{host} is no address that this node listens on")
        try:
            listener = listen(host)
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

    # -- answers ---------------------------------------------------------------------------

    def _links(self) -> list[Term]:
        topology = Topology()
        own = str(self.me.node.name)
        topology.add_node(own)
        if self._own is not None:
            topology.set_link(own, own, self._own)
        for peer, link in self.book.links.items():
            topology.set_link(own, peer, link)
        return topology.to_term()

    def _topology(self, from_: Term) -> Term:
        if self._gathered is not None and self._now_s() - self._gathered[0] < FRESH_S:
            return self._gathered[1]
        self._waiting.append(from_)
        if len(self._waiting) == 1:
            peers, server, own = sorted(self._peers), self.me.pid, self._links()

            async def run(me: Process) -> None:
                links = await _gather(me.node, peers, own)
                me.send(server, (Atom("gathered"), links))

            self.me.spawn(run, link=True, label="asks for links")
        return NOREPLY

    def _tell_all(self, links: list[Term]) -> None:
        self._gathered = self._now_s(), links
        waiting, self._waiting = self._waiting, []
        for from_ in waiting:
            gen_server.reply(self.me, from_, links)


async def _gather(node: Node, peers: Sequence[str], own: list[Term]) -> list[Term]:
    """The links of all machines; of one that does not answer only those that lead there."""

    async def ask(peer: str) -> list[Term]:
        try:
            found = await gen_server.node_call(
                node, (Atom(NAME), Atom(peer)), Atom("links"), timeout_s=ASK_S
            )
            Topology.from_term(found)
        except (gen_server.CallError, ValueError) as exc:
            log.info("%s does not tell its links: %s", peer, exc)
            return [{Atom("from"): Atom(peer)}]
        return list(found)

    whole = Topology.from_term(own)
    for found in await asyncio.gather(*(ask(peer) for peer in peers)):
        part = Topology.from_term(found)
        for name in part.nodes:
            whole.add_node(name)
        for source, target, link in part.links():
            whole.set_link(source, target, link)
    return whole.to_term()


class TcpTransport:
    """An exchange with the ``link_probe`` of a peer, which is asked for a port first.

    Both meet where ranks on them would (``control.meeting``).
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    async def measure(self, me: Process, peer: str) -> Link:
        """See ``Transport``."""
        own = str(me.node.name)
        try:
            rows = await gen_server.call(me, _MEMBERSHIP, Atom("nodes"), timeout_s=ASK_S)
            reaches = {
                str(row["name"]): reaches_from(row["addresses"])
                for row in rows
                if row["name"] in (own, peer)
            }
            met = meet({own: reaches[own], peer: reaches[peer]})
        except (gen_server.CallError, KeyError, TypeError, ValueError) as exc:
            raise ExchangeFailed(f"no address of {peer} is known: {exc!r}") from None
        token, host = secrets.token_bytes(TOKEN_BYTES), met[peer].host
        request: Any = (Atom("open"), token, host)
        try:
            reply = await gen_server.call(
                me, (Atom(NAME), Atom(peer)), request, timeout_s=self._limits.timeout_s
            )
        except gen_server.CallError as exc:
            raise ExchangeFailed(f"{peer} does not answer: {type(exc).__name__}") from None
        match reply:
            case ("ok", int(tcp_port)):
                figures = await asyncio.to_thread(measure, (host, tcp_port), token, self._limits)
                return Link(link_kind(met[own], met[peer]), *figures)
            case ("error", "busy"):
                raise PeerBusy(f"{peer} is being measured by another machine")
            case _:
                raise ExchangeFailed(f"{peer} does not listen: {str(reply)[:80]}")
