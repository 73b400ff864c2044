"""What a rank would take for every run of layers that it might hold, from a handful of footprints.

A placement looks at thousands of ways to deal layers out; asking ``models.footprint`` for each
would take minutes. Layers that are stored alike take alike, so one of each is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from control.cost_model import LayerWork, Seat, layer_work
from models.footprint import Footprint, footprint
from models.layout import layer_tensors
from models.mesh import Costs, Experts, Units, mesh, units_of, weight_costs
from models.sharding import RankShard
from models.spec import ModelSpec
from models.stored import Stored, TensorFormat

Table = npt.NDArray[np.float64]  # (layers + 1, layers + 1): of layers ``start`` to ``stop``
SHARE_UNITS: Final = 100  # shares of a stage are whole parts of this, or of its ranks by four
_COUNTERS_BYTES: Final = 2048  # at most, that one more layer adds to a workspace


@dataclass(frozen=True, slots=True)
class RankTable:
    """One cut on one kind of device.

    Attributes:
        total_bytes: by run of layers; never less than the footprint of that rank. Others of its
            mesh are taken to be on other machines.
        weights_bytes: of these, the weights.
    """

    total_bytes: Table
    weights_bytes: Table


class Cuts:
    """One model: its cuts by shares, their tables and their work, each made once.

    Args:
        spec: the model; stored: how its weights are kept.
        assumed: there is no checkpoint: units of cuts are the kernels' own.
        context_tokens, num_slots: of the key/value memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stored: Stored,
        *,
        assumed: bool,
        experts: Experts,
        context_tokens: int,
        num_slots: int,
    ) -> None:
        self.spec, self.stored, self.experts = spec, stored, experts
        self.context_tokens, self.num_slots = context_tokens, num_slots
        self.units = Units() if assumed else units_of(spec, stored)
        self.costs: Costs = weight_costs(spec)
        types = self._layer_types()
        self._kept = tuple(
            {kind: layer for layer, kind in reversed(list(enumerate(types)))}.values()
        )
        kept = [types[layer] for layer in self._kept]
        self._layers = tuple(kept.index(kind) for kind in types)  # by layer, the kept one like it
        self._shards: dict[tuple[float, ...], tuple[RankShard, ...]] = {}
        self._tables: dict[tuple[object, ...], RankTable] = {}
        self._needs: dict[tuple[object, ...], Footprint] = {}
        self._works: dict[tuple[object, ...], tuple[LayerWork, LayerWork]] = {}

    def shards(self, shares: tuple[float, ...]) -> tuple[RankShard, ...]:
        """What each rank of a tensor group has of every layer. Raises IllegalShares."""
        if shares not in self._shards:
            self._shards[shares] = self.mesh((shares,))
        return self._shards[shares]

    def mesh(self, grid: Sequence[Sequence[float]]) -> tuple[RankShard, ...]:
        """Every rank of a mesh, as the ranks themselves will work it out."""
        return mesh(
            self.spec,
            grid,
            units=self.units,
            costs=self.costs,
            experts=self.experts,
            split_embedding=True,
        )

    def needs(
        self, seat: Seat, shard: RankShard, *, short: bool = False, network: bool = False
    ) -> Footprint:
        """Exactly what a rank takes on a device.

        Args:
            short: of the model in short.
            network: the mesh has ranks on other machines.
        """
        key = (seat.kernels, seat.memory_kind, seat.threads, shard.pipeline, *_sizes(shard), short)
        key += (network,)
        if key not in self._needs:
            self._needs[key] = self._footprint(seat, shard, short, network)
        return self._needs[key]

    def _footprint(self, seat: Seat, shard: RankShard, short: bool, network: bool) -> Footprint:
        spec, stored = self._short if short else (self.spec, self.stored)
        return footprint(
            spec,
            stored,
            shard,
            kernels=seat.kernels,
            device=seat.figures or seat.device,
            context_tokens=self.context_tokens,
            num_slots=self.num_slots,
            threads=seat.threads,
            network=network,
        )

    def table(self, seat: Seat, shard: RankShard) -> RankTable:
        """What a rank with this cut takes on a device, by its run of layers."""
        key = (seat.kernels, seat.memory_kind, seat.threads, *_sizes(shard))
        if key not in self._tables:
            self._tables[key] = self._table(seat, shard)
        return self._tables[key]

    def work(self, shard: RankShard) -> tuple[LayerWork, LayerWork]:
        """Of a dense layer, and of one with experts."""
        key = _sizes(shard)
        if key not in self._works:
            experts = self.spec.experts
            dense = experts is None or bool(experts.dense_layers)
            self._works[key] = (
                layer_work(self.spec, shard, sparse=False) if dense else LayerWork(0),
                layer_work(self.spec, shard, sparse=True) if experts else LayerWork(0),
            )
        return self._works[key]

    @cached_property
    def _short(self) -> tuple[ModelSpec, Stored]:
        """The model with one layer of each kind: a footprint walks over all layers there are."""
        spec, experts = self.spec, self.spec.experts
        if experts is not None:
            dense = [i for i, layer in enumerate(self._kept) if not spec.is_sparse(layer)]
            experts = replace(experts, dense_layers=tuple(dense))
        short = replace(
            spec,
            num_layers=len(self._kept),
            windows=tuple(spec.windows[layer] for layer in self._kept),
            experts=experts,
        )
        return short, _Short(self.stored, self._kept)

    def network_bytes(self, seat: Seat, shard: RankShard) -> int:
        """What a rank takes for meeting others on other machines."""
        with_others = self._part(seat, shard, range(0), network=True)
        return with_others.process_bytes - self._part(seat, shard, range(0)).process_bytes

    def fixed_bytes(self, seat: Seat, shard: RankShard) -> int:
        """What does not go down with the number of layers, of one rank alone without logits."""
        kept, stop = self._looked_at(seat)
        middle = self._part(seat, shard, range(0))
        workspace = 0
        for layer in kept:
            one = self._part(seat, shard, range(layer, layer + 1))
            extra = 0
            if layer + 1 == stop:  # it would give logits
                last = self._part(seat, shard, range(stop, stop))
                extra = max(0, last.workspace_bytes - middle.workspace_bytes)
            workspace = max(workspace, one.workspace_bytes - extra)
        ropes = list(dict.fromkeys(self.spec.rope_of(layer) for layer in self._kept))
        workspace += sum(4 * self.context_tokens * rope.dim for rope in ropes[1:])
        return middle.process_bytes + workspace + _COUNTERS_BYTES * self.spec.num_layers

    def _looked_at(self, seat: Seat) -> tuple[Sequence[int], int]:
        """One layer of each kind, and how many the model has that they are numbered in."""
        if seat.kernels == "mlx":  # it matters there what most of the whole file is stored as
            return self._kept, self.spec.num_layers
        return range(len(self._kept)), len(self._kept)

    def _part(
        self,
        seat: Seat,
        shard: RankShard,
        layers: range,
        *,
        first: bool = False,
        network: bool = False,
    ) -> Footprint:
        stage = replace(
            shard.pipeline,
            start_layer=layers.start,
            end_layer=layers.stop,
            is_first_layer=first,
            is_last_layer=layers.stop == self._looked_at(seat)[1],
        )
        short = seat.kernels != "mlx"
        return self.needs(seat, replace(shard, pipeline=stage), short=short, network=network)

    def _table(self, seat: Seat, shard: RankShard) -> RankTable:
        (kept, stop), count = self._looked_at(seat), self.spec.num_layers
        end = range(stop, stop)
        middle, last = self._part(seat, shard, range(0)), self._part(seat, shard, end)
        first = self._part(seat, shard, range(0), first=True)
        both = self._part(seat, shard, end, first=True)
        weights, cache = [], []
        for layer in kept:
            one = self._part(seat, shard, range(layer, layer + 1))
            none = last if layer + 1 == stop else middle
            weights.append(one.weights_bytes - none.weights_bytes)
            cache.append(one.kv_bytes)
        until_weights = np.cumsum([0.0, *(weights[i] for i in self._layers)])
        until_cache = np.cumsum([0.0, *(cache[i] for i in self._layers)])
        ends = np.full((count + 1, count + 1), float(middle.weights_bytes))
        ends[0, :], ends[:, count] = first.weights_bytes, last.weights_bytes
        ends[0, count] = both.weights_bytes
        weights_bytes = until_weights[None, :] - until_weights[:, None] + ends
        fixed_bytes = self.fixed_bytes(seat, shard)
        fixed = np.full(
            (count + 1, count + 1), float(fixed_bytes + self.network_bytes(seat, shard))
        )
        if shard.tensor.world_size == 1:  # all layers: it is alone
            fixed[0, count] = fixed_bytes
        fixed[:, count] += max(0, last.workspace_bytes - middle.workspace_bytes)
        total_bytes = weights_bytes + (until_cache[None, :] - until_cache[:, None]) + fixed
        return RankTable(total_bytes, weights_bytes)

    def _layer_types(self) -> tuple[tuple[object, ...], ...]:
        """Layers with equal entries take equal memory."""
        spec, found = self.spec, []
        names = {sparse: self._names(sparse) for sparse in (False, True)}
        for layer in range(spec.num_layers):
            sparse = spec.is_sparse(layer)
            kinds = [self.stored.tensor(f"layers.{layer}.{n}").kind for n in names[sparse]]
            found.append((sparse, spec.rope_of(layer), *kinds))
        return tuple(found)

    def _names(self, sparse: bool) -> list[str]:
        """Matrices of a layer; experts are stored alike."""
        if sparse and self.spec.experts is None:
            return []
        tensors = layer_tensors(self.spec, sparse=sparse).items()
        return [
            name
            for name, shape in tensors
            if len(shape) > 1 and not (name.startswith("mlp.experts.") and ".0." not in name)
        ]


@dataclass(frozen=True, slots=True)
class _Short:
    """A checkpoint whose layers are some of another's."""

    whole: Stored
    kept: tuple[int, ...]

    def tensor(self, name: str) -> TensorFormat:
        """One weight by canonical name."""
        parts = name.split(".", 2)
        if parts[0] == "layers":
            name = f"layers.{self.kept[int(parts[1])]}.{parts[2]}"
        return self.whole.tensor(name)


def _sizes(shard: RankShard) -> tuple[object, ...]:
    """Cuts with equal entries take equal memory and time."""
    cut = (shard.query_heads, shard.ffn, shard.expert_ffn, shard.shared_ffn)
    aligned = tuple((part.start % 32, part.stop % 32) for part in cut)
    others = (shard.kv_heads, shard.experts, shard.vocab, shard.embedding)
    sizes = tuple(len(part) for part in (*cut, *others))
    return (shard.tensor.device_rank == 0, *sizes, *aligned)
