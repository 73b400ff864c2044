"""The other nodes of this machine: those that its EPMD knows and that have our cookie."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from bridge import epmd
from bridge.errors import EpmdError
from control.discovery.candidates import REFUSED_RETRY_S, Address, Candidate, Identity
from control.discovery.identify import NotIdentified, identify


class EpmdStrategy:
    """Asks every node that EPMD knows who it is, once a life; later where it refused.

    Args:
        epmd_port: of this machine's EPMD.
        tls: client context where the nodes speak TLS.
    """

    name = "epmd"
    period_s = 1.0

    def __init__(
        self, identity: Identity, *, epmd_port: int, tls: ssl.SSLContext | None = None
    ) -> None:
        self._identity, self._epmd_port, self._tls = identity, epmd_port, tls
        self._own_name, _, self._host = identity.node.partition("@")
        self._known: dict[tuple[str, int], tuple[Candidate, float]] = {}

    async def look(self) -> Sequence[Candidate]:
        try:
            listed = await epmd.names("127.0.0.1", self._epmd_port)
        except EpmdError:  # between two EPMDs: what was found stays
            return [candidate for candidate, _ in self._known.values()]
        there = [entry for entry in listed if entry[0] != self._own_name]
        self._known = {entry: self._known[entry] for entry in there if entry in self._known}
        now_s = asyncio.get_running_loop().time()
        new = [entry for entry in there if self._ask_again_s(entry) <= now_s]
        found = await asyncio.gather(*(self._who(*entry) for entry in new))
        for entry, candidate in zip(new, found, strict=True):
            self._known[entry] = (candidate, now_s + REFUSED_RETRY_S)
        return [candidate for candidate, _ in self._known.values()]

    async def stop(self) -> None:
        """Nothing is held."""

    def _ask_again_s(self, entry: tuple[str, int]) -> float:
        if entry not in self._known:
            return 0.0
        candidate, again_s = self._known[entry]
        return again_s if candidate.refused else float("inf")

    async def _who(self, short_name: str, port: int) -> Candidate:
        why = ""
        for host in dict.fromkeys(("127.0.0.1", self._host)):
            address = Address(host, port)
            try:
                node = await identify(
                    address, host=self._host, cookie=self._identity.cookie, tls=self._tls
                )
                return Candidate(node=node, addresses=(address,), source=self.name)
            except NotIdentified as exc:
                why = exc.why
                if exc.refused:
                    break
        return Candidate(
            node=f"{short_name} (port {port})", addresses=(), source=self.name, refused=why
        )
