"""Multicast DNS: this node announces itself on the local network and sees those who do the same.

One service type for all clusters; the name of the cluster and the proof of its secret are in the
TXT record (``candidates``). Announced and asked on every address that the node listens on, IPv4
and IPv6, and anew whenever the machine's links change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from control.discovery.addresses import Interface
from control.discovery.candidates import (
    SERVICE_TYPE,
    Candidate,
    Identity,
    candidate_of_service,
    service_name,
    service_text,
)

_log: Final = logging.getLogger("control.discovery")

RESOLVE_MS: Final = 3000
STOP_S: Final = 2.0
# The library warns of every link that is down; we say once that the links changed.
logging.getLogger("zeroconf").setLevel(logging.ERROR)


class ZeroconfStrategy:
    """Announces ``identity`` and keeps whom it hears.

    Args:
        hosts: addresses that this node listens on.
        port: of its distribution; 0 only looks and announces nothing.
        interfaces: reads the machine's addresses as they are now.
    """

    name = "zeroconf"
    period_s = 1.0

    def __init__(
        self,
        identity: Identity,
        *,
        hosts: Sequence[str],
        port: int,
        interfaces: Callable[[], Sequence[Interface]],
    ) -> None:
        self._identity, self._hosts, self._port = identity, frozenset(hosts), port
        self._interfaces = interfaces
        self._nonce = secrets.token_hex(8)
        self._links: frozenset[tuple[str, str]] = frozenset()
        self._open: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._found: dict[str, Candidate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def look(self) -> Sequence[Candidate]:
        links = frozenset(
            (one.name, one.address) for one in self._interfaces() if one.address in self._hosts
        )
        if links != self._links or self._open is None:
            await self._close()
            if links and not self._stopped:
                await self._start(sorted(address for _, address in links))
            self._links = links
        return list(self._found.values())

    async def stop(self) -> None:
        self._stopped = True  # a look that is under way must not begin anew
        await self._close()

    async def _close(self) -> None:
        browser, self._browser = self._browser, None
        opened, self._open = self._open, None
        for task in self._tasks:
            task.cancel()
        self._found.clear()
        with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
            async with asyncio.timeout(STOP_S):  # a goodbye that cannot be sent must not hold us
                if browser is not None:
                    await browser.async_cancel()
                if opened is not None:
                    await opened.async_unregister_all_services()
        if opened is not None:
            with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
                async with asyncio.timeout(STOP_S):
                    await opened.async_close()

    async def _start(self, addresses: list[str]) -> None:
        v6 = any(":" in address for address in addresses)
        v4 = any(":" not in address for address in addresses)
        version = IPVersion.All if v4 and v6 else IPVersion.V6Only if v6 else IPVersion.V4Only
        opened = AsyncZeroconf(interfaces=addresses or InterfaceChoice.Default, ip_version=version)
        self._open = opened
        _log.info("discovery by multicast DNS on %s", ", ".join(addresses))
        self._browser = AsyncServiceBrowser(opened.zeroconf, SERVICE_TYPE, handlers=[self._changed])
        if self._port:
            self._later(self._announce(opened, addresses))

    async def _announce(self, opened: AsyncZeroconf, addresses: list[str]) -> None:
        name = service_name(self._identity)
        try:
            info = AsyncServiceInfo(
                SERVICE_TYPE,
                name,
                port=self._port,
                properties=dict(service_text(self._identity, self._port, self._nonce)),
                server=name.removesuffix(SERVICE_TYPE) + "local.",
                addresses=[_packed(address) for address in addresses],
            )
            # The name holds ours and the cluster's: who has it already is our own former life.
            sent = await opened.async_register_service(info, cooperating_responders=True)
            await sent
        except (OSError, ZeroconfError, ValueError) as exc:  # ValueError: a name beyond 255 bytes
            _log.warning("cannot announce this node by multicast DNS: %r", exc)

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Called in the event loop by the browser, with these argument names."""
        if name == service_name(self._identity):
            return
        if state_change is ServiceStateChange.Removed:
            self._found.pop(name, None)
        else:
            self._later(self._resolve(zeroconf, name))

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        try:
            known = await info.async_request(zeroconf, RESOLVE_MS)
        except (OSError, ZeroconfError) as exc:
            _log.info("no answer about %s: %r", name, exc)
            return
        if not known or info.port is None:
            return
        hosts = info.parsed_scoped_addresses()
        candidate = candidate_of_service(self._identity, info.properties, hosts, info.port)
        if candidate is not None:
            self._found[name] = candidate

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
