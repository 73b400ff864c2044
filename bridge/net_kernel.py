"""A node's connections: the listener, one attempt at a time to each peer, and who wins when two
meet.

Source: OTP ``net_kernel.erl`` and ``dist_util.erl`` for collisions and simultaneous connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from bridge import epmd as epmd_client
from bridge.connection import MAX_OUTBOUND_BYTES, Connection
from bridge.epmd import Epmd
from bridge.errors import BridgeError, HandshakeError
from bridge.flags import HIDDEN_NODE, VISIBLE_NODE
from bridge.handshake import (
    SETUP_TIMEOUT_S,
    Acceptor,
    Caller,
    Decision,
    Established,
    Initiator,
    Local,
    Named,
    Status,
)
from bridge.peer import Peer, Spawner
from bridge.term import Atom
from bridge.tls import CLOSE_TIMEOUT_S

if TYPE_CHECKING:
    from bridge.node import Node

_log: Final = logging.getLogger("bridge.net_kernel")

Address = tuple[str, int]

MAX_HANDSHAKES: Final = 128  # at a time; the oldest gives way
GRACE_S: Final = 2.0


@dataclass(slots=True)
class _State:
    """What this node has with one other: at most one of each."""

    peer: Peer
    up: Connection | None = None
    incoming: Connection | None = None  # its handshake is under way, the name only claimed
    outgoing: Connection | None = None
    attempt: asyncio.Task[None] | None = None
    # Runs where our attempt was refused in favour of the peer's own, which is on its way.
    grace: asyncio.TimerHandle | None = None
    settled: list[asyncio.Future[bool]] = field(default_factory=list)


class NetKernel:
    """The network of a node that has been started.

    Args:
        tls: contexts for both roles; None speaks plain TCP.
    """

    def __init__(
        self,
        node: Node,
        cookie: str,
        spawner: Spawner,
        *,
        epmd: Epmd | None,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        max_outbound_bytes: int = MAX_OUTBOUND_BYTES,
    ) -> None:
        self._node = node
        self._spawner = spawner
        self._epmd = epmd
        self._server_tls = tls[0] if tls else None
        self._client_tls = tls[1] if tls else None
        self._max_outbound_bytes = max_outbound_bytes
        flags = HIDDEN_NODE if node.hidden else VISIBLE_NODE
        # Over TLS, OTP gives handshake messages the lengths of all later ones.
        self._local = Local(node.name, cookie, node.creation, flags, 4 if tls else 2)
        self._states: dict[str, _State] = {}
        self._addresses: dict[str, Address] = {}
        self._handshakes: dict[Connection, None] = {}  # in order of arrival
        self._open: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._stopping = False
        self._all_closed = asyncio.Event()

    # --- life

    async def start(self, listen: tuple[str | Sequence[str], int] | None) -> Address | None:
        """Listen (port 0 takes a free one) and register with EPMD; the address that serves.

        Raises:
            OSError: the address cannot be bound.
            EpmdError: no EPMD, or it has a live node of this name.
        """
        if listen is None:
            return None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accepted, listen[0], listen[1])
        host, port = self._server.sockets[0].getsockname()[:2]
        if self._epmd is not None:
            short_name = self._node.name.partition("@")[0]
            try:
                await self._epmd.start(short_name, port, hidden=self._node.hidden)
            except BaseException:
                self._server.close()
                raise
        return host, port

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Unregister, close every connection once what is written is sent."""
        self._stopping = True
        if self._epmd is not None:
            await self._epmd.stop()
        if self._server is not None:
            self._server.close()
        for state in list(self._states.values()):
            if state.attempt is not None:
                state.attempt.cancel()
        for connection in list(self._open):
            connection.close("this node stops")
        if self._open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._all_closed.wait()
        for connection in list(self._open):
            connection.abort("this node stops")
        for state in list(self._states.values()):
            self._end_grace(state)
            state.peer.lost()
            self._settle(state, connected=False)

    # --- what the node asks

    def nodes(self, *, hidden: bool = False) -> list[Atom]:
        """Connected peers: the visible ones, or with ``hidden`` all."""
        return [
            state.peer.name
            for state in self._states.values()
            if state.up is not None
            and state.up.established is not None
            and (hidden or state.up.established.visible)
        ]

    async def connect(self, name: str, address: Address | None, timeout_s: float) -> bool:
        """Have a connection to ``name``: True once there is one, False if it cannot be."""
        if name == self._node.name:
            return True
        if address is not None:
            self._addresses[name] = address
        state = self._state(name)
        if state.up is not None:
            return True
        settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        state.settled.append(settled)
        self._attempt(state)
        try:
            async with asyncio.timeout(timeout_s):
                return await settled
        except TimeoutError:
            return False
        finally:
            if settled in state.settled:
                state.settled.remove(settled)

    def disconnect(self, name: str) -> bool:
        """Close the connection to ``name``; False if there is none."""
        state = self._states.get(name)
        if state is None or state.up is None:
            return False
        self._down(state, state.up, "disconnected on request")
        return True

    def outbound_bytes(self, name: str) -> int:
        """What ``name`` has not yet taken of the bytes written to it."""
        state = self._states.get(name)
        return state.up.outbound_bytes() if state and state.up else 0

    def peer(self, name: str) -> Peer:
        """The peer ``name``, with a connection or with an attempt under way."""
        state = self._state(name)
        if state.up is None:
            self._attempt(state)
        return state.peer

    def known(self, name: str) -> Peer | None:
        """The peer ``name`` if there is anything with it; nothing is begun for its sake."""
        state = self._states.get(name)
        return state.peer if state is not None else None

    # --- attempts of our own

    def _state(self, name: str) -> _State:
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = _State(Peer(self._node, name, self._spawner))
        return state

    def _attempt(self, state: _State) -> None:
        if state.up or state.attempt or state.incoming or state.outgoing or state.grace:
            return
        loop = asyncio.get_running_loop()
        if self._stopping:
            loop.call_soon(self._gave_up, state, "this node stops")
        else:
            state.attempt = loop.create_task(self._connect(state), name=f"to {state.peer.name}")

    async def _connect(self, state: _State) -> None:
        name = state.peer.name
        try:
            async with asyncio.timeout(SETUP_TIMEOUT_S):
                host, port = self._addresses.get(name) or await self._find(name)
                connection = self._new_connection()
                connection.peer_name = name
                connection.machine = Initiator(
                    self._local, name, still_pending=lambda: state.up is None
                )
                state.outgoing = connection
                secure = self._client_tls is not None
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    host,
                    port,
                    ssl=self._client_tls,
                    ssl_handshake_timeout=SETUP_TIMEOUT_S if secure else None,
                    ssl_shutdown_timeout=CLOSE_TIMEOUT_S if secure else None,
                )
        except (OSError, BridgeError, TimeoutError) as exc:
            state.outgoing = None
            state.attempt = None
            self._gave_up(state, str(exc) or f"no connection within {SETUP_TIMEOUT_S:g} s")
        else:
            state.attempt = None

    async def _find(self, name: str) -> Address:
        short_name, _, host = name.partition("@")
        if not short_name or not host:
            raise HandshakeError(f"{name!r} is no node name: NAME@HOST is")
        lookup = self._epmd.lookup if self._epmd is not None else epmd_client.lookup
        entry = await lookup(short_name, host)
        if entry is None:
            raise HandshakeError(f"EPMD of {host} knows no node {short_name}")
        return host, entry.tcp_port

    def _new_connection(self, server_tls: ssl.SSLContext | None = None) -> Connection:
        return Connection(
            self,
            net_ticktime_s=self._node.net_ticktime_s,
            max_outbound_bytes=self._max_outbound_bytes,
            server_tls=server_tls,
        )

    # --- attempts of others

    def _accepted(self) -> Connection:
        connection = self._new_connection(self._server_tls)
        connection.machine = Acceptor(
            self._local, decide=lambda caller: self._decide(connection, caller)
        )
        self._handshakes[connection] = None
        if len(self._handshakes) > MAX_HANDSHAKES:
            next(iter(self._handshakes)).abort("too many handshakes at a time")
        return connection

    def _decide(self, connection: Connection, caller: Caller) -> Decision:
        """Whom to let in. Raises HandshakeError to close without an answer."""
        if caller.wants_name:
            return Named(self._free_name(caller.name), 4 + secrets.randbelow((1 << 32) - 4))
        if caller.name == self._node.name or self._stopping:
            return Status.NOK
        connection.peer_name = caller.name
        state = self._state(caller.name)
        if state.up is not None:
            if state.incoming is not None:
                raise HandshakeError(f"{caller.name} has a link and an attempt already")
            state.incoming = connection
            return Status.ALIVE
        simultaneous = state.attempt is not None or state.outgoing is not None
        if simultaneous or state.incoming is not None:
            if self._node.name > caller.name:
                return Status.NOK
            old, state.incoming = state.incoming, connection
            if old is not None:
                old.abort("replaced by a newer attempt")
            self._drop_outgoing(state)
            return Status.OK_SIMULTANEOUS
        state.incoming = connection
        return Status.OK

    def _drop_outgoing(self, state: _State) -> None:
        if state.attempt is not None:
            state.attempt.cancel()
            state.attempt = None
        if state.outgoing is not None:
            state.outgoing.abort("the other side's attempt goes first")
            state.outgoing = None

    def _free_name(self, host: str) -> str:
        while True:
            name = f"{secrets.token_hex(6).upper()}@{host}"
            if name not in self._states and name != self._node.name:
                return name

    # --- Owner: what becomes of a connection

    def connection_up(self, connection: Connection, found: Established) -> Peer:
        """The handshake is done: from now on ``connection`` is the link to its peer."""
        self._handshakes.pop(connection, None)
        state = self._state(found.peer_name)
        if state.up is not None:
            old, state.up = state.up, None
            old.abort("replaced: the peer had lost it")
            state.peer.lost()
        if state.incoming is connection:
            state.incoming = None
        if state.outgoing is connection:
            state.outgoing = None
        else:
            self._drop_outgoing(state)
        self._end_grace(state)
        state.up = connection
        _log.info("connected to %s at %s", found.peer_name, connection.address)
        state.peer.up(connection)
        self._settle(state, connected=True)
        return state.peer

    def connection_opened(self, connection: Connection) -> None:
        """Its socket is open."""
        self._open.add(connection)
        self._all_closed.clear()

    def connection_lost(self, connection: Connection, why: str) -> None:
        """Its socket is closed."""
        self._open.discard(connection)
        if not self._open:
            self._all_closed.set()
        self._handshakes.pop(connection, None)
        state = self._states.get(connection.peer_name)
        if state is not None and state.up is connection:
            self._down(state, connection, why)
            return
        if connection.established is None:
            _log.warning(
                "no link with %s at %s: %s", connection.peer_name or "?", connection.address, why
            )
        if state is None:
            return
        if state.incoming is connection:
            state.incoming = None
        elif state.outgoing is connection:
            state.outgoing = None
            if why == refused_for_other(state.peer.name):
                state.grace = asyncio.get_running_loop().call_later(
                    GRACE_S, self._grace_over, state
                )
        else:
            return
        self._gave_up(state, why)

    def _end_grace(self, state: _State) -> None:
        if state.grace is not None:
            state.grace.cancel()
            state.grace = None

    def _grace_over(self, state: _State) -> None:
        state.grace = None
        self._gave_up(state, "it refused us, and made no connection of its own")

    def _down(self, state: _State, connection: Connection, why: str) -> None:
        _log.info("lost the link to %s: %s", state.peer.name, why)
        state.up = None
        connection.close(why)
        state.peer.lost()
        self._prune(state)

    def _gave_up(self, state: _State, why: str) -> None:
        """An attempt failed. Unless another is under way, what waited for it is lost."""
        if state.up or state.incoming or state.outgoing or state.attempt or state.grace:
            return
        _log.info("no connection to %s: %s", state.peer.name, why)
        state.peer.lost()
        self._settle(state, connected=False)
        self._prune(state)

    def _settle(self, state: _State, *, connected: bool) -> None:
        waiting, state.settled = state.settled, []
        for future in waiting:
            if not future.done():
                future.set_result(connected)

    def _prune(self, state: _State) -> None:
        """Strangers' names must not pile up."""
        busy = state.up or state.incoming or state.outgoing or state.attempt or state.grace
        if not busy and not state.settled:
            self._states.pop(state.peer.name, None)


def refused_for_other(name: str) -> str:
    """How a handshake ends that the peer refuses because its own attempt goes first."""
    return f"{name} answers {Status.NOK}"
