"""Beats that a busy event loop cannot delay: a thread that steps in where the loop is late.

As long as membership comes round in time, it sends the beats itself, over the distribution, and
this thread is silent. When membership has not come round for a beat and a half, the thread sends
them in its place, as small UDP datagrams once a second, until the loop is back or has been away
for so long that nobody should count on it. Peers' threads keep when they heard one, so that
a blocked receiver does not miss them either. A datagram names its receiver and has a counter and
an HMAC keyed by the cookie: it cannot be forged, sent on or sent again. A stopped process sends
nothing. Where UDP does not pass, what is left is the beat over the distribution.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

_log: Final = logging.getLogger("control.beats")

LATE_S: Final = 1.5  # without a sign of membership the thread steps in
GIVE_UP_S: Final = 15.0  # as ops.loop_guard, which ends such a process
BEAT_S: Final = 1.0
_LOOK_S: Final = 0.25
_MAX_BYTES: Final = 1024
_MAC_BYTES: Final = 16


class BeatThread:
    """Sends and hears beats beside the event loop. Methods may be called from any thread.

    Args:
        cookie: the cluster's secret.
        host: address to bind; datagrams come from there.
        incarnation: of this life of the node.
        clock: seconds, the event loop's.
    """

    def __init__(
        self,
        node: str,
        cookie: str,
        *,
        host: str,
        incarnation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._key, self._host = node, cookie.encode(), host
        self._incarnation, self._clock = incarnation, clock
        self._peers: dict[str, tuple[str, int]] = {}
        self._heard_s: dict[str, float] = {}
        self._newest: dict[str, tuple[int, int]] = {}
        self._stamp_s = clock()
        self._count = 0
        self._stop = threading.Event()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    def start(self) -> None:
        """Bind and run. Where nothing can be bound, ``port`` stays 0 and nobody is served."""
        try:
            family, _, _, _, address = socket.getaddrinfo(
                self._host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
            )[0]
            made = socket.socket(family, socket.SOCK_DGRAM)
            made.settimeout(_LOOK_S)
            made.bind(address)
        except OSError as exc:
            _log.warning("no beats by a thread: %s cannot be bound: %s", self._host, exc)
            return
        self._socket, self.port = made, int(made.getsockname()[1])
        self.on_time()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
        if self._socket is not None:
            self._socket.close()

    def on_time(self) -> None:
        """Membership came round, and sends its beats itself."""
        self._stamp_s = self._clock()

    def set_peers(self, peers: Mapping[str, tuple[str, int]]) -> None:
        """Whom to beat to: node -> address of its thread."""
        self._peers = dict(peers)  # replaced whole: the thread reads it without a lock

    def heard_s(self, node: str) -> float:
        """When the thread of ``node`` was last heard; minus infinity for never."""
        return self._heard_s.get(node, float("-inf"))

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._socket is not None
        sent_s = self._clock()
        while not self._stop.is_set():
            with contextlib.suppress(OSError):  # nothing came, or a peer's port is closed
                data, _ = self._socket.recvfrom(_MAX_BYTES)
                self._take(data)
            now_s = self._clock()
            late_s = now_s - self._stamp_s
            if LATE_S < late_s < GIVE_UP_S and now_s - sent_s >= BEAT_S:
                sent_s = now_s
                self._send_all()

    def _send_all(self) -> None:
        assert self._socket is not None
        self._count += 1
        for node, address in self._peers.items():
            with contextlib.suppress(OSError):
                self._socket.sendto(self._datagram(node), address)

    def _datagram(self, to: str) -> bytes:
        body = json.dumps([self._node, to, self._incarnation, self._count]).encode()
        return self._mac(body) + body

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._key, b"phalanx beat" + body, hashlib.sha256).digest()[:_MAC_BYTES]

    def _take(self, data: bytes) -> None:
        mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(body)):
            return
        try:
            node, to, incarnation, count = json.loads(body)
        except ValueError:  # a sender with our cookie and another version
            return
        if to != self._node or (incarnation, count) <= self._newest.get(node, (0, 0)):
            return
        self._newest[node] = (incarnation, count)
        self._heard_s[node] = self._clock()


def last_sign_s(beat_s: float, thread_s: float) -> float:
    """When a peer last gave a sign of life.

    Args:
        beat_s: its last beat over the distribution.
        thread_s: its thread's last one. It stands in for so long only as the thread would.
    """
    return max(beat_s, min(thread_s, beat_s + GIVE_UP_S))
