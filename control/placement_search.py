"""The search of one engine's seats: every shape's best arrangement, worked out or set aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Final

from control import greedy
from control.appraise import Appraisal, Appraiser, Refusal
from control.arrange import SMALL, Arranger, Rough
from control.cost_model import Seat, Stages
from control.load_options import MeshShape
from control.shortage import room_text
from control.topology import Topology
from models.legal import tensor_limits

FINALISTS: Final = 6  # shapes that are worked out
THOROUGH: Final = 3  # of these, the ones of which several arrangements are
MOST_TRIED: Final = 60  # where none of them fits
REFINED_SMALL: Final = 5  # arrangements whose shares are moved about, of a few seats
REFINED: Final = 1  # of many
NARROW: Final = 4  # tensor ranks up to which that is done
MOVES: Final = (12.0, 4.0)  # of a stage's ``SHARE_UNITS``
MOST_MOVES: Final = 20
RINGS_UP_TO: Final = 6  # machines whose rings are all looked at as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A shape on one engine.

    Attributes:
        best: its best arrangement; without layers where it was not worked out.
        rough_s: what that costs by a rough estimate; 0 where it was worked out.
    """

    engine: str
    on: Appraiser
    best: Appraisal
    rough_s: float = 0.0

    @property
    def order(self) -> tuple[float, float, int, int, tuple[str, ...]]:
        """Least is best: worked out, then set aside, then impossible."""
        rough_s = self.rough_s or float("inf")
        return (self.best.cost_s, rough_s, *self.best.order[1:])


