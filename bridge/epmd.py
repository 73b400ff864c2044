"""EPMD from a node's side: which TCP port a node listens on, and making ours known.

`lookup` and `names` ask any host. `Epmd` keeps this node registered for its whole life: where
no EPMD runs, it serves one itself; when the one it uses dies, the nodes of the machine race
to serve the next, and register again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Final

from bridge.epmd_codec import (
    ALIVE2_RESP,
    ALIVE2_X_RESP,
    NAMES_REQ,
    PORT2_RESP,
    PORT_PLEASE2_REQ,
    NodeEntry,
    alive_request,
    read_names,
    read_node,
    request,
)
from bridge.epmd_server import EpmdServer
from bridge.errors import EpmdError, NameTaken

DEFAULT_TCP_PORT: Final = 4369
TIMEOUT_S: Final = 5.0

_MAX_ANSWER_BYTES: Final = 1 << 20
_RETRY_S: Final = (0.05, 0.2, 1.0, 5.0)  # pauses after 1, 2, 3 and more failed registrations


def epmd_port() -> int:
    """ERL_EPMD_PORT, as for stock nodes, or 4369. Raises EpmdError: it is no port."""
    text = os.environ.get("ERL_EPMD_PORT", str(DEFAULT_TCP_PORT))
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise EpmdError(f"ERL_EPMD_PORT is {text!r}: a port from 1 to 65535 is needed")
    return int(text)


async def lookup(
    name: str,
    host: str = "127.0.0.1",
    tcp_port: int | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
) -> NodeEntry | None:
    """The node called ``name`` (before its ``@``) on ``host``; None if it is not there.

    Raises:
        EpmdError: no EPMD answers on ``host``.
    """
    async with _connection(host, tcp_port, timeout_s) as (reader, writer):
        writer.write(request(bytes((PORT_PLEASE2_REQ,)) + name.encode()))
        answer = await _read_all(reader)
    if len(answer) < 2 or answer[0] != PORT2_RESP:
        raise EpmdError(f"EPMD of {host} answers {answer[:20]!r}")
    return read_node(answer, 2) if answer[1] == 0 else None


async def names(
    host: str = "127.0.0.1", tcp_port: int | None = None, *, timeout_s: float = TIMEOUT_S
) -> list[tuple[str, int]]:
    """Names and TCP ports of all nodes on ``host``. Raises EpmdError."""
    async with _connection(host, tcp_port, timeout_s) as (reader, writer):
        writer.write(request(bytes((NAMES_REQ,))))
        return read_names(await _read_all(reader))


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    while more := await reader.read(4096):
        answer += more
        if len(answer) > _MAX_ANSWER_BYTES:
            raise EpmdError(f"EPMD answers with more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


@contextlib.asynccontextmanager
async def _connection(
    host: str, tcp_port: int | None, timeout_s: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for one question; every failure is an EpmdError."""
    port = epmd_port() if tcp_port is None else tcp_port
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                yield reader, writer
            finally:
                writer.close()
    except TimeoutError as exc:
        raise EpmdError(f"EPMD at {host}:{port} is silent for {timeout_s} s") from exc
    except OSError as exc:
        raise EpmdError(f"no EPMD at {host}:{port}: {exc}") from exc


