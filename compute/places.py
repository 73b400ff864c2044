"""Where a rank can be met: an address, and TCP ports reserved there for each use."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from bridge.term import Atom, Term
from bridge.text import text_of
from compute.errors import BadRequest

PORTS = ("orders", "tensor", "after", "ring")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank can be met: a host that all others reach, and TCP ports it has reserved.

    Attributes:
        ports: by use: ``orders`` (the head's), ``tensor`` (first rank of a stage), ``after``
            (link to the next stage), ``ring`` (mlx).
    """

    host: str
    ports: Mapping[str, int]

    def address(self, use: str) -> tuple[str, int]:
        """Host and port."""
        return self.host, self.ports[use]


class Listeners:
    """Sockets that hold a rank's reserved ports until they are used."""

    def __init__(self, host: str) -> None:
        """Raises OSError where this machine does not have such an address."""
        self._sockets: dict[str, socket.socket] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            for use in PORTS:
                self._sockets[use] = socket.create_server((host, 0), family=family)
        except OSError:
            self.close()
            raise
        numbers = {use: int(s.getsockname()[1]) for use, s in self._sockets.items()}
        self.place = Place(host, numbers)

    def take(self, use: str) -> socket.socket:
        """The socket, which belongs to the caller from now on."""
        return self._sockets.pop(use)

    def release(self, use: str) -> None:
        """Free a port for a library that wants to listen itself."""
        self._sockets.pop(use).close()

    def close(self) -> None:
        """Free what nobody took."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def place_term(place: Place) -> Term:
    """A place as a term; for others it is opaque."""
    return {
        Atom("host"): place.host,
        Atom("ports"): {Atom(use): number for use, number in place.ports.items()},
    }


def place_of(term: Term) -> Place:
    """The place in a term. Raises BadRequest."""
    match term:
        case {"host": str() | bytes() as host, "ports": dict(ports)}:
            found = {str(use): number for use, number in ports.items()}
            numbers = {use: n for use, n in found.items() if isinstance(n, int)}
            if set(numbers) == set(PORTS):
                return Place(text_of(host), numbers)
    raise BadRequest("places: expected what prepare gave")
