"""Messages between ranks of any hosts over TCP: gloo's transport, without its collectives.

Single messages tell exactly which peer failed, which gloo's collectives do not; and they leave
the order of sums to us.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from compute.collectives import Rendezvous
from compute.errors import PeerLost
from compute.rendezvous_store import meet, own_address, reason

dist: Any = torch.distributed  # parts of it are not in its type information


@dataclass(eq=False, slots=True)
class Message:
    """One that is on its way.

    Attributes:
        work: torch's handle, which keeps all connections of the mesh open; None when it is over.
        peer: the other rank, ``x`` what must live meanwhile.
    """

    work: Any
    peer: int
    x: torch.Tensor


class GlooMesh:
    """A connection between every two ranks. Messages of one pair and tag keep their order."""

    def __init__(self, rendezvous: Rendezvous, *, listener: socket.socket | None = None) -> None:
        """Meet the others. Raises PeerLost, JoinRefused."""
        self.rank, self.world_size = rendezvous.rank, rendezvous.world_size
        self.epoch = rendezvous.epoch
        self._store, self._group = None, None
        self._open: set[Message] = set()
        deadline_s = time.monotonic() + rendezvous.timeout_s
        try:
            self._store, prefix = meet(rendezvous, deadline_s, listener)
            self._group = _connect(dist.PrefixStore(f"{prefix}/gloo", self._store), rendezvous)
        except RuntimeError as exc:  # torch's own: a peer went away between two steps
            raise PeerLost(-1, f"joining failed: {reason(exc)}") from exc
        finally:
            if self._group is None:
                self.close()

    def send(self, x: torch.Tensor, to: int, tag: int) -> Message:
        """Start to send a contiguous CPU tensor; it must not change before ``finish``."""
        return self._start("send", x, to, tag)

    def receive(self, x: torch.Tensor, source: int, tag: int) -> Message:
        """Start to fill a contiguous CPU tensor."""
        return self._start("recv", x, source, tag)

    def _start(self, name: str, x: torch.Tensor, peer: int, tag: int) -> Message:
        if self._group is None:
            raise PeerLost(self.rank, "this rank has left the group")
        try:
            message = Message(getattr(self._group, name)([x], peer, tag), peer, x)
        except RuntimeError as exc:
            raise PeerLost(peer, reason(exc)) from exc
        self._open.add(message)
        return message

    def finish(self, message: Message, deadline_s: float) -> None:
        """Wait for a message. Raises PeerLost."""
        left_s = max(0.001, deadline_s - time.monotonic())  # 0 would mean for ever
        try:
            message.work.wait(timedelta(seconds=left_s))
        except RuntimeError as exc:
            raise PeerLost(message.peer, reason(exc)) from exc
        message.work = None
        self._open.discard(message)

    def close(self) -> None:
        """Close all connections: peers that wait for this rank notice at once."""
        for message in self._open:  # whoever handles an error may still see them
            message.work = None
        self._open.clear()
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._store = None


def _connect(store: Any, rendezvous: Rendezvous) -> Any:
    """Gloo's process group, on the network interface that leads to rank 0."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=own_address(rendezvous))]
    options._timeout = timedelta(seconds=rendezvous.timeout_s)
    return gloo(store, rendezvous.rank, rendezvous.world_size, options)
