"""Where a model would run over many machines, at the least cost, and why not elsewhere.

``plan`` is one pure decision: machines, measured links and speeds in; out come the chosen mesh
with what each rank holds and takes, runners-up, and what forbids each other shape. Arrangements
are sorted by a rough estimate (``control.arrange``), the best are worked out
(``control.appraise``), and what is chosen has been checked rank by rank against its footprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from control.appraise import Appraisal, Appraiser, Refusal
from control.cost_model import Estimate, Goal, Network, Policy, Seat
from control.errors import NoPlacement
from control.greedy import MOST_VISITS
from control.load_options import MeshShape
from control.mesh_shape import shape_of
from control.placement_request import Request
from control.placement_search import Row, Search
from control.placement_types import Candidate, Placement, RankPlace
from control.plan_text import roughly, slower
from control.rank_bytes import Cuts
from control.seats import Fenced, Member, Speeds, seats_of
from control.shortage import MOST_NAMED, gb
from control.topology import Topology
from models.legal import tensor_limits
from models.spec import ModelSpec
from models.stored import Assumed, Stored

__all__ = ["Fenced", "Goal", "Member", "Option", "Plan", "Policy", "plan"]

Strategy = Literal["cost", "greedy"]
MOST_SHOWN: Final = 2  # options whose ranks are listed
MOST_SPLIT: Final = 8  # tensor ranks that the least part of a model is taken for


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One shape. ``candidate.why`` says why it is not taken; empty for the chosen one.

    Attributes:
        estimate: None where it is impossible, or was put aside by a rough estimate.
    """

    candidate: Candidate
    engine: str
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decision.

    Attributes:
        chosen: None where nothing fits; ``refusal`` is then the reason to tell.
        others: runners-up, best first, then what is impossible.
        fenced: machines that take no rank.
        num_considered: arrangements that were looked at.
    """

    request: Request
    goal: Goal
    chosen: Option | None
    others: tuple[Option, ...]
    fenced: tuple[Fenced, ...]
    num_considered: int
    refusal: Refusal | None = None

    @property
    def placement(self) -> Placement:
        """As the decision for one machine is told."""
        return Placement(
            request=self.request,
            engine=self.chosen.engine if self.chosen else "torch",
            chosen=self.chosen.candidate if self.chosen else None,
            rejected=tuple(option.candidate for option in self.others),
            refusal=self.refusal,
        )


def plan(
    request: Request,
    machines: Sequence[Member],
    topology: Topology,
    spec: ModelSpec,
    stored: Stored | None,
    speeds: Speeds,
    *,
    kind: str = "",
    goal: Goal = Goal.LATENCY,
    policy: Policy | None = None,
    current: tuple[tuple[str, str], ...] = (),
    strategy: Strategy = "cost",
    most_visits: int = MOST_VISITS,
) -> Plan:
    """Choose devices, their order, a mesh over them and everybody's share.

    Does not depend on the order of ``machines``, nor on that in which links were recorded.

    Args:
        request: what to place; its shape, device and engine are kept to where it names them.
            Shares that are all equal ask for nothing.
        machines: of the cluster, busy memory taken off.
        topology: links between them.
        spec: of the model; stored: its checkpoint, None where it is not downloaded.
        speeds: by node and device; what is missing is assumed to be slow.
        kind: the storage format to assume where there is no checkpoint.
        goal: what to be best at.
        policy: what the cluster is for.
        current: ``(node, device)`` of a running instance's ranks, which a move would restart.
        strategy: ``greedy`` is ``control.greedy``; most_visits: when that gives up.
    """
    policy = policy or Policy()
    by_engine, fenced = seats_of(request, machines, spec, speeds)
    cuts = Cuts(
        spec,
        stored if stored is not None else Assumed(kind),
        assumed=stored is None,
        experts="across" if request.experts == "across" else "inside",
        context_tokens=request.context_tokens,
        num_slots=request.num_slots,
    )
    asked = request.shape
    shares = asked.shares if asked is not None and len(set(asked.shares)) > 1 else ()
    rows: list[Row] = []
    num_considered = 0
    for engine, seats in sorted(by_engine.items()):
        on = Appraiser(
            model=request.model,
            cuts=cuts,
            network=Network(topology),
            goal=goal,
            policy=policy,
            files=frozenset(member.host.name for member in machines if member.has_files),
            current=current,
            asked_shares=shares,
        )
        seats, useless = _fence(on, topology, seats)
        fenced += useless
        if not seats:
            continue
        search = Search(on, topology, seats, engine, asked, most_visits)
        rows += search.plain() if strategy == "greedy" else search.best_of_shapes()
        num_considered += search.num_considered
    best, options = _explain(request, goal, policy, sorted(rows, key=lambda row: row.order))
    refusal: Refusal | None = None
    if best is None:
        told = [option.candidate.refusal for option in options if option.candidate.refusal]
        nobody = "; ".join(f"{one.node} {one.why}" for one in fenced[:MOST_NAMED])
        refusal = (
            told[0] if told else NoPlacement(request.model, "any shape", nobody or "no machine")
        )
    return Plan(
        request=request,
        goal=goal,
        chosen=best,
        others=tuple(options),
        fenced=tuple(sorted(fenced, key=lambda one: (one.node, one.why))),
        num_considered=num_considered,
        refusal=refusal,
    )


def _explain(
    request: Request, goal: Goal, policy: Policy, rows: Sequence[Row]
) -> tuple[Option | None, list[Option]]:
    """The first row that holds up to its footprints, and why none of the others."""
    best: Option | None = None
    others: list[Option] = []
    shown = 0
    for row in rows:
        found = row.best
        candidate = Candidate(shape=MeshShape.even(*_size(found)), refusal=found.refusal)
        if found.estimate is not None and shown < MOST_SHOWN:
            candidate, shown = _candidate(request, row), shown + 1
        option = Option(candidate=candidate, engine=row.engine, estimate=found.estimate)
        if best is None and found.estimate is not None and candidate.refusal is None:
            best = option
            continue
        why = _why(candidate.refusal)
        if not why and best is not None and best.estimate is not None:
            if found.estimate is not None:
                why = slower(found.estimate, best.estimate, goal, policy)
            else:
                why = roughly(row.rough_s, best.estimate)
        others.append(replace(option, candidate=replace(candidate, why=why)))
    return best, others


def _why(refusal: Refusal | None) -> str:
    if refusal is None:
        return ""
    return refusal.why if isinstance(refusal, NoPlacement) else str(refusal)


def _size(found: Appraisal) -> tuple[int, int]:
    return len(found.stages[0]), len(found.stages)


def _shape(request: Request, row: Row) -> MeshShape:
    if row.on.asked_shares and request.shape is not None:
        return request.shape
    return shape_of(row.on.cuts.costs, row.best.layers, row.best.shares)


def _candidate(request: Request, row: Row) -> Candidate:
    """What every rank holds and takes, as it will work that out itself."""
    shape, cuts = _shape(request, row), row.on.cuts
    seats = [seat for stage in row.best.stages for seat in stage]
    shards = cuts.mesh(shape.grid)
    network = len({seat.node for seat in seats}) > 1
    for shard in shards:
        assert shard.layers == row.best.layers[shard.pipeline.device_rank], (shape, shard)
    ranks = tuple(
        RankPlace(
            node=seat.node,
            device=seat.device,
            told=seat.told,
            pool=seat.pool,
            kernels=seat.kernels,
            threads=seat.threads,
            shard=shard,
            needs=cuts.needs(seat, shard, network=network),
            limit_bytes=seat.free_bytes,
        )
        for seat, shard in zip(seats, shards, strict=True)
    )
    over = [rank for rank in ranks if rank.needs.total_bytes > rank.limit_bytes]
    refusal = None
    if over:
        texts = [
            f"{one.node} {one.device} has {gb(one.limit_bytes)}, rank {one.shard.rank} takes "
            f"{gb(one.needs.total_bytes)}"
            for one in over[:MOST_NAMED]
        ]
        refusal = NoPlacement(request.model, str(shape), "; ".join(texts))
    return Candidate(shape=shape, ranks=ranks, refusal=refusal)


def _fence(
    on: Appraiser, topology: Topology, seats: Sequence[Seat]
) -> tuple[list[Seat], list[Fenced]]:
    """Devices that can take a rank, and why the others cannot."""
    limits = tensor_limits(on.cuts.spec, across=on.cuts.experts == "across")
    most = min(MOST_SPLIT, *(limit for _, limit in limits.values()))
    nodes = {seat.node for seat in seats}
    kept, fenced = [], []
    for seat in seats:
        least = min(on.fixed_bytes(seat, 1), on.fixed_bytes(seat, most))
        whole = on.whole_bytes(seat) + on.fixed_bytes(seat, 1)
        room = f"{seat.device} has {gb(seat.free_bytes)}"
        if seat.free_bytes < least:
            why = f"{room}, a rank's process and workspace alone take {gb(least)}"
            fenced.append(Fenced(seat.node, why))
        elif (
            seat.free_bytes < whole
            and len(nodes) > 1
            and not any(other in nodes for other in topology.row(seat.node) if other != seat.node)
        ):
            why = f"no link to another machine that computes; {room}, all takes {gb(whole)}"
            fenced.append(Fenced(seat.node, why))
        else:
            kept.append(seat)
    return kept, fenced
