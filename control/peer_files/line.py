"""The other end of the door: one TCP connection to a peer, for requests ahead of answers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from control.peer_files.door import READY, REQUEST

CONNECT_S: Final = 3.0
SILENCE_S: Final = 10.0


class LineLost(Exception):
    """The peer cannot be reached, went away, fell silent or shut the door."""


class Line:
    """A context manager; connects on the way in."""

    def __init__(self, doors: Sequence[tuple[str, int]], token: bytes) -> None:
        """``doors``: best first; the first that can be reached is used."""
        self._doors, self._token = doors, token
        self._socket: socket.socket

    def __enter__(self) -> Line:
        failure: OSError = OSError("it has no address")
        for door in self._doors:
            try:
                self._socket = socket.create_connection(door, timeout=CONNECT_S)
            except OSError as exc:
                failure = exc
                continue
            try:
                self._socket.settimeout(SILENCE_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.sendall(self._token)
            except OSError as exc:
                self._socket.close()
                raise LineLost(str(exc)) from exc
            return self
        raise LineLost(str(failure)) from failure

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def ask(self, file: int, start: int, length: int) -> None:
        """Request bytes of a file; answers come in the order of requests. Raises LineLost."""
        try:
            self._socket.sendall(REQUEST.pack(file, start, length))
        except OSError as exc:
            raise LineLost(str(exc)) from exc

    def ready(self) -> None:
        """The next answer begins. Raises LineLost."""
        if bytes(self._exactly(memoryview(bytearray(1)))) != READY:
            raise LineLost("it speaks another protocol")

    def read(self, into: memoryview) -> None:
        """The next bytes of the answer. Raises LineLost."""
        self._exactly(into)

    def _exactly(self, into: memoryview) -> memoryview:
        got = 0
        try:
            while got < len(into):
                size = self._socket.recv_into(into[got:])
                if not size:
                    raise LineLost("it closed the connection")
                got += size
        except OSError as exc:
            raise LineLost(str(exc)) from exc
        return into
