"""A small EPMD for machines where none runs: registers, looks up, lists.

It answers stock nodes as the stock daemon does. Only programs of this machine may register;
nothing can be killed or stopped through it. Bad requests close their own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Final

from bridge.epmd_codec import (
    ALIVE2_REQ,
    ALIVE2_RESP,
    ALIVE2_X_RESP,
    MAX_REQUEST_BYTES,
    NAMES_REQ,
    PORT_PLEASE2_REQ,
    NodeEntry,
    names_answer,
    port_answer,
    read_node,
)
from bridge.errors import EpmdError

REQUEST_TIMEOUT_S: Final = 5.0
MAX_CONNECTIONS: Final = 1024


class EpmdServer:
    """EPMD on one TCP port; `start` binds it.

    Args:
        host: address to listen on; anything but loopback shows node names and ports to others.
        tcp_port: 0 takes a free one (then read `tcp_port`).
        request_timeout_s: for a client to send its whole request.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        tcp_port: int = 4369,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._host = host
        self.tcp_port = tcp_port
        self._request_timeout_s = request_timeout_s
        self._max_connections = max_connections
        self._nodes: dict[str, NodeEntry] = {}
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind and serve. Raises OSError: the port is taken or not allowed."""
        self._server = await asyncio.start_server(
            self._serve, self._host, self.tcp_port, limit=MAX_REQUEST_BYTES
        )
        self.tcp_port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and forget every node; their owners see the connection close."""
        if self._server is None:
            return
        self._server.close()
        clients = dict(self._clients)
        for writer in clients.values():
            writer.transport.abort()  # its task reads the end and leaves
        await asyncio.gather(*clients)
        await self._server.wait_closed()
        self._server = None

    @property
    def nodes(self) -> list[NodeEntry]:
        """What is registered now."""
        return list(self._nodes.values())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        try:
            if len(self._clients) <= self._max_connections:
                await self._answer(reader, writer)
        except (OSError, EpmdError, asyncio.IncompleteReadError, TimeoutError):
            pass  # this client's own trouble: it sees the connection close
        finally:
            del self._clients[task]
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._request_timeout_s):
            size = int.from_bytes(await reader.readexactly(2), "big")
            if not 1 <= size <= MAX_REQUEST_BYTES:
                raise EpmdError(f"request of {size} bytes")
            body = await reader.readexactly(size)
        kind = body[0]
        if kind == ALIVE2_REQ and _is_local(writer):
            await self._register(read_node(body, 1), reader, writer)
            return
        if kind == PORT_PLEASE2_REQ:
            writer.write(port_answer(self._nodes.get(body[1:].decode("utf-8", "replace"))))
        elif kind == NAMES_REQ:
            writer.write(names_answer(self.tcp_port, self.nodes))
        async with asyncio.timeout(self._request_timeout_s):
            await writer.drain()

    async def _register(
        self, node: NodeEntry, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Keep ``node`` for as long as its connection is open."""
        taken = node.name in self._nodes
        result = bytes((int(taken),))
        if node.highest_version >= 6:
            # 1 to 3 mean "unknown" to old peers.
            creation = 4 + secrets.randbelow(2**32 - 4)
            writer.write(bytes((ALIVE2_X_RESP,)) + result + creation.to_bytes(4, "big"))
        else:
            creation = 1 + secrets.randbelow(3)
            writer.write(bytes((ALIVE2_RESP,)) + result + creation.to_bytes(2, "big"))
        if taken:
            await writer.drain()
            return
        self._nodes[node.name] = node
        try:
            await writer.drain()
            while await reader.read(MAX_REQUEST_BYTES):
                pass  # nothing is expected any more; the end of it is what counts
        finally:
            del self._nodes[node.name]


def _is_local(writer: asyncio.StreamWriter) -> bool:
    """Whether the client runs on this machine: same address on both ends."""
    peer, own = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
    return bool(peer and own and peer[0] == own[0])
