"""A rank that does not plan: runs what the head orders, in lockstep with all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from compute.links import Links, run
from compute.stage import Stage

WAIT_S: Final = 0.25  # for an order, before the thread looks at its other commands


class Follower:
    """Steps like a :class:`compute.worker.Worker`, and never has anything to say."""

    idle: Final = False  # an order may come at any time

    def __init__(self, stage: Stage, links: Links) -> None:
        if links.receiver is None:
            raise ValueError("a follower needs the head's orders")
        self._stage, self._links, self._receiver = stage, links, links.receiver

    def step(self) -> Sequence[object]:
        """Run one order, if one comes. Raises PeerLost."""
        rows = self._receiver.receive(timeout_s=WAIT_S)
        if rows is not None:
            run(self._stage, self._links, rows)
        return ()
