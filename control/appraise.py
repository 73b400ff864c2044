"""What one arrangement of seats would do: layers, shares, bytes and seconds, or why it cannot be.

An arrangement says which device is which rank; everything else follows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from control.cost_model import FLOAT_BYTES, Estimate, Goal, Network, Policy, Seat, Speed, Stages
from control.errors import NoPlacement
from control.rank_bytes import SHARE_UNITS, Cuts
from control.shortage import shortage
from control.stage_split import least_peak, least_sum, within
from control.stage_times import Group, StageTimes, stage_times
from models.errors import ModelError
from models.legal import IllegalShares, check
from models.mesh import stages as weigh

Refusal = ModelError | NoPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """One arrangement, worked out.

    Attributes:
        layers: of each stage; shares: of each stage's ranks. Both empty where it cannot be.
        refusal: None where it can.
    """

    stages: Stages
    layers: tuple[range, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    estimate: Estimate | None = None
    refusal: Refusal | None = None

    @property
    def cost_s(self) -> float:
        """What is compared; infinity where it cannot be."""
        return self.estimate.cost_s if self.estimate else math.inf

    @property
    def order(self) -> tuple[float, int, int, tuple[str, ...]]:
        """Least is best: by cost, number of ranks, memory if it cannot be, and name."""
        seats = [seat for stage in self.stages for seat in stage]
        room = sum(seat.free_bytes for seat in seats) if self.refusal is not None else 0
        return self.cost_s, len(seats), -room, tuple(map(str, seats))


@dataclass(kw_only=True)
class Appraiser:
    """Works arrangements out for one model, one goal and one engine.

    Attributes:
        files: machines that have the model's files.
        current: ``(node, device)`` of the running instance's ranks; empty where none runs.
        asked_shares: of every rank in order, where somebody asked for them; else empty.
    """

    model: str
    cuts: Cuts
    network: Network
    goal: Goal
    policy: Policy
    files: frozenset[str] = frozenset()
    current: tuple[tuple[str, str], ...] = ()
    asked_shares: tuple[float, ...] = ()
    _fetch: dict[str, float] = field(default_factory=dict)
    _layer_s: dict[Speed, float] = field(default_factory=dict)
    _bytes: dict[tuple[str, str, int, int], float] = field(default_factory=dict)

    @cached_property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Of what is compared: a prompt's chunks, then tokens."""
        return self.policy.steps(self.goal, self.cuts.num_slots)

    def work_out(
        self,
        stages: Stages,
        *,
        shares: Sequence[tuple[float, ...]] = (),
        layers: tuple[range, ...] = (),
    ) -> Appraisal:
        """Layers and shares at the least cost; or those given, and what they cost."""
        cuts = self.cuts
        tensor = len(stages[0])
        illegal = self.check(stages)
        if illegal is not None:
            return Appraisal(stages=stages, refusal=illegal)
        apart = self._unlinked(stages)
        if apart:
            return Appraisal(stages=stages, refusal=self.refuse(stages, apart))
        if self.asked_shares:
            at = [
                self.asked_shares[i : i + tensor] for i in range(0, len(self.asked_shares), tensor)
            ]
            shares, layers = at, weigh(cuts.costs, [math.fsum(stage) for stage in at])
        if shares:
            groups = [Group.of(self.cuts, s, tuple(x)) for s, x in zip(stages, shares, strict=True)]
            return self._finish(groups, layers)
        parts = self._parts(stages)
        best: Appraisal | None = None
        for by_room in (False, True):
            groups = [
                Group.of(cuts, stage, self._shares(stage, part, by_room=by_room))
                for stage, part in zip(stages, parts, strict=True)
            ]
            found = self._finish(groups, ())
            if best is None or found.order < best.order:
                best = found
            if best.refusal is None or tensor == 1:
                break
        assert best is not None
        return best

    def check(self, stages: Stages) -> IllegalShares | None:
        """What forbids this many ranks and stages, whatever they are."""
        try:
            across = self.cuts.experts == "across"
            tensor, pipeline = len(stages[0]), len(stages)
            check(self.cuts.spec, (1.0,) * tensor, (1.0,) * pipeline, across=across)
        except IllegalShares as exc:
            return exc
        return None

    def layer_s(self, seat: Seat) -> float:
        """Seconds that an average layer takes alone on a device, over all steps compared."""
        if seat.speed not in self._layer_s:
            total = sum(self._alone(seat, positions) * n for positions, n in self.steps)
            self._layer_s[seat.speed] = total / self.cuts.spec.num_layers
        return self._layer_s[seat.speed]

    def refuse(self, stages: Stages, why: str) -> NoPlacement:
        """A refusal that names the shape."""
        return NoPlacement(self.model, f"{len(stages[0])}x{len(stages)}", why)

    def fixed_bytes(self, seat: Seat, tensor: int, num_stages: int = 1) -> int:
        """About what a rank of such a mesh takes beside weights and cache."""
        alone = tensor == num_stages == 1
        key = seat.kernels, seat.memory_kind, seat.threads, -tensor if alone else tensor
        if key not in self._bytes:
            shard = self.cuts.shards((1.0,) * tensor)[0]
            network_bytes = 0 if alone else self.cuts.network_bytes(seat, shard)
            self._bytes[key] = self.cuts.fixed_bytes(seat, shard) + network_bytes
        return int(self._bytes[key])

    def whole_bytes(self, seat: Seat) -> float:
        """Weights and cache of the whole model as this device keeps them."""
        key = seat.kernels, seat.memory_kind, 0, 0
        if key not in self._bytes:
            table = self.cuts.table(seat, self.cuts.shards((1.0,))[0])
            self._bytes[key] = float(table.total_bytes[0, -1]) - self.fixed_bytes(seat, 1)
        return self._bytes[key]

    def fetch_rate(self, node: str) -> float:
        """Bytes a second at which files would come; infinity where they are."""
        if node not in self._fetch:
            topology = self.network.topology
            links = [topology.link(peer, node) for peer in self.files if peer != node]
            rates = [link.bytes_per_s for link in links if link]
            best = max(rates, default=self.policy.outside_bytes_per_s)
            self._fetch[node] = math.inf if node in self.files else best
        return self._fetch[node]

    # -- inside ----------------------------------------------------------------------------

    def _alone(self, seat: Seat, positions: int) -> float:
        dense, sparse = self.cuts.work(self.cuts.shards((1.0,))[0])
        spec = self.cuts.spec
        num_sparse = sum(spec.is_sparse(layer) for layer in range(spec.num_layers))
        return num_sparse * sparse.seconds(seat.speed, positions) + (
            spec.num_layers - num_sparse
        ) * dense.seconds(seat.speed, positions)

    def _unlinked(self, stages: Stages) -> str:
        """Two machines that would have to talk and cannot; empty if there are none."""
        head = stages[-1][0].node
        pairs = [(head, seat.node) for stage in stages for seat in stage]
        for stage in stages:
            pairs += [(a.node, b.node) for i, a in enumerate(stage) for b in stage[:i]]
        for before, after in pairwise(stages):
            pairs += [(a.node, b.node) for a, b in zip(before, after, strict=True)]
        for a, b in pairs:
            if self.network.between(a, b) is None:
                return f"no link between {min(a, b)} and {max(a, b)}"
        return ""

    def _parts(self, stages: Stages) -> list[float]:
        """About which part of the layers each stage would get: fastest first, as room allows."""
        tensor = len(stages[0])
        left, parts = 1.0, [0.0] * len(stages)
        speed = [1 / sum(1 / self.layer_s(seat) for seat in stage) for stage in stages]
        for i in sorted(range(len(stages)), key=lambda i: (speed[i], i)):
            room = sum(
                (seat.free_bytes - self.fixed_bytes(seat, tensor, len(stages)))
                / self.whole_bytes(seat)
                for seat in stages[i]
            )
            least = 1 / self.cuts.spec.num_layers
            parts[i] = max(least, min(left, room))
            left = max(0.0, left - parts[i])
        return parts

    def _shares(self, stage: Sequence[Seat], part: float, *, by_room: bool) -> tuple[float, ...]:
        tensor = len(stage)
        if tensor == 1:
            return (1.0,)
        room = [
            (seat.free_bytes - self.fixed_bytes(seat, tensor)) / (part * self.whole_bytes(seat))
            for seat in stage
        ]
        wanted = [max(r, 1e-6) for r in room] if by_room else [1 / self.layer_s(s) for s in stage]
        return within(wanted, room, max(SHARE_UNITS, 4 * tensor))

    def _finish(self, groups: Sequence[Group], layers: tuple[range, ...]) -> Appraisal:
        """Deal the layers out, unless they are given, and add everything up."""
        stages = tuple(group.seats for group in groups)
        flight = self._flight(len(groups))
        steps = self._steps(flight)
        times = [
            [stage_times(self.cuts, self.network, group, p, out) for p, _, out in steps]
            for group in groups
        ]
        fits = [group.fits() for group in groups]
        ways = [layers]
        if not layers:
            costs = [
                fit + sum(n * t.matrix() for (_, n, _), t in zip(steps, one, strict=True))
                for fit, one in zip(fits, times, strict=True)
            ]
            searches = (least_sum, least_peak) if flight > 1 else (least_sum,)
            ways = [way for search in searches if (way := search(costs)) is not None]
        ways = [
            way
            for way in ways
            if all(math.isfinite(f[x.start, x.stop]) for f, x in zip(fits, way, strict=True))
        ]
        if not ways:
            why = shortage(self, groups, layers)
            return Appraisal(stages=stages, refusal=self.refuse(stages, why))
        total_s, way = min(
            ((self._total_s(stages, times, steps, way), way) for way in ways),
            key=lambda found: (found[0], [x.stop for x in found[1]]),
        )
        return Appraisal(
            stages=stages,
            layers=way,
            shares=tuple(group.shares for group in groups),
            estimate=self._estimate(groups, way, total_s),
        )

    def _flight(self, num_stages: int) -> int:
        """Steps that are under way at once: no two of them have rows of the same slot."""
        if self.goal is not Goal.THROUGHPUT:
            return 1
        return min(self.policy.in_flight, num_stages, self.cuts.num_slots)

    def _steps(self, flight: int) -> list[tuple[int, int, int]]:
        """``(positions, how many, of these with logits)``; slots are dealt over those in flight."""
        *prompt, (slots, tokens) = self.steps
        part = -(-slots // flight)
        return [*((p, n, 0) for p, n in prompt), (part, tokens * flight, part)]

    def _total_s(
        self,
        stages: Stages,
        times: Sequence[Sequence[StageTimes]],
        steps: Sequence[tuple[int, int, int]],
        way: tuple[range, ...],
    ) -> float:
        """Of all steps compared: one after the other, or as fast as the slowest stage lets go."""
        flight, total_s = self._flight(len(stages)), 0.0
        for i, (positions, n, _) in enumerate(steps):
            each = [sum(one[i].of(x)) for one, x in zip(times, way, strict=True)]
            round_s = sum(each) + self._hops_s(stages, positions) + self.network.order_s(stages)
            total_s += n * max(round_s / flight, max(each))
        return total_s

    def _hops_s(self, stages: Stages, positions: int) -> float:
        size_bytes = FLOAT_BYTES * positions * self.cuts.spec.hidden_size
        pairs = pairwise(stages)
        return sum(self.network.hop_s(before, after, size_bytes) for before, after in pairs)

    def _estimate(
        self, groups: Sequence[Group], way: tuple[range, ...], total_s: float
    ) -> Estimate:
        stages = tuple(group.seats for group in groups)
        parts = [
            stage_times(self.cuts, self.network, group, 1, 1).of(x)
            for group, x in zip(groups, way, strict=True)
        ]
        compute_s, sums_s, gather_s = (sum(column) for column in zip(*parts, strict=True))
        hops_s, head_s = self._hops_s(stages, 1), self.network.order_s(stages) + gather_s
        num_slots = self.cuts.num_slots if self.goal is Goal.THROUGHPUT else 1
        fetch_s = self._fetch_s(groups, way)
        here = tuple((seat.node, seat.device) for stage in stages for seat in stage)
        moved = bool(self.current) and here != self.current
        start_s = fetch_s + self.policy.restart_s * moved
        return Estimate(
            token_s=compute_s + sums_s + hops_s + head_s,
            tokens_per_s=num_slots * self.policy.answer_tokens / total_s,
            request_s=total_s / num_slots,
            compute_s=compute_s,
            sums_s=sums_s,
            hops_s=hops_s,
            head_s=head_s,
            fetch_s=fetch_s,
            start_s=start_s,
            cost_s=self.policy.requests * total_s / num_slots + start_s,
        )

    def _fetch_s(self, groups: Sequence[Group], way: tuple[range, ...]) -> float:
        """Until the slowest machine has what its ranks need."""
        missing: dict[str, float] = {}
        for group, layers in zip(groups, way, strict=True):
            for seat, table in zip(group.seats, group.tables, strict=True):
                size_bytes = float(table.weights_bytes[layers.start, layers.stop])
                missing[seat.node] = missing.get(seat.node, 0.0) + size_bytes
        return max(size / self.fetch_rate(node) for node, size in missing.items())
