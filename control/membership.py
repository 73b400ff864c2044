"""The registered process ``membership``: which machines the cluster has and what they offer.

Call ``nodes`` answers a list of maps as in CONTRACT section 3. One machine is a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bridge.gen_server import GenServer
from bridge.term import Atom, Term
from control.machine import Machine


class Membership(GenServer):
    """Keeps the list of machines.

    Args:
        read: measures this machine; passed in, so that tests choose the figures.
        roles: what this machine may do: compute, coordinator, storage.
    """

    def __init__(self, read: Callable[[], Machine], roles: tuple[str, ...]) -> None:
        super().__init__()
        self._read, self.roles = read, roles

    def format_state(self) -> Term:
        return {Atom("roles"): [Atom(r) for r in self.roles]}

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "nodes":
                return [self._this_machine()]
            case _:
                return await super().handle_call(request, from_)

    def _this_machine(self) -> Term:
        return {
            Atom("name"): self.me.node.name,
            Atom("state"): Atom("up"),
            Atom("roles"): [Atom(r) for r in self.roles],
            **self._read().to_term(),
            Atom("os_pid"): os.getpid(),
        }
