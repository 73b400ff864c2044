"""How long a model takes on given ranks and links: a roofline for each rank, and every message.

The model of communication is what the compute plane does: two sums a layer inside a tensor
group, activations between counterparts of neighbouring stages, orders from the head rank, and the
output layer's parts gathered there. Pure arithmetic on measured numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from control.load_options import MAX_RANKS
from control.topology import Kind, Link, Topology
from models.footprint import MAX_POSITIONS, Kernels
from models.layout import layer_tensors
from models.plans import rule_for
from models.sharding import RankShard, cut
from models.spec import ModelSpec

FLOAT_BYTES: Final = 4  # activations travel as float32
ORDER_BYTES: Final = 256  # what the head tells every other rank before a step
ONE_SHOT_BYTES: Final = 64 * 1024  # up to here everybody sends everything to everybody
# What a message between machines takes beside the link: a sum of a few KB over gloo, between two
# processes of one idle machine, takes 0.3 ms where the bare exchange takes 0.02.
MESSAGE_S: Final = 2.5e-4
# Where a machine has not measured how its own devices are linked: ranks that share memory.
INSIDE: Final = Link(Kind.LOOPBACK, 20e-6, 5e9)


class Goal(StrEnum):
    """What a placement shall be best at."""

    LATENCY = "latency"  # one request alone
    THROUGHPUT = "throughput"  # all slots busy


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device does, measured with the kernels that it would run.

    Attributes:
        weights_per_s: weights read and multiplied with one position.
        flops_per_s: with many positions at once.
    """

    weights_per_s: float
    flops_per_s: float

    def seconds(self, read: float, used: float, positions: int) -> float:
        """Of multiplying: the slower of reading weights and of arithmetic.

        Args:
            read: weights that are read once, whatever the number of positions.
            used: weights that each position multiplies with.
            positions: how many.

        Source: Williams, Waterman and Patterson 2009, roofline.
        """
        return max(read / self.weights_per_s, 2 * used * positions / self.flops_per_s)


