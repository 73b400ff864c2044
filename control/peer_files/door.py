"""The TCP door: hands out ranges of files to whoever brings a token, and is shut otherwise.

It listens on the node's own addresses while tokens wait or connections live. All of it runs in
threads, so that a busy event loop does not hold a transfer up and a transfer not the loop. After
its token a connection sends requests ``file:u32 start:u64 length:u32``, any number ahead; each
is answered by a zero byte and the bytes, or by the connection's end.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from control.link_exchange import listen
from control.peer_files.chunks import CHUNK_BYTES, MAX_RUN_CHUNKS
from control.peer_files.offer import TOKEN_BYTES

log = logging.getLogger("control.peer_files")

REQUEST: Final = struct.Struct("!IQI")
READY: Final = b"\0"
MAX_REQUEST_BYTES: Final = MAX_RUN_CHUNKS * CHUNK_BYTES
_SELECT_S: Final = 0.5


class Served(Protocol):
    """What a token opens."""

    def open(self, file: int, start: int, length: int) -> contextlib.AbstractContextManager[int]:
        """A file descriptor to read those bytes from. Raises OSError, ValueError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """How patient and how wide a door is.

    Attributes:
        token_s: until a token that nobody has brought is void.
        greet_s: for a connection to show its token.
        idle_s: silence after which a connection is closed.
        linger_s: from the last connection to the closing of the listener.
    """

    max_connections: int = 64
    token_s: float = 60.0
    greet_s: float = 5.0
    idle_s: float = 30.0
    linger_s: float = 5.0


class Door:
    """Opened by ``admit``; closes itself."""

    def __init__(
        self, hosts: Callable[[], Sequence[str]], limits: DoorLimits | None = None
    ) -> None:
        """``hosts``: addresses of this node that peers reach."""
        self._hosts, self._limits = hosts, limits or DoorLimits()
        self._lock = threading.Lock()
        self._tokens: dict[bytes, tuple[Served, float]] = {}  # -> what it opens, void at
        self._connections: set[socket.socket] = set()
        self._doors: tuple[tuple[str, int], ...] = ()
        self._closing = False

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return bool(self._doors)

    def admit(
        self, served: Served, count: int
    ) -> tuple[tuple[tuple[str, int], ...], tuple[bytes, ...]]:
        """Addresses to connect to, and ``count`` tokens for it. Raises OSError."""
        tokens = tuple(secrets.token_bytes(TOKEN_BYTES) for _ in range(count))
        with self._lock:
            if not self._doors:
                listeners = _listeners(self._hosts())
                self._doors = tuple((s.getsockname()[0], s.getsockname()[1]) for s in listeners)
                threading.Thread(
                    target=self._accept, args=(listeners,), name="file door", daemon=True
                ).start()
            void_s = time.monotonic() + self._limits.token_s
            self._tokens.update((token, (served, void_s)) for token in tokens)
            return self._doors, tokens

    def close(self) -> None:
        """Cut every connection and stop listening."""
        with self._lock:
            self._closing = True
            self._tokens.clear()
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listeners: Sequence[socket.socket]) -> None:
        quiet_since_s = time.monotonic()
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for listener in listeners:
                stack.enter_context(listener)
                listener.settimeout(0)
                selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(_SELECT_S):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        self._take(key.fileobj.accept()[0])
                now_s = time.monotonic()
                with self._lock:
                    for token in [t for t, (_, void_s) in self._tokens.items() if void_s < now_s]:
                        del self._tokens[token]
                    if self._tokens or self._connections:
                        quiet_since_s = now_s
                    if self._closing or now_s - quiet_since_s > self._limits.linger_s:
                        self._doors = ()
                        return

    def _take(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closing or len(self._connections) >= self._limits.max_connections:
                connection.close()
                return
            self._connections.add(connection)
        threading.Thread(
            target=self._serve, args=(connection,), name="file door connection", daemon=True
        ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(self._limits.greet_s)
                served = self._redeem(_exactly(connection, TOKEN_BYTES))
                if served is None:
                    log.warning("a connection to the file door came without a valid token")
                    return
                connection.settimeout(self._limits.idle_s)
                while True:
                    file, start, length = REQUEST.unpack(_exactly(connection, REQUEST.size))
                    if not 0 < length <= MAX_REQUEST_BYTES:
                        raise ValueError(f"a request of {length} bytes")
                    with served.open(file, start, length) as descriptor:
                        connection.sendall(READY)
                        _send(connection, descriptor, start, length)
        except EOFError:
            pass  # the other end has all it wanted
        except (OSError, ValueError) as exc:
            log.info("a transfer of files broke off: %s", exc)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _redeem(self, shown: bytes) -> Served | None:
        """What a token opens, which is void from now on; looked for in constant time."""
        with self._lock:
            found = None
            for token in self._tokens:
                if hmac.compare_digest(token, shown):
                    found = token
            return self._tokens.pop(found)[0] if found is not None else None


def _listeners(hosts: Sequence[str]) -> list[socket.socket]:
    """One on each address that can be had. Raises OSError where none can."""
    found: list[socket.socket] = []
    failure = OSError("this node has no address of its own to serve files at")
    for host in hosts:
        try:
            found.append(listen(host, backlog=16))
        except OSError as exc:
            failure = exc
    if not found:
        raise failure
    return found


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Raises EOFError where the stream ends before."""
    kept = b""
    while len(kept) < size:
        part = connection.recv(size - len(kept))
        if not part:
            raise EOFError
        kept += part
    return kept


def _send(connection: socket.socket, descriptor: int, start: int, length: int) -> None:
    """From the page cache into the connection, without a copy where the system can."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        sent = connection.sendfile(file, start, length)
    if sent != length:
        raise OSError(f"the file ended after {sent} of {length} bytes")
