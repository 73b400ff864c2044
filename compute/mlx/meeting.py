"""Brings the ranks of one epoch together before they close a ring, with plain sockets.

A ring's own way of joining knows no epoch and no time-out. Torch's store, which other groups meet
by, would cost each MLX rank 200 MB. Frames are lines of JSON: a rank says who it is, and rank 0
answers when everybody is here, or why they will not be::

    {"key": ..., "epoch": ..., "rank": ..., "hosts": [...]}
    {"all": true} | {"epoch": of rank 0} | {"refused": why} | {"lost": rank, "why": ...}

The key proves that a rank knows the instance's id and does not tell it. Who does not know it gets
no answer. What strangers send, to either side, is passed over.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import threading
import time
from typing import Any

from compute.collectives import Rendezvous
from compute.errors import JoinRefused, PeerLost

_MAX_LINE_BYTES = 64 << 10
_ANSWER_S = 5.0  # to hand a line to a socket that has room for it
_RETRY_S = 0.05
_PURPOSE = "ring"
_MAX_NUMBER = 1 << 63


def meet(rendezvous: Rendezvous, deadline_s: float, listener: socket.socket | None) -> None:
    """Return when all ranks of this epoch are here.

    Args:
        deadline_s: on ``time.monotonic``.
        listener: rank 0's, which is taken over; None opens one at ``rendezvous.address``.

    Raises:
        JoinRefused: rank 0 is at a later epoch or cannot listen, a rank has come twice or sees
            another group.
        PeerLost: a rank did not come, or left while others were coming.
    """
    if rendezvous.rank:
        _come(rendezvous, deadline_s)
        return
    if listener is None:
        host, tcp_port = rendezvous.address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, tcp_port), family=family)
        except OSError as exc:
            raise JoinRefused(f"rank 0 cannot listen on {host}:{tcp_port}: {exc}") from exc
    with _Door(rendezvous, listener) as door:
        door.wait(deadline_s)


class _Door:
    """Rank 0's side."""

    def __init__(self, rendezvous: Rendezvous, listener: socket.socket) -> None:
        self._rendezvous, self._listener = rendezvous, listener
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._said: dict[socket.socket, bytes] = {}  # of those who have not said all
        self._here: dict[int, socket.socket] = {}

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for connection in (self._listener, *self._said, *self._here.values()):
            connection.close()

    def wait(self, deadline_s: float) -> None:
        """Let everybody in, then tell them."""
        try:
            while len(self._here) < self._rendezvous.world_size - 1:
                self._once(deadline_s)
            self._once(deadline_s, patient=False)  # has one of them gone again?
        except PeerLost as lost:
            self._tell({"lost": lost.rank, "why": lost.why})
            raise
        except JoinRefused as refused:
            self._tell({"refused": str(refused)})
            raise
        self._tell({"all": True})

    def _once(self, deadline_s: float, *, patient: bool = True) -> None:
        left_s = deadline_s - time.monotonic() if patient else 0.0
        if patient and left_s <= 0:
            missing = set(range(1, self._rendezvous.world_size)) - self._here.keys()
            raise PeerLost(min(missing), "it did not come to join")
        for key, _ in self._selector.select(left_s):
            connection: Any = key.fileobj
            if connection is self._listener:
                self._admit()
            elif connection in self._said:
                self._hear(connection)
            else:  # there is no more to say: it is the end of the connection
                lost = next(rank for rank, other in self._here.items() if other is connection)
                raise PeerLost(lost, "it left while joining")

    def _admit(self) -> None:
        with contextlib.suppress(OSError):  # who knocked has gone
            guest, _ = self._listener.accept()
            guest.settimeout(_ANSWER_S)
            self._said[guest] = b""
            self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        try:
            more = guest.recv(4096)
        except OSError:
            more = b""
        said = self._said[guest] + more
        if more and b"\n" not in said and len(said) < _MAX_LINE_BYTES:
            self._said[guest] = said
            return
        del self._said[guest]
        rank = None
        try:
            rank = self._known(guest, said)
        finally:
            if rank is None:
                self._selector.unregister(guest)
                guest.close()
        if rank is not None:
            self._here[rank] = guest

    def _known(self, guest: socket.socket, said: bytes) -> int | None:
        """Which rank of this epoch somebody is; None for all others. Raises JoinRefused."""
        mine, hello = self._rendezvous, _parsed(said)
        key, epoch, rank = hello.get("key"), _number(hello, "epoch"), _number(hello, "rank")
        hosts = hello.get("hosts")
        if not isinstance(key, str) or epoch is None or rank is None:
            return None
        expected = mine.keyed(_PURPOSE, epoch)
        if not hmac.compare_digest(key.encode(errors="replace"), expected.encode()):
            return None
        if epoch != mine.epoch:
            _send(guest, {"epoch": mine.epoch})
            return None
        if not 0 < rank < mine.world_size or hosts != list(mine.hosts):
            _send(guest, {"refused": f"rank 0 sees another group: {list(mine.hosts)}"})
            raise JoinRefused(f"rank {rank} sees another group: {hosts}")
        if rank in self._here:
            _send(guest, {"refused": f"rank {rank} has joined already"})
            return None
        return rank

    def _tell(self, answer: dict[str, Any]) -> None:
        for connection in self._here.values():
            _send(connection, answer)


def _come(rendezvous: Rendezvous, deadline_s: float) -> None:
    """Another rank's side: knock until rank 0 of this epoch answers."""
    hello = {
        "key": rendezvous.keyed(_PURPOSE),
        "epoch": rendezvous.epoch,
        "rank": rendezvous.rank,
        "hosts": list(rendezvous.hosts),
    }
    pause, why = threading.Event(), "nobody listens"
    while (left_s := deadline_s - time.monotonic()) > 0:
        answer: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            answer = _asked(rendezvous.address, hello, left_s)
        if answer.get("all") is True:
            return
        if "refused" in answer:
            raise JoinRefused(str(answer["refused"]))
        if (lost := _number(answer, "lost")) is not None:
            raise PeerLost(lost, str(answer.get("why")))
        if (epoch := _number(answer, "epoch")) is not None:
            if epoch > rendezvous.epoch:
                raise JoinRefused(f"rank 0 is at epoch {epoch}, this one {rendezvous.epoch}")
            why = f"it is still at epoch {epoch}"
        pause.wait(_RETRY_S)  # it is not there yet, or of an epoch that is over
    raise PeerLost(0, f"it did not come to join: {why}")


def _asked(address: tuple[str, int], hello: dict[str, Any], left_s: float) -> dict[str, Any]:
    """Rank 0's answer; empty where it hangs up. Raises OSError."""
    with socket.create_connection(address, timeout=left_s) as connection:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        with connection.makefile("rb") as lines:
            line = lines.readline(_MAX_LINE_BYTES)
    return _parsed(line)


def _parsed(line: bytes) -> dict[str, Any]:
    """The object on a line; empty where there is none."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):  # brackets in brackets in brackets
        return {}
    return said if isinstance(said, dict) else {}


def _number(said: dict[str, Any], name: str) -> int | None:
    number = said.get(name)
    return number if type(number) is int and abs(number) < _MAX_NUMBER else None


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever has gone will be missed
        connection.sendall(json.dumps(answer).encode() + b"\n")
