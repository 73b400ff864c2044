"""What an instance is: one model in one shape, decided before any of its processes starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.term import Atom, Term
from control.load_options import MeshShape


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """One rank of an instance.

    Attributes:
        device: ``cpu``, ``cuda:N`` or ``mlx``; empty lets the port choose.
        threads: CPU threads.
        memory_bytes: what it takes of the machine's memory (not of a GPU's) once it is full.
        limit_bytes: what it may take at most, on its device; 0 is no limit.
    """

    device: str
    threads: int
    memory_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What to run. What each rank holds follows from these numbers and the model's header."""

    id: str
    model: str
    path: Path
    context_tokens: int
    num_slots: int
    shape: MeshShape
    ranks: tuple[RankSpec, ...]
    experts: str = "inside"
    engine: str = "torch"

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self.shape.num_ranks


def describe_spec(spec: InstanceSpec) -> dict[Any, Term]:
    """The part of an instance's map that does not change while it lives."""
    return {
        Atom("id"): spec.id,
        Atom("model"): spec.model,
        Atom("context_tokens"): spec.context_tokens,
        Atom("slots"): spec.num_slots,
        **describe_shape(spec.shape, spec.engine),
    }


def describe_shape(shape: MeshShape, engine: str) -> dict[Any, Term]:
    """Keys of CONTRACT section 3 that say how an instance is cut."""
    return {
        Atom("strategy"): Atom(shape.strategy),
        Atom("tensor_size"): shape.tensor,
        Atom("pipeline_size"): shape.pipeline,
        Atom("shares"): list(shape.shares),
        Atom("engine"): engine,
    }


def rank_name(instance: str, rank: int) -> Atom:
    """Registered name of a rank's process, for whoever wants to look inside."""
    return Atom(f"{instance}_rank{rank}")
