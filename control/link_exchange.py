"""A short TCP exchange between two machines: many small messages, then some large ones.

Both ends run in a thread, so that a busy event loop is not what gets measured. A listener lives
for one exchange, takes one connection, and wants a token that went over the distribution.
"""

from __future__ import annotations

import hmac
import socket
import statistics
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TOKEN_BYTES: Final = 32
_LENGTH: Final = struct.Struct("!I")
_DONE: Final = b"."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one exchange may cost.

    Attributes:
        num_small: messages of one byte, for latency.
        first_bytes, most_bytes: sizes of large messages; each is twice the one before.
        long_s: a message that takes as long is the last.
        total_bytes: of all large messages; timeout_s: of all of it, at either end.
    """

    num_small: int = 20
    first_bytes: int = 1 << 16
    most_bytes: int = 1 << 23
    long_s: float = 0.05
    total_bytes: int = 1 << 24
    timeout_s: float = 3.0


class ExchangeFailed(Exception):
    """The other end did not come, went away, was too slow, or is somebody else."""


def figures(small_s: Sequence[float], large: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency one way, and bytes a second.

    Args:
        small_s: round trips of one byte.
        large: size and seconds of each large message with its answer.

    Raises:
        ValueError: nothing was measured.
    """
    if not small_s or not large:
        raise ValueError(f"{len(small_s)} small and {len(large)} large messages measure nothing")
    quick = sorted(small_s)[: -(-len(small_s) // 2)]  # the rest met a scheduler
    round_s = statistics.median(quick)
    # What starts slowly, TCP itself included, is not what the link can do: the best counts.
    rate = max(size / max(took_s - round_s, took_s / 10, 1e-9) for size, took_s in large)
    return max(round_s / 2, 1e-9), rate


def listen(host: str, *, backlog: int = 1) -> socket.socket:
    """A listener on a free port of an address. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def answer(listener: socket.socket, token: bytes, limits: Limits) -> None:
    """Serve one exchange and close the listener. Raises ExchangeFailed."""
    deadline_s = time.monotonic() + limits.timeout_s
    try:
        with listener:
            listener.settimeout(limits.timeout_s)
            connection, _ = listener.accept()
        with connection:
            _tune(connection)
            if not hmac.compare_digest(_receive(connection, TOKEN_BYTES, deadline_s), token):
                raise ExchangeFailed("wrong token")
            left = limits.total_bytes + limits.num_small
            while True:
                (size,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline_s))
                left -= size
                if size == 0 or left < 0:
                    return
                _receive(connection, size, deadline_s, keep=False)
                connection.sendall(_DONE)
    except OSError as exc:
        raise ExchangeFailed(f"{exc}") from exc


def measure(address: tuple[str, int], token: bytes, limits: Limits) -> tuple[float, float]:
    """Latency one way in seconds, and bytes a second, towards a listener.

    Raises:
        ExchangeFailed: see there.
    """
    deadline_s = time.monotonic() + limits.timeout_s
    small_s: list[float] = []
    large: list[tuple[int, float]] = []
    try:
        with socket.create_connection(address, timeout=limits.timeout_s) as connection:
            _tune(connection)
            connection.sendall(token)
            for _ in range(limits.num_small):
                small_s.append(_round_trip(connection, b"\0", deadline_s))
            size, left = limits.first_bytes, limits.total_bytes
            while size <= min(left, limits.most_bytes):
                took_s = _round_trip(connection, bytes(size), deadline_s)
                large.append((size, took_s))
                left -= size
                if took_s >= limits.long_s:
                    break
                size *= 2
            connection.sendall(_LENGTH.pack(0))
    except (OSError, ExchangeFailed) as exc:
        if not large:
            raise ExchangeFailed(f"{address[0]}:{address[1]}: {exc}") from exc
    return figures(small_s, large)


def _round_trip(connection: socket.socket, data: bytes, deadline_s: float) -> float:
    connection.settimeout(_left(deadline_s))
    begin_s = time.perf_counter()
    connection.sendall(_LENGTH.pack(len(data)) + data)
    _receive(connection, 1, deadline_s)
    return time.perf_counter() - begin_s


def _receive(
    connection: socket.socket, size: int, deadline_s: float, *, keep: bool = True
) -> bytes:
    """Exactly so many bytes; without ``keep`` they are thrown away as they come."""
    kept, left = bytearray(), size
    while left:
        connection.settimeout(_left(deadline_s))
        part = connection.recv(min(left, 1 << 18))
        if not part:
            raise ExchangeFailed("the other end left")
        left -= len(part)
        if keep:
            kept += part
    return bytes(kept)


def _left(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise ExchangeFailed("it took too long")
    return left_s


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
