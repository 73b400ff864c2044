"""How much of a model is asked for: all, what it takes to open it, some ranges, or one shard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bridge.show import show
from bridge.term import Atom, Term
from bridge.text import text_of
from control.load_options import MeshShape
from control.peer_files.offer import FileRanges, ranges_of, ranges_term
from models.checkpoint import Checkpoint
from models.mesh import mesh, units_of
from models.sharding import RankShard


@dataclass(frozen=True, slots=True)
class ShardOf:
    """One rank of a mesh."""

    shape: MeshShape
    rank: int
    experts: Literal["inside", "across"] = "inside"

    def shard(self, checkpoint: Checkpoint) -> RankShard:
        """What the rank will hold, as a load order cuts it. Raises IllegalShares."""
        shards = mesh(
            checkpoint.spec,
            self.shape.grid,
            units=units_of(checkpoint.spec, checkpoint),
            experts=self.experts,
            split_embedding=True,
        )
        return shards[self.rank]


@dataclass(frozen=True, slots=True)
class Part:
    """``ranges`` are used with the kind of that name, ``shards`` with theirs."""

    kind: Literal["whole", "header", "ranges", "shard"] = "whole"
    ranges: FileRanges = field(default_factory=dict)
    shards: tuple[ShardOf, ...] = ()

    @property
    def key(self) -> str:
        """The same for equal parts."""
        return f"{self.kind} {sorted(self.ranges.items())} {self.shards}"


WHOLE = Part()
HEADER = Part("header")


def part_of(term: Term) -> Part:
    """``whole | header | {ranges, #{File => [{Start, Stop}]}} | {shard, Map | [Map]}``.

    A map is ``#{tensor, pipeline, shares => [float()], rank, experts => inside | across}``, as in
    a load order.

    Raises:
        ValueError: anything else.
    """
    match term:
        case "whole":
            return WHOLE
        case "header":
            return HEADER
        case ("ranges", dict(ranges)):
            return Part("ranges", ranges_of(ranges))
        case ("shard", dict(one)):
            return Part("shard", shards=(_shard(one),))
        case ("shard", [*several]) if several:
            return Part("shard", shards=tuple(_shard(one) for one in several))
        case _:
            raise ValueError(f"not a part of a model: {show(term, 120)}")


def part_term(part: Part) -> Term:
    """``part`` as a message; ``part_of`` reads it."""
    match part.kind:
        case "ranges":
            return (Atom("ranges"), ranges_term(part.ranges))
        case "shard":
            return (Atom("shard"), [_shard_term(one) for one in part.shards])
        case kind:
            return Atom(kind)


def _shard_term(one: ShardOf) -> dict[Any, Term]:
    return {
        Atom("tensor"): one.shape.tensor,
        Atom("pipeline"): one.shape.pipeline,
        Atom("shares"): [float(share) for share in one.shape.shares],
        Atom("rank"): one.rank,
        Atom("experts"): Atom(one.experts),
    }


def _shard(term: Term) -> ShardOf:
    match term:
        case {
            "tensor": int(tensor),
            "pipeline": int(pipeline),
            "shares": [*shares],
            "rank": int(rank),
        } if 0 <= rank < tensor * pipeline == len(shares) and all(
            isinstance(share, int | float) and 0 < share < math.inf for share in shares
        ):
            experts = term.get(Atom("experts"), "inside")
            cut: Literal["inside", "across"] = (
                "across"
                if isinstance(experts, str | bytes) and text_of(experts) == "across"
                else "inside"
            )
            found = tuple(float(share) for share in shares if isinstance(share, int | float))
            return ShardOf(MeshShape(tensor, pipeline, found), rank, cut)
        case _:
            raise ValueError(
                f"expected #{{tensor, pipeline, shares, rank}} of one rank, got {show(term, 160)}"
            )
