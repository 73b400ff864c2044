"""Seconds and bytes of one pipeline stage, for every run of layers that it might get."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from control.cost_model import FLOAT_BYTES, Network, Seat
from control.rank_bytes import Cuts, RankTable
from control.stage_split import Costs
from models.sharding import RankShard


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a stage with their shares: what each has of every layer."""

    seats: tuple[Seat, ...]
    shares: tuple[float, ...]
    shards: tuple[RankShard, ...]
    tables: tuple[RankTable, ...]

    @staticmethod
    def of(cuts: Cuts, seats: tuple[Seat, ...], shares: tuple[float, ...]) -> Group:
        """Cut the model by shares. Raises IllegalShares."""
        shards = cuts.shards(shares)
        tables = tuple(cuts.table(s, x) for s, x in zip(seats, shards, strict=True))
        return Group(seats, shares, shards, tables)

    def fits(self) -> Costs:
        """0 for a run of layers that every rank has room for, else infinity."""
        over = [
            table.total_bytes > seat.free_bytes
            for seat, table in zip(self.seats, self.tables, strict=True)
        ]
        return np.where(np.logical_or.reduce(over), math.inf, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one step.

    Attributes:
        until_s: of multiplying through layers 0 to i, by i; the slowest rank's.
        sum_s: of one sum over the ranks; a layer has two, and the embedding one.
        last_s: of the output layer; gather_s: of bringing its parts together.
    """

    until_s: npt.NDArray[np.float64]
    sum_s: float
    last_s: float
    gather_s: float

    def of(self, layers: range) -> tuple[float, float, float]:
        """Multiplying, sums, and gathering, of one run of layers."""
        last = layers.stop == len(self.until_s) - 1
        compute_s = float(self.until_s[layers.stop] - self.until_s[layers.start])
        sums_s = self.sum_s * (2 * len(layers) + (layers.start == 0))
        return compute_s + self.last_s * last, sums_s, self.gather_s * last

    def matrix(self) -> Costs:
        """All of it, by run of layers."""
        size = len(self.until_s)
        steps = np.arange(size)
        costs = self.until_s[None, :] - self.until_s[:, None]
        costs = costs + 2 * self.sum_s * (steps[None, :] - steps[:, None])
        costs[0, :] += self.sum_s
        costs[:, -1] += self.last_s + self.gather_s
        return costs


def stage_times(
    cuts: Cuts, network: Network, group: Group, positions: int, outputs: int
) -> StageTimes:
    """Of a step with so many positions, of which ``outputs`` give logits."""
    spec, nodes = cuts.spec, [seat.node for seat in group.seats]
    works = [cuts.work(shard) for shard in group.shards]
    dense_s, sparse_s = (
        max(w[i].seconds(s.speed, positions) for w, s in zip(works, group.seats, strict=True))
        for i in (0, 1)
    )
    layers_s = [sparse_s if spec.is_sparse(i) else dense_s for i in range(spec.num_layers)]
    sum_s = last_s = gather_s = 0.0
    if len(nodes) > 1:
        size_bytes = FLOAT_BYTES * positions * spec.hidden_size
        sum_s = network.sum_s(nodes, group.seats[0].kind, size_bytes)
    if outputs:
        rows = [float(spec.hidden_size * len(shard.vocab)) for shard in group.shards]
        pairs = zip(group.seats, rows, strict=True)
        last_s = max(seat.speed.seconds(row, row, outputs) for seat, row in pairs)
        gather_s = network.gather_s(nodes, FLOAT_BYTES * outputs * spec.vocab_size)
    until_s = np.cumsum([0.0, *layers_s])
    return StageTimes(until_s=until_s, sum_s=sum_s, last_s=last_s, gather_s=gather_s)
