"""What the head of a mesh tells the other ranks: which rows run next.

The head plans and samples; the others follow in lockstep. An order is a frame of a TCP stream of
its own, so that a rank with nothing to do sleeps, and learns of a closed connection at once::

    length: u32 | kind: u32 (0 tick, 1 rows) | int64 words
    words of rows: count; then (slot, start, wants logits, ids, first page, pages) of each; then
    of each in turn its ids and its pages

A tick says that the head lives; it comes when nothing else does.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from compute.errors import PeerLost
from compute.order_door import Door, call, refuse, welcome
from compute.stage import Row

TICK_S = 1.0
SILENT_S = 10.0  # ticks come from a thread of their own, however long a step takes
_MAX_FRAME_BYTES = 64 << 20
_HEAD = struct.Struct("!II")
_TICK, _ROWS = 0, 1
_FACTS = 6  # words of a row beside its ids and pages


def encode_rows(rows: Sequence[Row]) -> bytes:
    """The frame of an order, its length included."""
    words = [len(rows)]
    for row in rows:
        words += (row.slot, row.start, int(row.want_logits), len(row.ids))
        words += (row.first_page, len(row.pages))
    for row in rows:
        words += row.ids
        words += row.pages
    body = np.array(words, dtype="<i8").tobytes()
    return _HEAD.pack(4 + len(body), _ROWS) + body


def decode_rows(body: bytes) -> list[Row]:
    """Rows of an order's body. Raises ValueError where it is none."""
    if len(body) % 8 or not body:
        raise ValueError(f"an order of {len(body)} bytes")
    words = np.frombuffer(body, dtype="<i8").tolist()
    count, at = words[0], 1
    if not 0 <= _FACTS * count < len(words):
        raise ValueError(f"an order of {count} rows in {len(words)} words")
    facts = [words[at + _FACTS * i : at + _FACTS * (i + 1)] for i in range(count)]
    at += _FACTS * count
    sizes = [size for fact in facts for size in (fact[3], fact[5])]
    if min(sizes, default=0) < 0 or at + sum(sizes) != len(words):
        raise ValueError(f"an order of {count} rows does not fill its {len(words)} words")
    rows = []
    for slot, start, want, length, first_page, num_pages in facts:
        ids, pages = words[at : at + length], words[at + length : at + length + num_pages]
        rows.append(Row(slot, tuple(ids), start, bool(want), tuple(pages), first_page))
        at += length + num_pages
    return rows


class OrderSender:
    """The head's end. Frames go out from the engine's thread, ticks from one of its own.

    Args:
        sockets: by rank.
        timeout_s: to hand an order to a rank's socket.
    """

    def __init__(self, sockets: dict[int, socket.socket], *, timeout_s: float) -> None:
        self._sockets = sockets
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._sent_s = time.monotonic()
        for connection in sockets.values():
            connection.settimeout(timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._keep_ticking, name="order ticks", daemon=True).start()

    @classmethod
    def accept(
        cls,
        listener: socket.socket,
        *,
        group: str,
        ranks: frozenset[int],
        timeout_s: float,
        send_timeout_s: float,
    ) -> OrderSender:
        """Wait for all followers; takes the listener over. Raises PeerLost."""
        found: dict[int, socket.socket] = {}
        try:
            with Door(listener, group) as door:
                deadline_s = time.monotonic() + timeout_s
                while found.keys() != ranks:
                    called = door.greet(deadline_s)
                    if called is None:
                        missing = min(ranks - found.keys())
                        raise PeerLost(missing, f"did not come for orders in {timeout_s:g} s")
                    rank, connection = called
                    if rank not in ranks or rank in found:
                        refuse(connection)
                    elif welcome(connection, send_timeout_s):
                        found[rank] = connection
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        return cls(found, timeout_s=send_timeout_s)

    def send(self, rows: Sequence[Row]) -> None:
        """Tell every rank to run these rows. Raises PeerLost."""
        lost = self._send(encode_rows(rows))
        if lost is not None:
            raise lost

    def close(self) -> None:
        """End the ticks; followers see the end of their stream."""
        self._closed.set()
        with self._lock:
            for connection in self._sockets.values():
                connection.close()
            self._sockets = {}

    def _send(self, frame: bytes) -> PeerLost | None:
        """Hand a frame to all who take it; the first who does not."""
        lost = None
        with self._lock:
            self._sent_s = time.monotonic()
            for rank, connection in self._sockets.items():
                try:
                    connection.sendall(frame)
                except OSError as exc:
                    lost = lost or PeerLost(rank, f"it takes no orders: {exc}")
        return lost

    def _keep_ticking(self) -> None:
        while not self._closed.wait(TICK_S):
            if time.monotonic() - self._sent_s >= TICK_S:
                # Whom it does not reach, the next order or that rank's own supervisor finds too.
                self._send(_HEAD.pack(4, _TICK))


class OrderReceiver:
    """A follower's end."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        head: int,
        silent_s: float = SILENT_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket, self._head, self._now = connection, head, now
        self._silent_s = max(silent_s, 3 * TICK_S)
        self._buffer = bytearray()
        self._heard_s = now()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def connect(
        cls,
        address: tuple[str, int],
        *,
        group: str,
        rank: int,
        head: int,
        timeout_s: float,
        silent_s: float = SILENT_S,
    ) -> OrderReceiver:
        """Find the head, which may still be loading.

        Args:
            timeout_s: until it has to be there.
            silent_s: without order and tick, from when on it counts as lost; at least 3 ticks.

        Raises:
            PeerLost: it is not there, or ended.
            JoinRefused: it is there, and does not take this rank of this group.
        """
        connection = call(
            address, group=group, rank=rank, head=head, deadline_s=time.monotonic() + timeout_s
        )
        return cls(connection, head=head, silent_s=silent_s)

    def receive(self, *, timeout_s: float) -> list[Row] | None:
        """The next order, or None when none came in time. Raises PeerLost."""
        deadline_s = self._now() + timeout_s
        while True:
            frame = self._frame()
            if frame is not None:
                kind, body = frame
                if kind == _ROWS:
                    try:
                        return decode_rows(body)
                    except ValueError as exc:
                        raise PeerLost(self._head, f"it sent {exc}") from exc
                continue
            left_s = deadline_s - self._now()
            ready, _, _ = select.select([self._socket], [], [], max(0.0, left_s))
            if ready:
                self._read()
            elif self._now() - self._heard_s > self._silent_s:
                raise PeerLost(self._head, f"neither order nor tick for {self._silent_s:g} s")
            else:
                return None

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def _read(self) -> None:
        try:
            more = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as exc:
            raise PeerLost(self._head, f"its orders broke off: {exc}") from exc
        if not more:
            raise PeerLost(self._head, "it closed the stream of orders")
        self._buffer += more
        self._heard_s = self._now()

    def _frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < _HEAD.size:
            return None
        length, kind = _HEAD.unpack_from(self._buffer)
        if not 4 <= length <= _MAX_FRAME_BYTES:
            raise PeerLost(self._head, f"it sent a frame of {length} bytes")
        if len(self._buffer) < 4 + length:
            return None
        body = bytes(self._buffer[_HEAD.size : 4 + length])
        del self._buffer[: 4 + length]
        return kind, body
