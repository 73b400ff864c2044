"""A node: its processes and its links to other nodes."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import Final

from bridge import gen_server
from bridge.connection import MAX_OUTBOUND_BYTES
from bridge.epmd import Epmd
from bridge.exit_signals import KILLED
from bridge.global_names import GlobalNameServer
from bridge.kernel_servers import NetKernelServer
from bridge.local_node import LocalNode, ProcessInfo
from bridge.net_kernel import NetKernel
from bridge.network import NoNetwork
from bridge.routes import Routes
from bridge.rpc import Functions, Rpc
from bridge.term import Atom

__all__ = ["Node", "ProcessInfo"]

_log: Final = logging.getLogger("bridge.node")

CONNECT_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


class Node(LocalNode):
    """An Erlang node. Without ``start()`` it is on its own: processes, but no peers.

    Args:
        name: ``NAME@HOST``.
        cookie: the shared secret; never logged.
        hidden: not listed by peers' ``nodes/0``, and not made to connect to all others.
        creation: tells this life of the node from its earlier ones; None draws one.
        net_ticktime_s: seconds of silence after which a peer counts as lost.
        tls: server and client contexts: distribution over TLS with peers that do the same.
        max_outbound_bytes: kept for a peer that reads slowly, before its link is dropped.

    Attributes:
        functions: what peers may call by ``rpc``, ``erpc`` and ``spawn_request``; add to it.
    """

    def __init__(
        self,
        name: str,
        cookie: str,
        *,
        hidden: bool = False,
        creation: int | None = None,
        net_ticktime_s: float = 60.0,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        max_outbound_bytes: int = MAX_OUTBOUND_BYTES,
    ) -> None:
        super().__init__(name, creation)
        self.hidden: Final = hidden
        self.net_ticktime_s: Final = net_ticktime_s
        self.address: tuple[str, int] | None = None  # where it listens
        self.functions: Final[Functions] = {}
        self._cookie = cookie
        self._tls = tls
        self._max_outbound_bytes = max_outbound_bytes
        self._kernel: NetKernel | None = None

    def __repr__(self) -> str:
        return f"Node({str(self.name)!r})"

    async def start(
        self, *, listen: tuple[str | Sequence[str], int] | None, epmd: Epmd | None
    ) -> None:
        """Join the network.

        Args:
            listen: host and port (0 takes a free one); None only connects to others. Several
                hosts need a port that is free on all of them.
            epmd: made to know this node while it lives; None leaves it out.

        Raises:
            OSError: the address cannot be bound.
            EpmdError: EPMD cannot be had, or knows a live node of this name (NameTaken).
        """
        assert self._kernel is None, "a node starts once"
        kernel = NetKernel(
            self,
            self._cookie,
            Rpc(self.functions).spawn,
            epmd=epmd,
            tls=self._tls,
            max_outbound_bytes=self._max_outbound_bytes,
        )
        # Before the first peer can get in: it may ask for them at once.
        self._kernel = kernel
        self.network = Routes(kernel)
        servers = [await gen_server.start(self, NetKernelServer(), name="net_kernel")]
        if not self.hidden:
            server = GlobalNameServer()
            servers.append(await gen_server.start(self, server, name="global_name_server"))
        try:
            self.address = await kernel.start(listen)
        except BaseException:
            self.network, self._kernel = NoNetwork(self), None
            for pid in servers:
                self.exit(pid, pid, Atom("kill"))
            raise

    async def stop(self) -> None:
        """Leave the network and end every process. Never raises."""
        kernel, self._kernel = self._kernel, None
        self.network = NoNetwork(self)  # peers learn one thing: the link is gone
        tasks = [p.task for p in self._table.values() if p.task is not None]
        for process in list(self._table.values()):
            self.terminate(process, KILLED)
        if kernel is not None:
            await kernel.stop()
        pending = [task for task in tasks if task is not asyncio.current_task()]
        if pending:
            _, late = await asyncio.wait(pending, timeout=STOP_TIMEOUT_S)
            for task in late:
                _log.error("%s does not stop: %s", self.name, task)

    async def connect(
        self,
        node_name: str,
        *,
        address: tuple[str, int] | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> bool:
        """Have a link to ``node_name``: True once it is there. Sending connects by itself.

        Args:
            address: host and port, also for every later connection; None asks EPMD.
        """
        if self._kernel is None:
            return False
        return await self._kernel.connect(node_name, address, timeout_s)

    def disconnect(self, node_name: str) -> bool:
        """Cut the link; its processes get ``noconnection``. False if there is none."""
        return self._kernel is not None and self._kernel.disconnect(node_name)

    def nodes(self, *, hidden: bool = False) -> list[Atom]:
        """Connected nodes: the visible ones, or with ``hidden`` all."""
        return self._kernel.nodes(hidden=hidden) if self._kernel else []

    def outbound_bytes(self, node_name: str) -> int:
        """Bytes written to ``node_name`` that it has not read yet."""
        return self._kernel.outbound_bytes(node_name) if self._kernel else 0
