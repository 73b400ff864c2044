"""The plain placement: the smallest ring of machines with enough memory, by fast links if it can.

Kept as a strategy of its own and as what the planner is compared with. It lists rings, of which
a full mesh of n machines has more than n! / n: it gives up after a stated amount of work.

Source: exo's ``master/placement.py``, which the project began from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from control.cost_model import Seat, Stages
from control.topology import FAST, Topology
from models.shares import apportion
from models.spec import ModelSpec

Sharding = Literal["pipeline", "tensor"]
MOST_VISITS: Final = 20_000  # machines looked at in rings


@dataclass(frozen=True, slots=True)
class Choice:
    """What it chose.

    Attributes:
        stages: one rank a machine; empty where no ring has the memory.
        layers: of each stage; shares: of each stage's ranks.
        num_rings: looked at; cut_off: there were more.
    """

    stages: Stages
    layers: tuple[range, ...]
    shares: tuple[tuple[float, ...], ...]
    num_rings: int
    cut_off: bool


def choose(
    seats: Sequence[Seat],
    topology: Topology,
    spec: ModelSpec,
    need_bytes: float,
    *,
    sharding: Sharding = "pipeline",
    most_visits: int = MOST_VISITS,
) -> Choice:
    """Choose machines: rings, memory, sharding constraints, smallest, fast links, most memory.

    Args:
        seats: the first of each machine is taken.
        topology: whose rings are listed; a machine alone is a ring of one.
        need_bytes: of the whole model, which the memory of a ring must reach.
        sharding: in a pipeline layers go by memory; tensor ranks are equal, and their number
            must divide the hidden size and the KV heads.
        most_visits: sum of lengths of the rings looked at.
    """
    seat_of: dict[str, Seat] = {}
    for seat in seats:
        seat_of.setdefault(seat.node, seat)
    rings: list[tuple[str, ...]] = [(name,) for name in sorted(seat_of)]
    visits, cut_off = 0, False
    for ring in topology.cycles(most=most_visits):
        visits += len(ring)
        if visits > most_visits:
            cut_off = True
            break
        if all(name in seat_of for name in ring):
            rings.append(ring)

    def memory(ring: tuple[str, ...]) -> int:
        return sum(seat_of[name].free_bytes for name in ring)

    def fits(ring: tuple[str, ...]) -> bool:
        if memory(ring) < need_bytes:
            return False
        if sharding == "pipeline":
            return len(ring) <= spec.num_layers
        return not (spec.hidden_size % len(ring) or spec.num_kv_heads % len(ring))

    good = [ring for ring in rings if fits(ring)]
    if not good:
        return Choice((), (), (), len(rings), cut_off)
    smallest = min(map(len, good))
    good = [ring for ring in good if len(ring) == smallest]
    good = [ring for ring in good if _is_fast(ring, topology)] or good
    ring = min(good, key=lambda ring: (-memory(ring), ring))
    members = [seat_of[name] for name in ring]
    if sharding == "tensor":
        shares = ((1.0,) * len(ring),)
        return Choice((tuple(members),), (range(spec.num_layers),), shares, len(rings), cut_off)
    counts = apportion(spec.num_layers, [float(max(1, seat.free_bytes)) for seat in members])
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    layers = tuple(range(stop - n, stop) for stop, n in zip(stops, counts, strict=True))
    alone: tuple[tuple[float, ...], ...] = ((1.0,),) * len(ring)
    return Choice(tuple((seat,) for seat in members), layers, alone, len(rings), cut_off)


def _is_fast(ring: tuple[str, ...], topology: Topology) -> bool:
    """Every link of a ring of two or more is better than a network's."""
    if len(ring) == 1:
        return False
    links = [topology.link(a, b) for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)]
    return all(link is not None and link.kind in FAST for link in links)