# For a device that nobody has measured yet; low, so that a measured one is preferred.
UNMEASURED: Final = {
    "cpu": Speed(3e9, 3e10),
    "cuda": Speed(1e11, 2e13),
    "mlx": Speed(3e10, 3e12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A device that may take one rank.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``mlx``; ranks of one tensor group are of one kind.
        device: where it would run, such as ``cpu:0``; told: what its port is told.
        pool: the memory it takes of, as in ``control.placement.RankPlace``.
        free_bytes: of that memory.
        measured: ``speed`` is no assumption.
        figures: of which device its memory figures are, as ``models.footprint`` names it; empty
            where that is ``device``.
    """

    node: str
    kind: str
    device: str
    told: str
    pool: str
    kernels: Kernels
    threads: int
    free_bytes: int
    speed: Speed
    measured: bool = True
    figures: str = ""

    @property
    def memory_kind(self) -> str:
        """Devices with equal ones take equal memory for a rank."""
        return self.figures or self.kind

    def __str__(self) -> str:
        return f"{self.node} {self.device}"


Stages = tuple[tuple[Seat, ...], ...]  # [stage][tensor rank]
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a cluster is for; all that cannot be measured.

    Attributes:
        prompt_tokens, answer_tokens: of a typical request.
        requests: that an instance serves before anybody would place it anew; start-up time
            counts against them.
        restart_s: what moving a running instance costs its streams.
        outside_bytes_per_s: at which files come where no peer has them.
        in_flight: steps that stages work on at once, where there are as many stages and slots:
            ``compute.engine.StageEngine.depth`` is the number of stages.
    """

    prompt_tokens: int = 512
    answer_tokens: int = 128
    requests: int = 1000
    restart_s: float = 10.0
    outside_bytes_per_s: float = 1e7
    in_flight: int = MAX_RANKS

    def steps(self, goal: Goal, num_slots: int) -> tuple[tuple[int, int], ...]:
        """Steps of a typical request, or of one a slot, as ``(positions, how many)``."""
        prompt = min(self.prompt_tokens, MAX_POSITIONS)
        chunks = -(-self.prompt_tokens // MAX_POSITIONS)
        if goal is Goal.LATENCY:
            return ((prompt, chunks), (1, self.answer_tokens))
        return ((prompt, chunks * num_slots), (num_slots, self.answer_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What an instance would do.

    Attributes:
        token_s: between two tokens of a stream that is alone.
        tokens_per_s: of all slots together, prompts included.
        request_s: of a typical request, alone or, for throughput, among a slot's share of all.
        compute_s, sums_s, hops_s, head_s: parts of ``token_s``: multiplying, sums inside stages,
            activations between them, orders and logits.
        fetch_s: until the files are there; start_s: that and a restart.
        cost_s: what is compared: ``Policy.requests`` of them, and the start.
    """

    token_s: float
    tokens_per_s: float
    request_s: float
    compute_s: float
    sums_s: float
    hops_s: float
    head_s: float
    fetch_s: float
    start_s: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Weights of one layer on one rank.

    Attributes:
        always: that every position uses.
        experts: of the routed experts here; share: the part of these that one position uses.
    """

    always: float
    experts: float = 0.0
    share: float = 0.0

    def seconds(self, speed: Speed, positions: int) -> float:
        """Of one run of positions through it."""
        read = self.always + self.experts * min(1.0, positions * self.share)
        return speed.seconds(read, self.always + self.experts * self.share, positions)


def layer_work(spec: ModelSpec, shard: RankShard, *, sparse: bool) -> LayerWork:
    """Weights of a layer that a rank multiplies with; ``sparse``: of one with experts."""
    always, routed = 0.0, 0.0
    for name, shape in layer_tensors(spec, sparse=sparse).items():
        number = name.split(".")[2] if name.startswith("mlp.experts.") else ""
        if number not in ("", "0"):
            continue  # all experts are alike
        part = cut(rule_for(spec.family, f"layers.0.{name}"), shape, shard, spec)
        size = math.prod(int(kept.stop - kept.start) for kept in part) if part else 0
        if number:
            routed += size * len(shard.experts)
        else:
            always += size
    experts = spec.experts
    if experts is None or not sparse:
        return LayerWork(always)
    return LayerWork(always, routed, experts.num_active / experts.num_experts)


@dataclass(slots=True)
class Network:
    """Times of messages between machines; looks each pair up once.

    A pair is ``(latency_s, bytes_per_s)``, both directions at the worse figure, and with what
    software takes between machines.
    """

    topology: Topology
    _pairs: dict[tuple[str, str], Pair | None] = field(default_factory=dict)
    _worst: dict[tuple[str, ...], Pair | None] = field(default_factory=dict)

    def between(self, a: str, b: str) -> Pair | None:
        """Of two machines, or of the devices of one; None unless both directions are there."""
        if (a, b) not in self._pairs:
            there, back = self.topology.link(a, b), self.topology.link(b, a)
            if a == b:
                there = back = there or INSIDE
            found = None
            if there and back:
                latency_s = max(there.latency_s, back.latency_s) + (MESSAGE_S if a != b else 0.0)
                found = latency_s, min(there.bytes_per_s, back.bytes_per_s)
            self._pairs[a, b] = self._pairs[b, a] = found
        return self._pairs[a, b]

    def seconds(self, a: str, b: str, size_bytes: float) -> float:
        """Of one message; infinity where there is no link."""
        return _seconds(self.between(a, b), size_bytes)

    def worst(self, nodes: tuple[str, ...]) -> Pair | None:
        """Worst figures of all pairs; None where one is missing."""
        if nodes not in self._worst:
            pairs = [self.between(a, b) for i, a in enumerate(nodes) for b in nodes[:i]]
            known = [pair for pair in pairs if pair is not None]
            found = (INSIDE.latency_s, INSIDE.bytes_per_s)
            if known:
                found = max(pair[0] for pair in known), min(pair[1] for pair in known)
            self._worst[nodes] = found if len(known) == len(pairs) else None
        return self._worst[nodes]

    def sum_s(self, nodes: Sequence[str], kind: str, size_bytes: float) -> float:
        """An all-reduce over ranks on these machines (one entry a rank).

        Ranks of one machine sum first, then machines among each other: all to all while that is
        small, else parts; a ring where the library is MLX.

        Source: ``compute.collectives_host``; Patarasuk and Yuan 2009 for the ring.
        """
        hosts = tuple(sorted(set(nodes)))
        total = 0.0
        if len(hosts) < len(nodes):
            shared = (host for host in hosts if nodes.count(host) > 1)
            total = max(2 * self.seconds(host, host, size_bytes) for host in shared)
        if len(hosts) == 1:
            return total
        pair, others = self.worst(hosts), len(hosts) - 1
        if kind == "mlx":
            return total + 2 * others * _seconds(pair, size_bytes / len(hosts))
        if others == 1 or size_bytes <= ONE_SHOT_BYTES:
            return total + _seconds(pair, others * size_bytes)
        return total + 2 * _seconds(pair, others * size_bytes / len(hosts))

    def gather_s(self, nodes: Sequence[str], size_bytes: float) -> float:
        """Everybody's part to everybody; ``size_bytes`` is the whole."""
        others = len(nodes) - 1
        if not others:
            return 0.0
        return _seconds(self.worst(tuple(sorted(set(nodes)))), size_bytes * others / len(nodes))

    def hop_s(self, before: Sequence[Seat], after: Sequence[Seat], size_bytes: float) -> float:
        """Activations from each rank of a stage to its counterpart in the next."""
        pairs = zip(before, after, strict=True)
        return max(self.seconds(a.node, b.node, size_bytes) for a, b in pairs)

    def order_s(self, stages: Stages) -> float:
        """From the head, which is the first of the last stage, to the ranks that begin."""
        head = stages[-1][0].node
        others = [seat.node for seat in stages[0] if seat is not stages[-1][0]]
        return max((self.seconds(head, node, ORDER_BYTES) for node in others), default=0.0)


def _seconds(pair: Pair | None, size_bytes: float) -> float:
    return pair[0] + size_bytes / pair[1] if pair else math.inf
