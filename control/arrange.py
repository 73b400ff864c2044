"""Which arrangements of seats are worth working out, best first by a rough estimate.

Never all of them: machines are sorted (fast, roomy, near to one of a few leaders) and only the
beginnings of such lists are looked at, so that a thousand machines take a tenth of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from typing import Final

from control.appraise import Appraiser
from control.cost_model import FLOAT_BYTES, ORDER_BYTES, Goal, Seat, Stages
from control.topology import Topology

SMALL: Final = 4  # seats of which every arrangement is looked at
MOST_LEADERS: Final = 8
MOST_RANKS: Final = 256
_FEW: Final = 8  # sizes that are all looked at
_CHAINED: Final = 64  # most stages that are put in an order of their own
TYPICAL_BYTES_PER_S: Final = 1e8  # from a peer, before it is looked up which one
_STEP_S: Final = 20e-6  # latencies within a factor of two of one another are alike


@dataclass(frozen=True, slots=True)
class Rough:
    """An arrangement with what it costs, about.

    Attributes:
        cost_s: infinity where memory is short.
        room: parts of the model that its memory holds; below 1 it is short.
    """

    cost_s: float
    room: float
    stages: Stages


@dataclass(slots=True)
class Arranger:
    """Looks for arrangements of some seats of one engine."""

    on: Appraiser
    topology: Topology
    seats: Sequence[Seat]
    max_tensor: int
    max_stages: int
    _layer_s: dict[int, float] = field(default_factory=dict)  # by id: seats live as long
    _rooms: dict[tuple[int, int, bool], float] = field(default_factory=dict)
    _sums: dict[tuple[str, ...], float] = field(default_factory=dict)

    def every(self) -> Iterator[Stages]:
        """All arrangements there are; ranks of a stage stand in order of speed."""
        seats = sorted(self.seats, key=self._speed)
        at = {id(seat): i for i, seat in enumerate(seats)}
        for size in range(1, len(seats) + 1):
            for tensor, pipeline in self._shapes(size):
                for chosen in permutations(seats, size):
                    stages = _deal(chosen, tensor, pipeline)
                    pairs = (p for stage in stages for p in pairwise(stage))
                    if all(at[id(a)] < at[id(b)] for a, b in pairs) and _alike(stages):
                        yield stages

    def likely(self, shape: tuple[int, int] | None) -> Iterator[Stages]:
        """Beginnings of sorted lists, in the shapes their sizes allow; or in one shape alone."""
        sizes = [shape[0] * shape[1]] if shape else self._sizes()
        for order in self._lists(max(sizes)):
            for size in sizes:
                if size > len(order):
                    break
                chosen = _by_machine(order[:size])
                for tensor, pipeline in [shape] if shape else self._shapes(size):
                    stages = _deal(chosen, tensor, pipeline)
                    if _alike(stages):
                        yield stages

    def chained(self, stages: Stages) -> list[Stages]:
        """The same stages the other way round, and each beside the nearest that is left."""
        if len(stages) == 1:
            return []
        if len(stages) == 2 or len(stages) > _CHAINED:
            return [stages[::-1]]
        size_bytes = FLOAT_BYTES * self.on.cuts.spec.hidden_size
        found = [stages[::-1]]
        for start in (stages[0], stages[-1]):
            chain, left = [start], [stage for stage in stages if stage is not start]
            while left:
                hops = [self.on.network.hop_s(chain[-1], stage, size_bytes) for stage in left]
                chain.append(left.pop(hops.index(min(hops))))
            found += [tuple(chain), tuple(reversed(chain))]
        return found

    def rough(self, stages: Stages) -> Rough:
        """Even layers, ideal shares, fastest stages filled first: no kernel is asked."""
        on, tensor, count = self.on, len(stages[0]), self.on.cuts.spec.num_layers
        each: list[tuple[float, float]] = []
        for stage in stages:
            rate = room = 0.0
            for seat in stage:
                rate += 1 / self._layer(seat)
                room += self._room(seat, tensor, len(stages))
            each.append((1 / rate + (self._sum(stage) if tensor > 1 else 0.0), room))
        room = sum(part for _, part in each)
        if room < 1:
            return Rough(math.inf, room, stages)
        total_s, left = 0.0, 1.0 - len(stages) / count
        for layer_s, part in sorted(each):
            more = max(0.0, min(left, part - 1 / count))
            left -= more
            total_s += layer_s * (1 + more * count)
        total_s += self._messages(stages)
        if on.goal is Goal.THROUGHPUT:
            total_s /= on.cuts.num_slots
        fetch_s = 0.0
        if any(seat.node not in on.files for stage in stages for seat in stage):
            rate = TYPICAL_BYTES_PER_S if on.files else on.policy.outside_bytes_per_s
            fetch_s = on.whole_bytes(stages[0][0]) / (len(stages) * tensor) / rate
        return Rough(on.policy.requests * total_s + fetch_s, room, stages)

    # -- inside ----------------------------------------------------------------------------

    def _speed(self, seat: Seat) -> tuple[float, str, str]:
        return self._layer(seat), seat.node, seat.device

    def _layer(self, seat: Seat) -> float:
        found = self._layer_s.get(id(seat))
        if found is None:
            found = self._layer_s[id(seat)] = self.on.layer_s(seat)
        return found

    def _room(self, seat: Seat, tensor: int, num_stages: int) -> float:
        """Parts of the model that a device holds, as a rank of such a mesh."""
        key = id(seat), tensor, num_stages == 1
        found = self._rooms.get(key)
        if found is None:
            free_bytes = seat.free_bytes - self.on.fixed_bytes(seat, tensor, num_stages)
            found = self._rooms[key] = max(0.0, free_bytes / self.on.whole_bytes(seat))
        return found

    def _sum(self, stage: Sequence[Seat]) -> float:
        """Seconds that sums take in a layer, over all steps."""
        nodes = tuple(seat.node for seat in stage)
        if nodes not in self._sums:
            size_bytes = FLOAT_BYTES * self.on.cuts.spec.hidden_size
            kind = stage[0].kind
            self._sums[nodes] = sum(
                2 * n * self.on.network.sum_s(nodes, kind, size_bytes * positions)
                for positions, n in self.on.steps
            )
        return self._sums[nodes]

    def _messages(self, stages: Stages) -> float:
        """Hops, orders and logits, over all steps."""
        network, spec = self.on.network, self.on.cuts.spec
        head, total_s = stages[-1][0], 0.0
        if len(stages) > 1:
            for positions, n in self.on.steps:
                size_bytes = FLOAT_BYTES * spec.hidden_size * positions
                for before, after in pairwise(stages):
                    total_s += n * network.hop_s(before, after, size_bytes)
                total_s += n * network.seconds(head.node, stages[0][0].node, ORDER_BYTES)
        slots, tokens = self.on.steps[-1]
        nodes = [seat.node for seat in stages[-1]]
        return total_s + tokens * network.gather_s(nodes, FLOAT_BYTES * slots * spec.vocab_size)

    def _shapes(self, size: int) -> list[tuple[int, int]]:
        return [
            (tensor, size // tensor)
            for tensor in range(1, min(size, self.max_tensor) + 1)
            if size % tensor == 0 and size // tensor <= self.max_stages
        ]

    def _sizes(self) -> list[int]:
        """Numbers of ranks: few, about as many as memory needs, and some more."""
        rooms = sorted((self._room(seat, 1, 2) for seat in self.seats), reverse=True)
        need, room = 0, 0.0
        while need < len(rooms) and room < 1:
            room += rooms[need]
            need += 1
        sizes = {*range(1, _FEW + 1), *range(need, need + 5), 12, 16, 4 * -(-need // 4)}
        sizes |= {-(-need * more // 8) for more in (10, 12, 16)}
        return sorted(size for size in sizes if size <= min(len(rooms), MOST_RANKS))

    def _lists(self, most: int) -> Iterator[list[Seat]]:
        """Machines that are all linked with each other, sorted in several ways."""
        fast = sorted(self.seats, key=self._speed)
        roomy = sorted(self.seats, key=lambda s: (-s.free_bytes, *self._speed(s)))
        yield self._linked(fast, most)
        yield self._linked(roomy, most)
        if 0 < len(self.on.files) < len(self.seats):
            yield self._linked(sorted(fast, key=lambda s: s.node not in self.on.files), most)
        roomy_at = {id(seat): i for i, seat in enumerate(roomy)}
        for leader in self._leaders(fast, roomy[0], most):
            row = self.topology.row(leader.node)
            far: dict[float, int] = {}
            near = {}
            for seat in fast:
                if seat.node == leader.node:
                    near[id(seat)] = 0
                elif (link := row.get(seat.node)) is not None:
                    if link.latency_s not in far:
                        far[link.latency_s] = _distance(link.latency_s)
                    near[id(seat)] = far[link.latency_s]
            rest = [seat for seat in fast if id(seat) in near and seat is not leader]
            yield self._linked([leader, *sorted(rest, key=lambda s: near[id(s)])], most)
            rest.sort(key=lambda s: roomy_at[id(s)])
            yield self._linked([leader, *sorted(rest, key=lambda s: near[id(s)])], most)
            if leader in (fast[0], roomy[0]):
                yield self._linked([leader, *rest], most)

    def _leaders(self, fast: Sequence[Seat], roomiest: Seat, most: int) -> list[Seat]:
        """Fast machines far from each other, and the one with the most memory."""
        found, limits = [roomiest], [self._near_s(roomiest)]
        room = max(2, min(MOST_LEADERS, 256 // most))
        for seat in fast:
            if len(found) >= room:
                break
            if seat is roomiest:
                continue
            links = [self.topology.link(leader.node, seat.node) for leader in found]
            if not any(
                seat.node == leader.node or (link is not None and link.latency_s <= limit)
                for leader, link, limit in zip(found, links, limits, strict=True)
            ):
                found.append(seat)
                limits.append(self._near_s(seat))
        return found

    def _near_s(self, seat: Seat) -> float:
        """Up to here another machine is near."""
        row = self.topology.row(seat.node)
        return 2 * min((x.latency_s for name, x in row.items() if name != seat.node), default=0.0)

    def _linked(self, order: Sequence[Seat], most: int) -> list[Seat]:
        """The first of a list that are linked with all before them."""
        kept: list[Seat] = []
        nodes: list[str] = []
        for seat in order:
            if len(kept) == most:
                break
            if seat.node not in nodes:
                if any(self.on.network.between(seat.node, node) is None for node in nodes):
                    continue
                nodes.append(seat.node)
            kept.append(seat)
        return kept


def _deal(seats: Sequence[Seat], tensor: int, pipeline: int) -> Stages:
    return tuple(tuple(seats[i * tensor : (i + 1) * tensor]) for i in range(pipeline))


def _alike(stages: Stages) -> bool:
    """Ranks of a stage can sum with each other: all on CPUs, all CUDA, or all MLX."""
    return all(len({seat.kind for seat in stage}) == 1 for stage in stages)


def _by_machine(seats: Sequence[Seat]) -> list[Seat]:
    """Devices of one kind and machine beside each other, machines as they first come."""
    first: dict[tuple[str, str], int] = {}
    kinds: dict[str, int] = {}
    for i, seat in enumerate(seats):
        kinds.setdefault(seat.kind, i)
        first.setdefault((seat.kind, seat.node), i)
    return sorted(seats, key=lambda seat: (kinds[seat.kind], first[seat.kind, seat.node]))


def _distance(latency_s: float) -> int:
    """Latencies by factors of two."""
    return 1 + max(0, int(math.log2(max(latency_s, _STEP_S) / _STEP_S)))
