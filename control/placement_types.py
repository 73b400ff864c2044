"""What a placement says: each rank's place, shapes that were looked at, and the decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from control.errors import NoPlacement
from control.load_options import MeshShape
from control.placement_request import Request
from models.errors import ModelError
from models.footprint import Footprint, Kernels
from models.sharding import RankShard

if TYPE_CHECKING:
    from control.planner import Plan

MEMORY = "memory"  # what CPU ranks share; a CUDA device has its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """One rank of a mesh.

    Attributes:
        device: where it would run; told: what its port is told, empty lets it choose.
        pool: the memory it takes of: ``MEMORY``, or that of a CUDA device.
        limit_bytes: what the rank may take: the machine's memory less what the others take; 0
            where that is not known.
    """

    node: str
    device: str
    told: str
    pool: str
    kernels: Kernels
    threads: int
    shard: RankShard
    needs: Footprint
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One shape. ``why`` says why it is not taken; empty for the chosen one.

    Attributes:
        ranks: empty where the model cannot be cut so.
        refusal: what makes it impossible; None where it would fit.
    """

    shape: MeshShape
    ranks: tuple[RankPlace, ...] = ()
    refusal: ModelError | NoPlacement | None = None
    why: str = ""

    @property
    def total_bytes(self) -> int:
        """Memory of all ranks."""
        return sum(rank.needs.total_bytes for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The decision.

    Attributes:
        chosen: None where nothing fits; ``refusal`` is then the reason to tell.
        rejected: every other shape that was looked at.
        plan: with estimates, where it was planned over several machines.
    """

    request: Request
    engine: str
    chosen: Candidate | None
    rejected: tuple[Candidate, ...]
    refusal: ModelError | NoPlacement | None = None
    plan: Plan | None = None
