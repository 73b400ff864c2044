"""How much memory a rank needs: weights, keys and values, workspace. Pure; nothing is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.plans import Part, end_slices, layer_slices, slices_of
from models.sharding import RankShard
from models.spec import ModelSpec
from models.stored import Stored, StoredSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How an engine keeps matrices; vectors are always float32.

    Attributes:
        bytes_per_weight: by storage format, scales included.
        otherwise: bytes of a weight in a format that is not listed.
        tile: rows and columns are rounded up to multiples of these.
        group: a format of blocks stays packed where both ends of a column cut are multiples of
            this; else it takes ``otherwise``.
        plain: formats without blocks, which any cut leaves as they are.
        by_name: bytes of a weight by the end of its name, for those kept in one type whatever
            their format.
    """

    bytes_per_weight: Mapping[str, float] = field(default_factory=dict)
    otherwise: float = 4.0
    tile: tuple[int, int] = (1, 1)
    group: int = 1
    plain: frozenset[str] = frozenset({"F32", "F16", "BF16"})
    by_name: Mapping[str, float] = field(default_factory=dict)

    def matrix_bytes(self, kind: str, rows: slice, columns: slice, *, name: str = "") -> int:
        """Bytes of a part of a matrix; ``name`` is its canonical name."""
        height, width = self.tile
        start, stop = int(columns.start), int(columns.stop)
        tall = math.ceil(int(rows.stop - rows.start) / height) * height
        wide = math.ceil((stop - start) / width) * width
        intact = kind in self.plain or not (start % self.group or stop % self.group)
        size = self.bytes_per_weight.get(kind, self.otherwise) if intact else self.otherwise
        for end, always in self.by_name.items():
            size = always if name.endswith(end) else size
        return math.ceil(tall * wide * size)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one rank will hold when every slot is full."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


def estimate(
    spec: ModelSpec,
    checkpoint: Stored,
    shard: RankShard,
    *,
    context_tokens: int,
    num_slots: int,
    kv_bytes_per_element: float,
    workspace_bytes: int,
    packing: Packing,
    page_tokens: int = 1,
) -> MemoryEstimate:
    """Memory of one rank.

    Args:
        spec: the model.
        checkpoint: says how each weight is stored; ``models.stored.Assumed`` where it is not here.
        shard: what the rank holds.
        context_tokens, num_slots: positions of a slot, and slots.
        kv_bytes_per_element: of the engine's cache.
        workspace_bytes: the engine's buffers and position tables.
        packing: how the engine keeps weights.
        page_tokens: a slot's positions are rounded up to multiples of this.

    Raises:
        ValueError: a size that is not positive.
        models.plans.UnmatchedWeight: the family's plan lacks a weight.
    """
    if min(context_tokens, num_slots, page_tokens) < 1 or workspace_bytes < 0:
        raise ValueError(
            f"context_tokens={context_tokens}, num_slots={num_slots} and page_tokens="
            f"{page_tokens} must be positive, workspace_bytes={workspace_bytes} not negative"
        )
    tokens = math.ceil(context_tokens / page_tokens) * page_tokens * num_slots
    elements = kv_elements(spec, shard) * tokens
    return MemoryEstimate(
        _weights_bytes(spec, checkpoint, shard, packing),
        math.ceil(elements * kv_bytes_per_element),
        workspace_bytes,
    )


def _weights_bytes(spec: ModelSpec, checkpoint: Stored, shard: RankShard, packing: Packing) -> int:
    """What ``slices_of`` names, each kind of layer worked out once."""

    def size(name: str, part: Part, kind: str) -> int:
        if len(part) == 1:
            length = int(part[0].stop - part[0].start)
            return 4 * math.ceil(length / packing.tile[1]) * packing.tile[1]
        return packing.matrix_bytes(kind, *part, name=name)

    total = 0
    for name, part in end_slices(spec, shard).items():
        total += size(name, part, checkpoint.tensor(name).kind)
    for sparse in (False, True):
        layers = [layer for layer in shard.layers if spec.is_sparse(layer) == sparse]
        for name, part in layer_slices(spec, shard, sparse=sparse).items() if layers else ():
            names = [f"layers.{layer}.{name}" for layer in layers]
            kinds = Counter(checkpoint.tensor(name).kind for name in names)
            total += sum(count * size(names[0], part, kind) for kind, count in kinds.items())
    return total


def stored_bytes(spec: ModelSpec, checkpoint: StoredSizes, shard: RankShard) -> int:
    """Bytes that a rank's slice takes in the file; a cut block counts by its part."""
    total = 0
    for name, part in slices_of(spec, shard).items():
        weight = checkpoint.tensor(name)
        kept = math.prod(int(cut.stop - cut.start) for cut in part)
        total += weight.size_bytes * kept // math.prod(weight.shape)
    return total


def kv_elements(spec: ModelSpec, shard: RankShard) -> int:
    """Numbers that a rank remembers of each token, over its layers.

    Latent attention keeps one vector for all heads, so every rank of a tensor group has it whole.
    """
    latent = spec.latent
    if latent is None:
        a_layer = 2 * len(shard.kv_heads) * spec.head_dim
    else:
        a_layer = latent.kv_rank + latent.rope_dim
    return a_layer * len(shard.layers)
