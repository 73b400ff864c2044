"""Virtual time, and a network of connections as TCP has them: late, cut, half open, in order.

A message that meets a cut link waits in the sender's buffer, as TCP sends again, and comes when
the link is back, if neither end has given the connection up. Loss models what TCP does not
forgive: a full queue, a process that could not keep up.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

REDIAL_S = 0.5


class World:
    """The clock and the links.

    Attributes:
        now_s: true virtual time.
        group: part of a partition that each machine is in; links across are cut.
        cuts: directed links that are cut besides.
        loss, slow_s: chance that a message is lost, longest extra delay.
        sent: messages given to the network, by kind.
    """

    def __init__(self, rng: Random, *, delay_s: tuple[float, float] = (0.0005, 0.03)) -> None:
        self.rng, self.delay_s = rng, delay_s
        self.now_s = 0.0
        self.group: dict[str, int] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.loss = self.slow_s = 0.0
        self.sent: dict[str, int] = {}
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._arrival_s: dict[tuple[str, str], float] = {}
        self._held: list[tuple[str, str, Callable[..., None], tuple[Any, ...]]] = []
        self.latest_arrival_s = 0.0

    def at(self, time_s: float, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` at ``time_s``; in the order of the calls where times are equal."""
        heapq.heappush(self._queue, (time_s, next(self._order), act, args))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            time_s, _, act, args = heapq.heappop(queue)
            self.now_s = time_s
            act(*args)
        self.now_s = until_s

    def linked(self, a: str, b: str) -> bool:
        """Whether bytes pass from ``a`` to ``b`` now."""
        group = self.group
        if group and group.get(a, 0) != group.get(b, 0):
            return False
        return not self.cuts or (a, b) not in self.cuts

    def last_arrival_s(self, a: str, b: str) -> float:
        """When the last message so far from ``a`` arrives at ``b``."""
        return self._arrival_s.get((a, b), 0.0)

    def next_session(self) -> int:
        """Names a connection; no other has it."""
        return next(self._order)

    def carry(self, a: str, b: str, kind: str, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` when a message sent now from ``a`` arrives at ``b``."""
        self.sent[kind] = self.sent.get(kind, 0) + 1
        if self.loss and self.rng.random() < self.loss:
            return
        if not self.linked(a, b):
            self._held.append((a, b, act, args))
            return
        low_s, high_s = self.delay_s
        arrival_s = self.now_s + low_s + (high_s - low_s) * self.rng.random()
        if self.slow_s:
            arrival_s += self.slow_s * self.rng.random() ** 3
        arrival_s = max(arrival_s, self._arrival_s.get((a, b), 0.0))
        self._arrival_s[a, b] = arrival_s
        self.latest_arrival_s = max(self.latest_arrival_s, arrival_s)
        self.at(arrival_s, act, *args)

    def release(self) -> None:
        """Links have changed: what waited and can pass now does."""
        held, self._held = self._held, []
        for a, b, act, args in held:
            if self.linked(a, b):
                arrival_s = self.now_s + 0.3 * self.rng.random()
                self._arrival_s[a, b] = max(arrival_s, self._arrival_s.get((a, b), 0.0))
                self.at(arrival_s, act, *args)
            else:
                self._held.append((a, b, act, args))

    def lose_power(self, machine: str) -> None:
        """What waited in the machine's own buffers is gone."""
        self._held = [waiting for waiting in self._held if waiting[0] != machine]