class Registration:
    """A name that EPMD holds for as long as this connection is open."""

    def __init__(
        self, creation: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.creation = creation
        self._reader, self._writer = reader, writer

    async def wait_lost(self) -> None:
        """Return when EPMD is gone, and the name with it."""
        with contextlib.suppress(OSError):
            while await self._reader.read(64):
                pass

    def close(self) -> None:
        """Give the name back."""
        self._writer.close()


async def register(
    node: NodeEntry,
    host: str = "127.0.0.1",
    tcp_port: int | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
) -> Registration:
    """Make ``node`` known.

    Raises:
        NameTaken: a live node has the name.
        EpmdError: no EPMD answers.
    """
    port = epmd_port() if tcp_port is None else tcp_port
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(alive_request(node))
            tag, result = await reader.readexactly(2)
            if tag not in (ALIVE2_RESP, ALIVE2_X_RESP):
                raise EpmdError(f"EPMD at {host}:{port} answers {tag}")
            if result:
                raise NameTaken(f"EPMD at {host}:{port} has a live node named {node.name}")
            size = 4 if tag == ALIVE2_X_RESP else 2
            creation = int.from_bytes(await reader.readexactly(size), "big")
            return Registration(creation, reader, writer)
    except BaseException as exc:
        if writer is not None:
            writer.close()
        if isinstance(exc, TimeoutError):
            raise EpmdError(f"EPMD at {host}:{port} is silent for {timeout_s} s") from exc
        if isinstance(exc, OSError | EOFError):
            raise EpmdError(f"no EPMD at {host}:{port}: {exc}") from exc
        raise


class Epmd:
    """This machine's EPMD, as a node needs it: always there, and knowing the node.

    Args:
        host: where EPMD is asked and, if it must be brought, listens.
        tcp_port: None takes ERL_EPMD_PORT or 4369.
        bring: serve one in this process where none runs.
        serve_hosts: other addresses that this one listens on, for nodes of other machines.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        tcp_port: int | None = None,
        *,
        bring: bool = True,
        serve_hosts: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.tcp_port = epmd_port() if tcp_port is None else tcp_port
        self._bring = bring
        self._serve_hosts = (host, *(other for other in serve_hosts if other != host))
        self._server: EpmdServer | None = None
        self._registration: Registration | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def serving(self) -> bool:
        """Whether the EPMD of this machine runs in this process."""
        return self._server is not None

    @property
    def registered(self) -> bool:
        return self._registration is not None

    async def start(
        self, name: str, tcp_port: int, *, hidden: bool = False, timeout_s: float = TIMEOUT_S
    ) -> int:
        """Register ``name`` (before its ``@``) and keep it so until `stop`.

        Returns:
            The creation that EPMD gave; later registrations keep it.

        Raises:
            NameTaken: a live node has the name.
            EpmdError: there is no EPMD and none could be served.
        """
        node = NodeEntry(name, tcp_port, hidden)
        registration = await self._register(node, timeout_s)
        self._registration = registration
        self._keeper = asyncio.create_task(self._keep(node, registration, timeout_s))
        return registration.creation

    async def stop(self) -> None:
        """Give the name back; nodes that used our server start their own."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        if self._registration is not None:
            self._registration.close()
            self._registration = None
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def lookup(
        self, name: str, host: str | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> NodeEntry | None:
        """As the function `lookup`, at this EPMD's port; None: ask our own host."""
        return await lookup(name, host or self.host, self.tcp_port, timeout_s=timeout_s)

    async def _register(self, node: NodeEntry, timeout_s: float) -> Registration:
        try:
            return await register(node, self.host, self.tcp_port, timeout_s=timeout_s)
        except NameTaken:
            raise
        except EpmdError:
            if not self._bring or self._server is not None:
                raise
        server = EpmdServer(self._serve_hosts, self.tcp_port)
        try:
            await server.start()
        except OSError:
            pass  # another node was faster (or it is not allowed): then register says so
        else:
            self._server = server
        return await register(node, self.host, self.tcp_port, timeout_s=timeout_s)

    async def _keep(self, node: NodeEntry, registration: Registration, timeout_s: float) -> None:
        while True:
            await registration.wait_lost()
            registration.close()
            self._registration = None
            num_failed = 0
            while self._registration is None:
                try:
                    # NameTaken is no end either: the new EPMD may still hold a dead socket.
                    self._registration = await self._register(node, timeout_s)
                except EpmdError:
                    await asyncio.sleep(_RETRY_S[min(num_failed, len(_RETRY_S) - 1)])
                    num_failed += 1
            registration = self._registration
