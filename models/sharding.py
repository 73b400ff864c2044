"""What one rank holds of a model, and the one function that gives sharding rules their meaning.

A rule says how a weight is split and along which dimension of the model; a ``RankShard`` says
which part of each dimension a rank has; ``cut`` turns both into slices of the stored tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from models.spec import ModelSpec

Whole = Literal["head_dim", "value_dim", "key_value_dim"]


class Split(StrEnum):
    """How a weight is spread over the ranks of a tensor group."""

    ALL_TO_SHARDED = "all-to-sharded"  # input replicated, output a shard: out_features are cut
    SHARDED_TO_ALL = "sharded-to-all"  # input a shard, output a partial sum: in_features are cut
    COPY = "copy"  # whole on every rank
    FIRST = "first"  # whole on rank 0 alone: a bias added to a sum must be added once


class Along(StrEnum):
    """Dimension of a model that is cut; the name of the range in ``RankShard``."""

    QUERY_HEADS = "query_heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn"
    EXPERT_FFN = "expert_ffn"
    SHARED_FFN = "shared_ffn"
    VOCAB = "vocab"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one weight of a plan is split.

    Attributes:
        split: the pattern.
        along: which range of the shard is kept; None for a weight that is not cut.
        whole: features that one unit of ``along`` stands for, and that stay together; None
            where the range counts features already.
    """

    split: Split
    along: Along | None = None
    whole: Whole | None = None


@dataclass(frozen=True, slots=True)
class PipelineShard:
    """Decoder layers ``start_layer`` to ``end_layer`` (excluded) of one of ``world_size`` stages.

    The first stage has the embedding, the last the final norm and the output layer.
    """

    start_layer: int
    end_layer: int
    device_rank: int
    world_size: int
    is_first_layer: bool
    is_last_layer: bool


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Place in a tensor group.

    Attributes:
        device_rank, world_size: 0 <= device_rank < world_size.
        shares: memory or speed of each rank of the group, in any unit; what a rank holds is
            proportional to its share.
    """

    device_rank: int
    world_size: int
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShard:
    """Everything one rank holds; ranges are half-open and none is empty.

    Attributes:
        pipeline, tensor: where in the mesh the rank stands.
        kv_heads: key and value heads. Where ranks outnumber them each rank has one, which
            neighbouring ranks hold as well.
        query_heads: the query heads of ``kv_heads``, all of them or, where those are replicated,
            this rank's part. Each KV head here serves equally many of them.
        ffn: inner features of the dense MLP.
        experts: routed experts whose weights are here.
        expert_ffn: inner features of each of them.
        shared_ffn: inner features of the shared experts' MLP.
        vocab: rows of the output layer.
        embedding: rows of the token embedding; less than all means that a rank gives zeros for
            other tokens and the ranks sum.

    For a dense model ``experts``, ``expert_ffn`` and ``shared_ffn`` are ``range(0)``.
    """

    pipeline: PipelineShard
    tensor: TensorShard
    kv_heads: range
    query_heads: range
    ffn: range
    experts: range
    expert_ffn: range
    shared_ffn: range
    vocab: range
    embedding: range

    @property
    def layers(self) -> range:
        """Decoder layers."""
        return range(self.pipeline.start_layer, self.pipeline.end_layer)

    @property
    def rank(self) -> int:
        """Place in the mesh: stages in order, within each the tensor ranks in order."""
        return self.pipeline.device_rank * self.tensor.world_size + self.tensor.device_rank

    @property
    def queries_a_kv_head(self) -> int:
        """Query heads that each of this rank's KV heads serves here."""
        return len(self.query_heads) // len(self.kv_heads)

    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.pipeline.is_first_layer

    def is_last(self) -> bool:
        """Whether logits leave here."""
        return self.pipeline.is_last_layer


def whole_features(spec: ModelSpec, whole: Whole | None) -> int:
    """Features of one unit: of a query head, of what a head reads, or of latent keys + values."""
    if whole is None:
        return 1
    if spec.latent is None or whole == "head_dim":
        return spec.head_dim
    value = spec.latent.v_dim
    return value if whole == "value_dim" else spec.latent.nope_dim + value


def cut(
    rule: Rule, shape: tuple[int, ...], shard: RankShard, spec: ModelSpec
) -> tuple[slice, ...] | None:
    """Slices of one weight that a rank keeps.

    Args:
        rule: of the weight's plan.
        shape: full shape, (out_features, in_features) for a matrix.
        shard: what the rank holds.
        spec: sizes of heads.

    Returns:
        One slice a dimension; None where the rank has nothing of the weight.

    Raises:
        ValueError: the shape is not that of the dimension which the rule names.
    """
    whole = tuple(slice(0, size) for size in shape)
    if rule.split is Split.FIRST:
        return whole if shard.tensor.device_rank == 0 else None
    if rule.split is Split.COPY or rule.along is None:
        return whole
    kept: range = getattr(shard, rule.along.value)
    part = _features(kept, whole_features(spec, rule.whole))
    dim = 0 if rule.split is Split.ALL_TO_SHARDED else 1
    if dim >= len(shape) or part.stop > shape[dim]:
        raise ValueError(f"{rule.split} along {rule.along}: {part} is outside shape {shape}")
    return (*whole[:dim], part, *whole[dim + 1 :])


def _features(units: range, size: int) -> slice:
    return slice(units.start * size, units.stop * size)
