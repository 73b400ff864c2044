"""What an instance is: one model in one shape, decided before any of its processes starts."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import etf
from bridge.show import show
from bridge.term import Atom, Term
from bridge.text import text_of
from control.load_options import MeshShape
from models.mesh import head_rank

MAX_RANKS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """One rank of an instance.

    Attributes:
        node: the machine whose port runs it.
        path: the model's files on that machine.
        device: ``cpu``, ``cuda:N`` or ``mlx``; empty lets the port choose.
        pool: whose memory it takes of: the machine's (``memory``) or a GPU's (``cuda:N``).
        threads: CPU threads.
        memory_bytes: what it takes of that memory once it is full.
        limit_bytes: what it may take at most, on its device; 0 is no limit.
    """

    node: str
    path: Path
    device: str
    pool: str
    threads: int
    memory_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What to run. What each rank holds follows from these numbers and the model's header.

    Attributes:
        first_epoch: epochs of its earlier placements: its ranks begin with the next one.
        addresses: host or IP of each node at which the ranks of other machines meet its own;
            empty where all ranks are on one machine, which meet on loopback.
    """

    id: str
    model: str
    context_tokens: int
    num_slots: int
    shape: MeshShape
    ranks: tuple[RankSpec, ...]
    experts: str = "inside"
    engine: str = "torch"
    first_epoch: int = 0
    addresses: tuple[tuple[str, str], ...] = ()

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self.shape.num_ranks

    @property
    def head(self) -> RankSpec:
        """The rank that plans and samples."""
        return self.ranks[head_rank(self.shape.tensor, self.shape.pipeline)]

    @property
    def head_node(self) -> str:
        """The machine of that rank, which also runs the coordinator."""
        return self.head.node

    @property
    def path(self) -> Path:
        """The model's files on the head's machine."""
        return self.head.path

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every machine with a rank, once, in the order of ranks."""
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))


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


def layout_of(spec: InstanceSpec) -> str:
    """Names what the ranks hold: a port with the weights of another layout is of no use."""
    ranks: list[Term] = [
        (Atom(rank.node), rank.path.as_posix(), rank.device) for rank in spec.ranks
    ]
    shape = (spec.shape.tensor, spec.shape.pipeline, [float(s) for s in spec.shape.shares])
    told = (spec.model, spec.context_tokens, spec.num_slots, shape, ranks)
    more = (spec.experts, spec.engine)
    return hashlib.sha256(etf.encode((*told, *more))).hexdigest()[:16]


def spec_term(spec: InstanceSpec) -> Term:
    """``spec`` as it travels between machines; ``spec_of`` reads it."""
    return {
        Atom("id"): spec.id,
        Atom("model"): spec.model,
        Atom("context_tokens"): spec.context_tokens,
        Atom("slots"): spec.num_slots,
        Atom("tensor"): spec.shape.tensor,
        Atom("pipeline"): spec.shape.pipeline,
        Atom("shares"): [float(share) for share in spec.shape.shares],
        Atom("ranks"): [_rank_term(rank) for rank in spec.ranks],
        Atom("experts"): spec.experts,
        Atom("engine"): spec.engine,
        Atom("first_epoch"): spec.first_epoch,
        Atom("addresses"): [(Atom(node), host) for node, host in spec.addresses],
    }


def _rank_term(rank: RankSpec) -> Term:
    return {
        Atom("node"): Atom(rank.node),
        # Forward slashes do on every system, and a peer's own are not ours to turn.
        Atom("path"): rank.path.as_posix(),
        Atom("device"): rank.device,
        Atom("pool"): rank.pool,
        Atom("threads"): rank.threads,
        Atom("memory_bytes"): rank.memory_bytes,
        Atom("limit_bytes"): rank.limit_bytes,
    }


def spec_of(term: Term) -> InstanceSpec:
    """The spec in what another machine sent. Raises ValueError, with the field that is wrong."""
    known = _map(term, "an instance")
    ranks = tuple(_rank_of(one) for one in _list(known, "ranks"))
    tensor, pipeline = _int(known, "tensor", 1), _int(known, "pipeline", 1)
    shares = tuple(_share(one) for one in _list(known, "shares"))
    if not len(ranks) == len(shares) == tensor * pipeline <= MAX_RANKS:
        raise ValueError(
            f"{len(ranks)} ranks and {len(shares)} shares for a mesh of {pipeline} x {tensor}"
        )
    spec = InstanceSpec(
        id=_text(known, "id"),
        model=_text(known, "model"),
        context_tokens=_int(known, "context_tokens", 1),
        num_slots=_int(known, "slots", 1),
        shape=MeshShape(tensor, pipeline, shares),
        ranks=ranks,
        experts=_text(known, "experts"),
        engine=_text(known, "engine"),
        first_epoch=_int(known, "first_epoch"),
        addresses=tuple(_address(one) for one in _list(known, "addresses")),
    )
    without = set(spec.nodes) - {node for node, _ in spec.addresses}
    if len(spec.nodes) > 1 and without:
        raise ValueError(f"addresses: none of {', '.join(sorted(without))}")
    return spec


def _rank_of(term: Term) -> RankSpec:
    known = _map(term, "a rank")
    return RankSpec(
        node=_text(known, "node"),
        path=Path(_text(known, "path")),
        device=_text(known, "device", empty=True),
        pool=_text(known, "pool"),
        threads=_int(known, "threads"),
        memory_bytes=_int(known, "memory_bytes"),
        limit_bytes=_int(known, "limit_bytes"),
    )


def _map(term: Term, what: str) -> dict[Any, Term]:
    if not isinstance(term, dict):
        raise ValueError(f"{what}: expected a map, got {show(term, 80)}")
    return term


def _list(known: dict[Any, Term], key: str) -> list[Term]:
    value = known.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key}: expected a list, got {show(value, 80)}")
    return value


def _text(known: dict[Any, Term], key: str, *, empty: bool = False) -> str:
    value = known.get(key)
    text = text_of(value) if isinstance(value, str | bytes) else ""
    if not isinstance(value, str | bytes) or not (text or empty):
        raise ValueError(f"{key}: expected text, got {show(value, 80)}")
    return text


def _int(known: dict[Any, Term], key: str, least: int = 0) -> int:
    value = known.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}: expected a number from {least}, got {show(value, 80)}")
    return value


def _share(value: Term) -> float:
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ValueError(f"shares: expected numbers above 0, got {show(value, 80)}")
    return value


def _address(term: Term) -> tuple[str, str]:
    match term:
        case (str() as node, str() | bytes() as host) if node and host:
            return str(node), text_of(host)
        case _:
            raise ValueError(f"addresses: expected a node and its host, got {show(term, 80)}")
