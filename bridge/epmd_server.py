"""A small EPMD for machines where none runs: registers, looks up, lists.

It answers stock nodes as the stock daemon does. Only programs of this machine may register;
nothing can be killed or stopped through it. Bad requests close their own connection.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
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
        host: address or addresses to listen on; anything but loopback shows node names and ports
            to others.
        tcp_port: 0 takes a free one (then read `tcp_port`).
        request_timeout_s: for a client to send its whole request and take the answer.
        max_connections: more are closed at once; a registered node holds one.
    """

    def __init__(
        self,
        host: str | Sequence[str] = "127.0.0.1",
        tcp_port: int = 4369,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._host = host
        self.tcp_port = tcp_port
        self.request_timeout_s = request_timeout_s
        self._max_connections = max_connections
        self._nodes: dict[str, NodeEntry] = {}
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind and serve. Raises OSError: the port is taken or not allowed."""
        loop = asyncio.get_running_loop()
        # In two steps, so that `stop` knows of the socket even if this is cancelled.
        self._server = await loop.create_server(
            lambda: _Client(self), self._host, self.tcp_port, start_serving=False
        )
        self.tcp_port = self._server.sockets[0].getsockname()[1]
        await self._server.start_serving()

    async def stop(self) -> None:
        """Stop listening and forget every node; their owners see the connection close."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        await asyncio.sleep(0)  # a connection just accepted reports here first
        for client in list(self._clients):
            client.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # aborted connections end in the next turn of the loop

    @property
    def nodes(self) -> list[NodeEntry]:
        """What is registered now."""
        return list(self._nodes.values())

    def admit(self, client: _Client) -> bool:
        """Count a new connection; False: there are too many, or no more are served."""
        self._clients.add(client)
        return self._server is not None and len(self._clients) <= self._max_connections

    def forget(self, client: _Client) -> None:
        """A connection ended, and its node's registration with it."""
        self._clients.discard(client)
        if client.registered is not None:
            del self._nodes[client.registered]

    def answer(self, body: bytes, client: _Client) -> bytes:
        """The answer to one request; none for what is not served. Raises EpmdError."""
        kind = body[0]
        if kind == ALIVE2_REQ and client.is_local:
            return self._register(read_node(body, 1), client)
        if kind == PORT_PLEASE2_REQ:
            return port_answer(self._nodes.get(body[1:].decode("utf-8", "replace")))
        if kind == NAMES_REQ:
            return names_answer(self.tcp_port, self.nodes)
        return b""

    def _register(self, node: NodeEntry, client: _Client) -> bytes:
        taken = node.name in self._nodes
        if not taken:
            self._nodes[node.name] = node
            client.registered = node.name
        result = bytes((int(taken),))
        if node.highest_version >= 6:
            creation = 4 + secrets.randbelow(2**32 - 4)  # 1 to 3 are the old, short ones
            return bytes((ALIVE2_X_RESP,)) + result + creation.to_bytes(4, "big")
        creation = 1 + secrets.randbelow(3)
        return bytes((ALIVE2_RESP,)) + result + creation.to_bytes(2, "big")


class _Client(asyncio.Protocol):
    """One connection: one request, one answer; a registration stays open after it."""

    def __init__(self, server: EpmdServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self.registered: str | None = None  # name that lives as long as this connection
        self.is_local = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer, own = (transport.get_extra_info(end) for end in ("peername", "sockname"))
        self.is_local = bool(peer and own and peer[0] == own[0])
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._server.request_timeout_s, transport.abort)
        if not self._server.admit(self):
            transport.abort()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._deadline.cancel()
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        if self.registered is not None or self._transport.is_closing():
            return  # nothing more is expected
        self._buffer += data
        if len(self._buffer) < 2:
            return
        size = int.from_bytes(self._buffer[:2], "big")
        if not 1 <= size <= MAX_REQUEST_BYTES:
            self.abort()
        elif len(self._buffer) >= 2 + size:
            self._answer(bytes(self._buffer[2 : 2 + size]))

    def _answer(self, body: bytes) -> None:
        self._buffer.clear()
        try:
            self._transport.write(self._server.answer(body, self))
        except EpmdError:
            self.abort()  # the client's own trouble: it sees the connection close
            return
        if self.registered is None:
            self._transport.close()  # once the answer is taken, or the deadline passes
        else:
            self._deadline.cancel()

    def abort(self) -> None:
        self._transport.abort()
