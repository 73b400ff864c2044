"""When an instance may be placed anew: at once at first, ever later where machines flap. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

WINDOW_S: Final = 300.0  # moves longer ago do not count
FREE_MOVES: Final = 2  # in the window, before one has to wait
FIRST_WAIT_S: Final = 5.0  # doubles with every further move
MOST_WAIT_S: Final = 120.0
STABLE_S: Final = 10.0  # how long a machine is up before instances grow onto it
GROW_EVERY_S: Final = 120.0  # between two moves of an instance that runs well as it is


@dataclass(slots=True)
class Moves:
    """What moved when, and since when machines are up.

    Attributes:
        moved_s: by instance, the times of its moves, the oldest first.
        up_s: by node.
    """

    moved_s: dict[str, list[float]] = field(default_factory=dict)
    up_s: dict[str, float] = field(default_factory=dict)

    def note_move(self, instance: str, now_s: float) -> None:
        """It is being placed anew."""
        kept = [t for t in self.moved_s.get(instance, ()) if now_s - t < WINDOW_S]
        self.moved_s[instance] = [*kept, now_s]

    def note_up(self, node: str, now_s: float) -> None:
        """A machine came."""
        self.up_s[node] = now_s

    def note_down(self, node: str) -> None:
        """It went."""
        self.up_s.pop(node, None)

    def forget(self, instance: str) -> None:
        """It is no more."""
        self.moved_s.pop(instance, None)

    def wait_s(self, instance: str, now_s: float) -> float:
        """How long an instance that lost a machine waits before it is placed again."""
        recent = [t for t in self.moved_s.get(instance, ()) if now_s - t < WINDOW_S]
        if len(recent) < FREE_MOVES:
            return 0.0
        pause_s = min(MOST_WAIT_S, FIRST_WAIT_S * 2.0 ** (len(recent) - FREE_MOVES))
        return max(0.0, recent[-1] + pause_s - now_s)

    def may_grow(self, instance: str, now_s: float) -> bool:
        """Whether one that runs may be moved because there is something better."""
        moved = self.moved_s.get(instance)
        return not moved or now_s - moved[-1] >= GROW_EVERY_S

    def settles_in_s(self, now_s: float) -> float:
        """Until every machine that is up has been so for a while; 0 when all have."""
        waits = [at_s + STABLE_S - now_s for at_s in self.up_s.values()]
        return max([0.0, *waits])


@dataclass(frozen=True, slots=True)
class Tenant:
    """An instance that takes memory.

    Attributes:
        node: of its coordinator.
        wanted: somebody asked for it to be kept; a request brought up the others.
        bytes: that it takes, by node and pool.
        idle_s: since its last request ended; 0 while it has one.
    """

    id: str
    node: str
    wanted: bool
    priority: int
    bytes: Mapping[tuple[str, str], int]
    idle_s: float = 0.0

    def with_idle(self, idle_s: float) -> Tenant:
        return replace(self, idle_s=idle_s)


def victims(tenants: list[Tenant], *, wanted: bool, priority: int) -> list[Tenant]:
    """Who may be asked to go for a newcomer, the first first: least priority, longest idle.

    Nothing goes for an equal: what somebody asked for goes only for a higher priority; what a
    request brought up also for another request of the same priority, when it has none itself.

    Args:
        wanted, priority: of the newcomer.
    """
    may_go = [
        one
        for one in tenants
        if one.priority < priority
        or (not one.wanted and one.priority == priority and (wanted or one.idle_s > 0))
    ]
    return sorted(may_go, key=lambda one: (one.wanted, one.priority, -one.idle_s, one.id))


def fewest(may_go: Sequence[Tenant], fits: Callable[[Sequence[Tenant]], bool]) -> list[Tenant]:
    """Who has to go: none of them could stay; empty where not even all of them make room.

    Args:
        may_go: the first first.
        fits: whether there is room once these are gone.
    """
    going: list[Tenant] = []
    for one in may_go:
        going.append(one)
        if fits(going):
            break
    else:
        return []
    for one in reversed(going[:-1]):  # without the last there was no room
        fewer = [other for other in going if other is not one]
        if fits(fewer):
            going = fewer
    return going
