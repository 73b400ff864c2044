"""Peers from the configuration or ``--join``: names are resolved anew at each look."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from bridge import epmd
from bridge.errors import EpmdError
from control.discovery.addresses import resolve
from control.discovery.candidates import (
    REFUSED_RETRY_S,
    Address,
    Candidate,
    Identity,
    parse_peer,
    retry_s,
)
from control.discovery.identify import TIMEOUT_S, NotIdentified, identify


@dataclass(slots=True)
class _Peer:
    """One entry: ``port`` None asks the EPMD of ``host``."""

    text: str
    host: str
    port: int | None
    found: tuple[Candidate, ...] = ()
    num_failed: int = 0
    next_s: float = 0.0


class StaticStrategy:
    """Asks each peer who it is, with backoff and jitter, while it is not connected.

    Args:
        peers: ``host`` (all nodes that its EPMD knows) or ``host:port`` (the distribution's).
        connected: names of the nodes that there is a link with.
        epmd_port: of the peers' EPMD.
        tls: client context where the nodes speak TLS.
    """

    name = "static"
    period_s = 0.5

    def __init__(
        self,
        peers: Sequence[str],
        identity: Identity,
        *,
        connected: Callable[[], Collection[str]],
        epmd_port: int,
        tls: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._peers = [_Peer(text, *parse_peer(text)) for text in peers]
        self._identity, self._connected, self._epmd_port = identity, connected, epmd_port
        self._tls = tls
        self._rng = rng or random.Random()

    async def look(self) -> Sequence[Candidate]:
        now_s = asyncio.get_running_loop().time()
        due = [peer for peer in self._peers if now_s >= peer.next_s and not self._is_there(peer)]
        await asyncio.gather(*(self._ask(peer) for peer in due))
        return [candidate for peer in self._peers for candidate in peer.found]

    async def stop(self) -> None:
        """Nothing is held."""

    def _is_there(self, peer: _Peer) -> bool:
        there, wanted = self._connected(), [one.node for one in peer.found if not one.refused]
        return bool(wanted) and all(node in there for node in wanted)

    async def _ask(self, peer: _Peer) -> None:
        found = await self._nodes_of(peer)
        good = [one for one in found if not one.refused]
        peer.found = tuple(found)
        peer.num_failed = 0 if good else peer.num_failed + 1
        wait_s = retry_s(peer.num_failed, self._rng.random())
        if found and not good and all(one.addresses for one in found):
            wait_s = REFUSED_RETRY_S * (0.5 + 0.5 * self._rng.random())  # it will say so again
        peer.next_s = asyncio.get_running_loop().time() + wait_s

    async def _nodes_of(self, peer: _Peer) -> list[Candidate]:
        hosts = await asyncio.to_thread(resolve, peer.host)
        if not hosts:
            return [self._nobody(peer, f"the name {peer.host!r} is not known")]
        why = ""
        for host in hosts:
            try:
                ports = [peer.port] if peer.port is not None else await self._ports_of(host)
            except EpmdError as exc:
                why = f"{exc}; start a node there, or name its distribution port: HOST:PORT"
                continue
            answers = await asyncio.gather(*(self._who(Address(host, port)) for port in ports))
            found = [one for one in answers if one is not None]
            if found or not ports:
                return found or [self._nobody(peer, f"the EPMD of {host} knows no node")]
            return []  # only ourselves
        return [self._nobody(peer, why)]

    async def _ports_of(self, host: str) -> list[int]:
        listed = await epmd.names(host, self._epmd_port, timeout_s=TIMEOUT_S)
        return [port for _, port in listed]

    async def _who(self, address: Address) -> Candidate | None:
        own = self._identity
        try:
            node = await identify(
                address, host=own.node.partition("@")[2], cookie=own.cookie, tls=self._tls
            )
        except NotIdentified as exc:
            there = (address,) if exc.refused else ()
            return Candidate(node=str(address), addresses=there, source=self.name, refused=exc.why)
        if node == own.node:
            return None
        return Candidate(node=node, addresses=(address,), source=self.name)

    def _nobody(self, peer: _Peer, why: str) -> Candidate:
        return Candidate(node=peer.text, addresses=(), source=self.name, refused=why)
