"""Runs the gateway's app on a socket inside the control process's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from control.errors import ControlError
from control.gateway.protocol import MAX_HEAD_BYTES, limited

BACKLOG = 2048
GRACE_S = 2.0  # for tasks that were cancelled because the drain took too long


class AddressUnavailable(ControlError):
    """The HTTP address cannot be bound."""

    kind = "address_unavailable"

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(host, port, why)
        self.host, self.port, self.why = host, port, why

    def __str__(self) -> str:
        return (
            f"cannot listen on {self.host}:{self.port}: {self.why}. Stop what uses the address, "
            "or choose another with `ctl start --http HOST:PORT` (port 0 takes any free one)."
        )


class TlsUnusable(ControlError):
    """The files for TLS cannot be used."""

    kind = "tls_unusable"

    def __init__(self, tls: ServerTls, why: str) -> None:
        super().__init__(tls, why)
        self.tls, self.why = tls, why

    def __str__(self) -> str:
        files = f"{self.tls.certificate} and {self.tls.key}"
        return (
            f"{files} are no certificate with its unlocked key: {self.why}. Correct http.tls in "
            "config.yaml, or say `tls: true` to have them made."
        )


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Paths of PEM files: the endpoint's certificate (chain), and its private key."""

    certificate: str
    key: str

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 and newer; clients show no certificate. Raises TlsUnusable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # An empty password: a locked key is an error, not a question to the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as exc:
            raise TlsUnusable(self, str(exc)) from exc
        context.set_alpn_protocols(["http/1.1"])
        return context


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the node decides when to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """One listening socket in front of one app. ``start`` once, ``stop`` once."""

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str = "127.0.0.1",
        port: int = 52415,
        tls: ServerTls | None = None,
    ) -> None:
        self._app, self._host, self._port, self._tls = app, host, port, tls
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; return the bound host and port once requests are answered.

        Raises:
            AddressUnavailable: the address is in use, foreign, or not permitted.
            TlsUnusable: the certificate or its key is.
        """
        context = self._tls.context() if self._tls else None
        listener = await _listen(self._host, self._port)
        config = uvicorn.Config(
            self._app,
            http=limited(self._app.state.gateway.settings.receive_timeout_s),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_context_factory=(lambda *_: context) if context else None,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # requests carry secrets in headers and paths; metrics count them
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve([listener]), name="http_server")
        answering = asyncio.create_task(self._server.answering.wait())
        await asyncio.wait({answering, self._task}, return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        if self._task.done():
            listener.close()
            await self._task
        host, port = listener.getsockname()[:2]
        return str(host), int(port)

    async def wait(self) -> None:
        """Return when the server has ended; raise what ended it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self, drain_s: float) -> None:
        """Refuse new connections, let running requests finish for ``drain_s``, cancel the rest."""
        server, task = self._server, self._task
        if server is None or task is None:
            return
        self._app.state.gateway.stopping.set()
        server.config.timeout_graceful_shutdown = drain_s  # type: ignore[assignment]
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        left = set(server.server_state.tasks)
        if left:
            await asyncio.wait(left, timeout=GRACE_S)
        for connection in list(server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def abort(self) -> None:
        """Close everything at once: the owner died and cannot drain."""
        if self._server is None or self._task is None:
            return
        self._task.cancel()
        for server in getattr(self._server, "servers", ()):
            server.close()
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


async def check_address(host: str, port: int) -> None:
    """Whether ``host:port`` can be listened on now. Raises AddressUnavailable."""
    (await _listen(host, port)).close()


async def _listen(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise AddressUnavailable(host, port, exc.strerror or str(exc)) from exc
    try:
        if hasattr(socket, "SO_REUSEADDR") and hasattr(socket, "AF_UNIX"):
            # On Windows this option would let a second server take the address over.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise AddressUnavailable(host, port, exc.strerror or str(exc)) from exc
    return listener
