"""How followers come to the head: a call, one line to say who calls, one line of answer.

Whoever knows the group's secret is let in. Strangers cost the head nothing: all callers are heard
at the same time, each for a few seconds at most.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import time
from types import TracebackType
from typing import Any, Self

from compute.errors import JoinRefused, PeerLost

HELLO_S = 5.0
WELCOME = b"ok\n"
REFUSAL = b"no\n"
_MAX_HELLO_BYTES = 1024
_MAX_CALLERS = 256
_RETRY_S = 0.02


class Door:
    """The head's end: hears callers on a listening socket, which it takes over."""

    def __init__(self, listener: socket.socket, group: str) -> None:
        self._listener, self._group = listener, group
        self._heard: dict[socket.socket, tuple[bytearray, float]] = {}  # and until when
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for caller in list(self._heard):
            self._shut_out(caller)
        self._selector.close()
        self._listener.close()

    def greet(self, deadline_s: float) -> tuple[int, socket.socket] | None:
        """The next caller who knows the group, and its rank; None when none came in time."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            ends_s = min((until_s for _, until_s in self._heard.values()), default=deadline_s)
            wait_s = max(0.0, min(left_s, ends_s - time.monotonic()))
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self._listener:
                    self._admit()
                    continue
                assert isinstance(key.fileobj, socket.socket)
                rank = self._hear(key.fileobj)
                if rank is not None:
                    return rank, self._hand_over(key.fileobj)
            for caller, (_, until_s) in list(self._heard.items()):
                if time.monotonic() >= until_s:
                    self._shut_out(caller)
        return None

    def _admit(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._heard) >= _MAX_CALLERS:
            self._shut_out(next(iter(self._heard)))
        caller.setblocking(False)
        self._heard[caller] = (bytearray(), time.monotonic() + HELLO_S)
        self._selector.register(caller, selectors.EVENT_READ)

    def _hear(self, caller: socket.socket) -> int | None:
        """Rank of a caller whose line is complete and good."""
        line, _ = self._heard[caller]
        try:
            more = caller.recv(_MAX_HELLO_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            more = b""
        line += more
        if line.endswith(b"\n"):
            rank = rank_of(bytes(line), self._group)
            if rank is not None:
                return rank
            self._refuse(caller)
        elif not more or len(line) >= _MAX_HELLO_BYTES:
            self._shut_out(caller)
        return None

    def _refuse(self, caller: socket.socket) -> None:
        refuse(self._hand_over(caller))

    def _shut_out(self, caller: socket.socket) -> None:
        self._hand_over(caller).close()

    def _hand_over(self, caller: socket.socket) -> socket.socket:
        self._selector.unregister(caller)
        del self._heard[caller]
        return caller


def welcome(caller: socket.socket, timeout_s: float) -> bool:
    """Let a caller in; whether it is still there. From now on it waits ``timeout_s`` to send."""
    try:
        caller.settimeout(timeout_s)
        caller.sendall(WELCOME)
    except OSError:
        caller.close()
        return False
    return True


def refuse(caller: socket.socket) -> None:
    """Tell a caller that it is not taken."""
    with contextlib.suppress(OSError):  # it does not listen any more
        caller.send(REFUSAL)
    caller.close()


def rank_of(line: bytes, group: str) -> int | None:
    """Rank in a caller's line; None for anyone who does not know the group."""
    try:
        hello: Any = json.loads(line)
        theirs, rank = hello["group"].encode(), hello["rank"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if type(rank) is not int or not hmac.compare_digest(theirs, group.encode()):
        return None
    return rank


def call(
    address: tuple[str, int], *, group: str, rank: int, head: int, deadline_s: float
) -> socket.socket:
    """A follower's end: call the head, which may still be loading, until it answers.

    Raises:
        PeerLost: it is not there, or ended before it answered.
        JoinRefused: it does not take this rank of this group.
    """
    hello = json.dumps({"group": group, "rank": rank}).encode() + b"\n"
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=min(HELLO_S, left_s))
        except OSError:
            time.sleep(min(_RETRY_S, left_s))
            continue
        try:
            connection.settimeout(left_s)
            connection.sendall(hello)
            answer = b""
            while len(answer) < len(WELCOME) and (more := connection.recv(len(WELCOME))):
                answer += more
        except OSError as exc:
            connection.close()
            raise PeerLost(head, f"it did not answer at its door: {exc}") from exc
        if answer == WELCOME:
            return connection
        connection.close()
        if answer:
            raise JoinRefused(f"rank {head} does not take rank {rank} as follower")
        raise PeerLost(head, "it closed its door")
    raise PeerLost(head, "gave no orders in the time there was")