class Search:
    """Arrangements of one engine's seats.

    Args:
        on: works them out.
        seats: in any order, at least one.
        engine: told in rows.
        asked: the only shape to look at.
        most_visits: of the plain strategy.
    """

    def __init__(
        self,
        on: Appraiser,
        topology: Topology,
        seats: Sequence[Seat],
        engine: str,
        asked: MeshShape | None,
        most_visits: int,
    ) -> None:
        self.on, self.topology, self.seats, self.engine = on, topology, seats, engine
        self.shape = (asked.tensor, asked.pipeline) if asked is not None else None
        limits = tensor_limits(on.cuts.spec, across=on.cuts.experts == "across")
        self.arranger = Arranger(
            on,
            topology,
            seats,
            max_tensor=min(limit for _, limit in limits.values()),
            max_stages=on.cuts.spec.num_layers,
        )
        self.num_considered, self._most_visits = 0, most_visits

    def best_of_shapes(self) -> list[Row]:
        """A row for every shape that these seats allow."""
        impossible = self._impossible()
        if impossible is not None:
            return [impossible]
        if len(self.seats) <= SMALL:
            every = [stages for stages in self.arranger.every() if self._is_asked(stages)]
            self.num_considered = len(every)
            found = [self.on.work_out(stages) for stages in every]
            return self._rows(self._refined(found, REFINED_SMALL) + self._plain(), [])
        rough: dict[tuple[int, ...], Rough] = {}
        for stages in self.arranger.likely(self.shape):
            key = (len(stages), *(id(seat) for stage in stages for seat in stage))
            if key not in rough:
                rough[key] = self.arranger.rough(stages)
        self.num_considered = len(rough)
        ranked = sorted(rough.values(), key=lambda one: (one.cost_s, -one.room, _names(one.stages)))
        return self._rows(self._refined(self._finals(ranked), REFINED) + self._plain(), ranked)

    def plain(self) -> list[Row]:
        """What the plain strategy chooses, pipeline before tensor; or why it finds nothing."""
        found = [self._greedy(sharding) for sharding in ("pipeline", "tensor")]
        rows = [self._row(one) for one in found if one is not None]
        if rows:
            return rows[:1]
        stages = (tuple(self.seats),)
        why = "no ring of linked machines has the memory; " + room_text(self.on, stages)
        return [self._row(Appraisal(stages=stages, refusal=self.on.refuse(stages, why)))]

    # -- inside ----------------------------------------------------------------------------

    def _finals(self, ranked: Sequence[Rough]) -> list[Appraisal]:
        """The most promising shapes, worked out; more of them until one fits."""
        queue: dict[tuple[int, int], list[Stages]] = {}
        for one in ranked:
            if one.room >= 1:
                queue.setdefault(_size(one.stages), []).append(one.stages)
        found: list[Appraisal] = []
        tried = 0
        for number, arrangements in enumerate(queue.values()):
            fits = any(one.refusal is None for one in found)
            if tried >= MOST_TRIED or (fits and number >= FINALISTS):
                break
            chosen = [arrangements[0], arrangements[0][::-1]]
            if number < THOROUGH:
                chosen += [*arrangements[1:2], *self.arranger.chained(arrangements[0])]
            if not fits:
                chosen += arrangements[2:6]
            for stages in dict.fromkeys(chosen):
                found.append(self.on.work_out(stages))
                tried += 1
        return found

    def _refined(self, found: list[Appraisal], count: int) -> list[Appraisal]:
        """The same, and the cheapest tensor groups with parts moved from rank to rank.

        Heads and blocks come in whole pieces, so shares in proportion to speed are not the best.
        """
        if self.on.asked_shares:
            return found
        best = sorted((one for one in found if one.refusal is None), key=_order)[:count]
        return found + [self._refine(one) for one in best if 1 < len(one.stages[0]) <= NARROW]

    def _refine(self, best: Appraisal) -> Appraisal:
        tensor, tries = len(best.stages[0]), 0
        for step in MOVES:
            better = True
            while better and tries < MOST_MOVES:
                better = False
                for stage, (i, j) in product(
                    range(len(best.shares)), permutations(range(tensor), 2)
                ):
                    shares = [list(stage) for stage in best.shares]
                    shares[stage][i] -= step
                    shares[stage][j] += step
                    if shares[stage][i] <= 0 or tries >= MOST_MOVES:
                        continue
                    tries += 1
                    moved = self.on.work_out(best.stages, shares=[tuple(x) for x in shares])
                    if moved.order < best.order:
                        best, better = moved, True
        return best

    def _plain(self) -> list[Appraisal]:
        """The plain strategy's choices, where its rings can all be listed."""
        if len({seat.node for seat in self.seats}) > RINGS_UP_TO or self.on.asked_shares:
            return []
        found = [self._greedy(sharding) for sharding in ("pipeline", "tensor")]
        return [one for one in found if one is not None and self._is_asked(one.stages)]

    def _greedy(self, sharding: greedy.Sharding) -> Appraisal | None:
        on = self.on
        need = max(on.whole_bytes(seat) for seat in self.seats)
        chosen = greedy.choose(
            self.seats,
            self.topology,
            on.cuts.spec,
            need,
            sharding=sharding,
            most_visits=self._most_visits,
        )
        self.num_considered += chosen.num_rings
        if not chosen.stages:
            return None
        return on.work_out(chosen.stages, shares=chosen.shares, layers=chosen.layers)

    def _rows(self, found: Iterable[Appraisal], ranked: Sequence[Rough]) -> list[Row]:
        best: dict[tuple[int, int], Appraisal] = {}
        for one in found:
            size = _size(one.stages)
            if size not in best or one.order < best[size].order:
                best[size] = one
        rows = [self._row(one) for one in best.values()]
        aside: dict[tuple[int, int], Rough] = {}
        for rough in ranked:
            size = _size(rough.stages)
            if size not in best:
                aside.setdefault(size, rough)
        for rough in aside.values():
            refusal = None
            if rough.room < 1:
                refusal = self.on.refuse(rough.stages, room_text(self.on, rough.stages))
            made = Appraisal(stages=rough.stages, refusal=refusal)
            rows.append(self._row(made, 0.0 if refusal else rough.cost_s))
        return rows

    def _row(self, best: Appraisal, rough_s: float = 0.0) -> Row:
        return Row(engine=self.engine, on=self.on, best=best, rough_s=rough_s)

    def _is_asked(self, stages: Stages) -> bool:
        return self.shape is None or _size(stages) == self.shape

    def _impossible(self) -> Row | None:
        """The shape that was asked for, where no seats can make it."""
        if self.shape is None:
            return None
        tensor, pipeline = self.shape
        made = tuple((self.seats[0],) * tensor for _ in range(pipeline))
        found: Refusal | None = self.on.check(made)
        if found is None and tensor * pipeline > len(self.seats):
            why = (
                f"{tensor * pipeline} ranks were asked for, {len(self.seats)} devices may take one"
            )
            found = self.on.refuse(made, why)
        return self._row(Appraisal(stages=made, refusal=found)) if found else None


def _order(one: Appraisal) -> tuple[float, int, int, tuple[str, ...]]:
    return one.order


def _size(stages: Stages) -> tuple[int, int]:
    return len(stages[0]), len(stages)


def _names(stages: Stages) -> list[str]:
    return [str(seat) for stage in stages for seat in stage]
