"""One TCP (or TLS) connection to another node: handshake, then messages and ticks."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import TYPE_CHECKING, Final, Protocol

from bridge import tls
from bridge.control_messages import Message, Tick
from bridge.errors import DecodeError, HandshakeError, ProtocolError
from bridge.handshake import SETUP_TIMEOUT_S, Acceptor, Established, Initiator
from bridge.show import show
from bridge.wire import TICK, Decoder, Encoder

if TYPE_CHECKING:
    from bridge.peer import Peer

_log: Final = logging.getLogger("bridge.connection")

# A peer may have set a far shorter tick time than ours, and expects to hear from us in it.
TICK_INTERVAL_S: Final = 1.0
# Only a tick after this silence of ours is answered at once: two echoing nodes calm down.
ECHO_AFTER_S: Final = 0.2
READ_BYTES: Final = 64 << 10
MAX_OUTBOUND_BYTES: Final = 64 << 20


class Owner(Protocol):
    """Who is told what becomes of a connection."""

    def connection_opened(self, connection: Connection) -> None:
        """Its socket is open."""

    def connection_up(self, connection: Connection, found: Established) -> Peer:
        """The handshake succeeded. Gives the peer that gets the messages."""

    def connection_lost(self, connection: Connection, why: str) -> None:
        """It is gone; also after a handshake that failed. Called once, the last of all."""


class Connection(asyncio.BufferedProtocol):
    """A link in the making, then a link.

    Nothing that arrives before the handshake is done reaches a peer. What a slow peer does not
    read is kept up to ``max_outbound_bytes``, plus one message; then the link is dropped.
    ``server_tls`` is for connections of others; one of our own comes with TLS done.
    """

    def __init__(
        self,
        owner: Owner,
        *,
        net_ticktime_s: float,
        max_outbound_bytes: int = MAX_OUTBOUND_BYTES,
        server_tls: ssl.SSLContext | None = None,
    ) -> None:
        self.machine: Initiator | Acceptor  # set before the first byte
        self.peer_name = ""  # as claimed; proven once ``established``
        self.established: Established | None = None
        self.address = "?"
        self._owner = owner
        self._net_ticktime_s = net_ticktime_s
        self._max_outbound_bytes = max_outbound_bytes
        self._server_tls = server_tls
        self._securing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._peer: Peer | None = None
        self._encoder: Encoder
        self._decoder: Decoder
        self._heard = self._spoke = False
        self._spoke_at_s = 0.0
        self._num_silent = 0

    # --- asyncio.BufferedProtocol: a buffer of our own, since asyncio's takes a fresh quarter of a
    # megabyte from the system for every read, which costs more than all that is done with it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake and its time limit."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._owner.connection_opened(self)
        peer = transport.get_extra_info("peername")
        self.address = f"{peer[0]}:{peer[1]}" if peer else "?"
        self._timer = self._loop.call_later(
            SETUP_TIMEOUT_S, self.abort, f"no handshake within {SETUP_TIMEOUT_S:g} s"
        )
        if self._server_tls is not None:
            transport.pause_reading()
            self._securing = self._loop.create_task(self._secure(transport, self._server_tls))
        else:
            self._write(self.machine.data_to_send())

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where to put what arrives."""
        return self._buffer

    def buffer_updated(self, num_bytes: int) -> None:
        """So many bytes have arrived."""
        self._received(bytes(self._buffer[:num_bytes]))

    def _received(self, data: bytes) -> None:
        """Bytes of the peer: of the handshake, then of messages."""
        if self._peer is not None:
            self._heard = True
            self._receive(data)
            return
        try:
            self.machine.receive(data)
        except HandshakeError as exc:
            self._write(self.machine.data_to_send())
            self.close(str(exc))
            return
        self._write(self.machine.data_to_send())
        if self.machine.established is not None:
            self._up(self.machine.established)

    def connection_lost(self, exc: Exception | None) -> None:
        """The last callback of asyncio."""
        if self._timer is not None:
            self._timer.cancel()
        self._peer = None
        why = self._why or (str(exc) if exc else "")
        if not why:
            why = "closed by the peer"
            if self.established is None:
                why += " during the handshake (is the cookie the same?)"
        self._owner.connection_lost(self, why)

    # --- for the owner and the peer

    def send(self, message: Message) -> None:
        """Write a message. Raises EncodeError; a lost link is reported elsewhere."""
        packets = self._encoder.encode(message)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        waiting = transport.get_write_buffer_size()
        if waiting > self._max_outbound_bytes:
            self.abort(f"{waiting} bytes wait to be read by it: too slow")
            return
        self._spoke = True
        for packet in packets:
            transport.write(packet)

    def outbound_bytes(self) -> int:
        """What the peer has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def close(self, why: str) -> None:
        """End it, once what is written is sent."""
        self._why = self._why or why
        if self._transport is not None:
            self._transport.close()

    def abort(self, why: str) -> None:
        """End it now."""
        self._why = self._why or why
        if self._transport is not None:
            self._transport.abort()

    # --- inside

    async def _secure(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        try:
            secured, early = await tls.accept(transport, context, timeout_s=SETUP_TIMEOUT_S)
        except OSError as exc:
            self._why = self._why or f"no TLS handshake: {exc}"
            self.connection_lost(exc)
            return
        self._transport = secured
        secured.set_protocol(self)
        if self._why:  # closed or aborted meanwhile
            secured.abort()
            return
        self._write(self.machine.data_to_send())
        if early:
            self._received(early)

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _up(self, found: Established) -> None:
        self.established = found
        self.peer_name = found.peer_name
        self._encoder, self._decoder = Encoder(found.flags), Decoder(found.flags)
        if self._timer is not None:
            self._timer.cancel()
        self._tick_s = min(TICK_INTERVAL_S, self._net_ticktime_s / 4)
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        self._peer = self._owner.connection_up(self, found)
        if found.rest:
            self._receive(found.rest)

    def _receive(self, data: bytes) -> None:
        try:
            events = self._decoder.feed(data)
        except (ProtocolError, DecodeError) as exc:
            self.abort(f"bad packet: {exc}")
            return
        last = len(events) - 1
        for number, event in enumerate(events):
            if self._peer is None:
                return
            if type(event) is Tick:
                self._echo()
                continue
            try:
                # At once only the last: whoever gets many takes turns with others.
                self._peer.receive(event, at_once=number == last)  # type: ignore[arg-type]  # no tick
            except Exception:  # noqa: BLE001 -- our own fault: only this message is lost
                _log.error(
                    "a message of %s had no effect: %s", self.peer_name, show(event), exc_info=True
                )

    def _echo(self) -> None:
        now_s = self._loop.time()
        if now_s - self._spoke_at_s >= ECHO_AFTER_S:
            self._spoke_at_s = now_s
            self._write(TICK)

    def _tick(self) -> None:
        # Counted in checks, not by the clock: a loop that was blocked here is not their silence.
        self._num_silent = 0 if self._heard else self._num_silent + 1
        if self._num_silent * self._tick_s >= self._net_ticktime_s:
            self.abort(f"silent for {self._net_ticktime_s:g} s")
            return
        if not self._spoke:
            self._spoke_at_s = self._loop.time()
            self._write(TICK)
        self._heard = self._spoke = False
        self._timer = self._loop.call_later(self._tick_s, self._tick)
