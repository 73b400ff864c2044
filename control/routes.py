"""Who serves what, as every node hears it from the coordinators themselves.

So requests find their instance without a leader, and go on finding it while there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.process import Process
from bridge.term import Pid, Ref


@dataclass(frozen=True, slots=True)
class Route:
    """A live coordinator.

    Attributes:
        watch: monitor of it.
        context_tokens: of its requests.
    """

    id: str
    model: str
    state: str
    pid: Pid
    epoch: int
    watch: Ref
    context_tokens: int = 0


class Routes:
    """One route an instance: that of its newest epoch.

    Args:
        me: the process that monitors the coordinators.
    """

    def __init__(self, me: Process) -> None:
        self._me = me
        self._routes: dict[str, Route] = {}
        self._newest: dict[str, int] = {}
        self._turn = 0

    def __iter__(self) -> Iterator[Route]:
        return iter(list(self._routes.values()))

    def hear(
        self, id_: str, model: str, state: str, pid: Pid, epoch: int, context_tokens: int
    ) -> bool:
        """A coordinator says how it is; False where a newer one has spoken before."""
        known = self._routes.get(id_)
        if known is not None and known.pid != pid:
            if state == "draining":
                return False  # its requests go on; new ones are for the other
            if epoch < known.epoch and known.state != "draining":
                return False
        if known is not None and known.pid == pid:
            watch = known.watch
        else:
            if known is not None:
                self._me.demonitor(known.watch)
            watch = self._me.monitor(pid)
        self._routes[id_] = Route(id_, model, state, pid, epoch, watch, context_tokens)
        self._newest[id_] = max(epoch, self.newest(id_))
        return True

    def newest(self, id_: str) -> int:
        """The newest epoch that was heard of, also where it has no route any more; 0 for none."""
        return self._newest.get(id_, 0)

    def down(self, watch: Ref) -> Route | None:
        """A monitor fired: the route that ends with it."""
        for route in self:
            if route.watch == watch:
                del self._routes[route.id]
                return route
        return None

    def target_of(self, name: str) -> str | None:
        """What ``pick`` takes for an instance's or a model's id that is routed."""
        if name in self._routes:
            return name
        return name if any(name == route.model for route in self) else None

    def pick(self, target: str) -> Route | None:
        """A ready instance of a model, each in turn; or the very one that is named."""
        ready = [
            route for route in self if target in (route.id, route.model) and route.state == "ready"
        ]
        if not ready:
            return None
        self._turn += 1
        return ready[self._turn % len(ready)]
