"""From a spec and the shares of ranks to what each rank holds: heads, blocks, experts, layers.

Pure arithmetic; nothing here is refused that can be done (see ``models.legal`` for the rest).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.layout import EMBEDDING, end_tensors, expected_tensors, layer_tensors
from models.legal import GROUP, check, num_blocks, unit_for
from models.sharding import PipelineShard, RankShard, TensorShard
from models.shares import apportion, partition, ranges
from models.spec import ModelSpec
from models.stored import Stored

Experts = Literal["inside", "across"]
NOTHING = range(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Features that stay together in a cut: a quantisation block, or a group of the kernels.

    Where a dimension has fewer of them than ranks, groups of 32 and at last single features are
    cut instead; a packed block that spans such a cut is read by both of its ranks.
    """

    ffn: int = GROUP
    expert_ffn: int = GROUP
    shared_ffn: int = GROUP
    vocab: int = GROUP


def units_of(spec: ModelSpec, checkpoint: Stored) -> Units:
    """Units that leave every stored block intact: 32, or 256 where an MLP is in a K-quant.

    Only headers are read.
    """
    sizes = {"mlp": GROUP, "experts": GROUP, "shared_experts": GROUP}
    for name in expected_tensors(spec):
        if name.endswith("down_proj.weight"):
            part = next(
                part for part in ("experts", "shared_experts", "mlp") if f".{part}." in name
            )
            sizes[part] = math.lcm(sizes[part], checkpoint.tensor(name).block_columns)
    return Units(ffn=sizes["mlp"], expert_ffn=sizes["experts"], shared_ffn=sizes["shared_experts"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What layers cost, in one unit of the caller's: bytes, weights, or time.

    Attributes:
        layers: of each decoder layer.
        first: of the embedding, which only the first stage has.
        last: of the final norm and output layer, which only the last stage has.
    """

    layers: tuple[float, ...]
    first: float = 0
    last: float = 0

    def of(self, start: int, stop: int) -> float:
        """Cost of a stage with these layers."""
        ends = self.first * (start == 0) + self.last * (stop == len(self.layers))
        return sum(self.layers[start:stop]) + ends


def weight_costs(spec: ModelSpec) -> Costs:
    """Number of stored weights of each layer and of both ends.

    A tied output layer counts at both ends: the first and the last of several stages store it.
    """
    sizes = {
        sparse: float(sum(map(math.prod, layer_tensors(spec, sparse=sparse).values())))
        for sparse in (False, True)
    }
    ends = {name: float(math.prod(shape)) for name, shape in end_tensors(spec).items()}
    first = ends[EMBEDDING]
    return Costs(
        layers=tuple(sizes[spec.is_sparse(layer)] for layer in range(spec.num_layers)),
        first=first,
        last=ends["norm.weight"] + ends.get("lm_head.weight", first),
    )


def grid(
    tensor: Sequence[float], pipeline: Sequence[float] = (1,)
) -> tuple[tuple[float, ...], ...]:
    """Shares of every rank of a mesh whose stages all divide alike: ``[stage][tensor rank]``."""
    return tuple(tuple(stage * share for share in tensor) for stage in pipeline)


def mesh(
    spec: ModelSpec,
    shares: Sequence[Sequence[float]],
    *,
    units: Units | None = None,
    costs: Costs | None = None,
    experts: Experts = "inside",
    split_embedding: bool = False,
) -> tuple[RankShard, ...]:
    """What every rank of a mesh holds, in rank order: stages in order, tensor ranks within.

    Args:
        spec: the model.
        shares: ``[stage][tensor rank]`` memory or speed of each rank, in any unit; all stages
            have equally many ranks. ``grid`` makes it from a tensor and a pipeline list.
        units: what stays together; None takes groups of 32.
        costs: of layers, to balance the stages; None takes the number of stored weights.
        experts: every routed expert is cut over the ranks, or each rank has some experts whole.
        split_embedding: each rank has a part of the embedding's rows; else every rank of the
            first stage has all of it.

    Raises:
        models.legal.IllegalShares: every reason why these shares cannot be, with the nearest that
            can.
        ValueError: stages of different sizes, or costs of another number of layers.
    """
    units, costs = units or Units(), costs or weight_costs(spec)
    world = len(shares[0]) if shares else 0
    if any(len(stage) != world for stage in shares):
        raise ValueError(f"stages of {[len(stage) for stage in shares]} ranks: all must be equal")
    if len(costs.layers) != spec.num_layers:
        raise ValueError(f"{len(costs.layers)} costs for {spec.num_layers} layers")
    for stage in shares or ((),):
        check(spec, stage, [_sum(stage) for stage in shares], across=experts == "across")
    layers = stages(costs, [_sum(stage) for stage in shares])
    out: list[RankShard] = []
    for number, (kept, stage) in enumerate(zip(layers, shares, strict=True)):
        pipeline = PipelineShard(
            start_layer=kept.start,
            end_layer=kept.stop,
            device_rank=number,
            world_size=len(shares),
            is_first_layer=kept.start == 0,
            is_last_layer=kept.stop == spec.num_layers,
        )
        out += _stage(spec, pipeline, tuple(stage), units, experts, split_embedding)
    return tuple(out)


def head_rank(tensor_size: int, pipeline_size: int) -> int:
    """The rank that plans and samples: the first of the last stage, where the logits are."""
    return (pipeline_size - 1) * tensor_size


def whole(spec: ModelSpec) -> RankShard:
    """All of a model, for one rank."""
    return mesh(spec, ((1,),))[0]


def _sum(stage: Sequence[float]) -> float:
    bad = [share for share in stage if not share > 0]
    return bad[0] if bad else math.fsum(stage)  # a share that is not positive shows up by itself


def stages(costs: Costs, shares: Sequence[float]) -> tuple[range, ...]:
    """Layers of each pipeline stage: neighbours, none empty, the most loaded one loaded least.

    Args:
        costs: of the layers and both ends.
        shares: memory or speed of each stage.

    Raises:
        ValueError: fewer layers than stages.
    """

    def cost(stage: int, start: int, stop: int) -> float:
        return costs.of(start, stop) / shares[stage]

    return partition(len(costs.layers), len(shares), cost)


def heads(spec: ModelSpec, shares: Sequence[float]) -> tuple[tuple[range, range], ...]:
    """``(kv_heads, query_heads)`` of each tensor rank.

    Up to as many ranks as KV heads, each gets whole groups (a KV head with all its queries), in
    proportion. Beyond that each KV head is held by some neighbouring ranks, which divide its
    queries in proportion.

    Raises:
        ValueError: more ranks than query heads.
    """
    per_kv, world = spec.num_heads // spec.num_kv_heads, len(shares)
    if world <= spec.num_kv_heads:
        kept = ranges(apportion(spec.num_kv_heads, shares))
        return tuple((kv, range(kv.start * per_kv, kv.stop * per_kv)) for kv in kept)

    def cost(_kv: int, start: int, stop: int) -> float:
        return 1 / math.fsum(shares[start:stop]) if stop - start <= per_kv else math.inf

    out: list[tuple[range, range]] = []
    for kv, ranks in enumerate(partition(world, spec.num_kv_heads, cost)):
        for part in ranges(apportion(per_kv, shares[ranks.start : ranks.stop])):
            queries = range(kv * per_kv + part.start, kv * per_kv + part.stop)
            out.append((range(kv, kv + 1), queries))
    return tuple(out)


def blocks(size: int, unit: int, shares: Sequence[float]) -> tuple[range, ...]:
    """Ranges of ``size`` features in proportion, on multiples of a unit (see ``Units``)."""
    unit = unit_for(size, unit, len(shares))
    return ranges(apportion(num_blocks(size, unit), shares), unit=unit, size=size)


def _stage(
    spec: ModelSpec,
    pipeline: PipelineShard,
    shares: tuple[float, ...],
    units: Units,
    mode: Experts,
    split_embedding: bool,
) -> list[RankShard]:
    world, experts = len(shares), spec.experts
    nothing = (NOTHING,) * world
    chosen, inner, shared = nothing, nothing, nothing
    if experts is not None:
        every, whole = range(experts.num_experts), range(experts.ffn_size)
        if mode == "across":
            chosen, inner = ranges(apportion(len(every), shares)), (whole,) * world
        else:
            chosen = (every,) * world
            inner = blocks(experts.ffn_size, units.expert_ffn, shares)
        if experts.num_shared:
            shared = blocks(experts.num_shared * experts.ffn_size, units.shared_ffn, shares)
    ffn = blocks(spec.ffn_size, units.ffn, shares)
    vocab = blocks(spec.vocab_size, units.vocab, shares)
    return [
        RankShard(
            pipeline=pipeline,
            tensor=TensorShard(device_rank=rank, world_size=world, shares=shares),
            kv_heads=kv,
            query_heads=queries,
            ffn=ffn[rank],
            experts=chosen[rank],
            expert_ffn=inner[rank],
            shared_ffn=shared[rank],
            vocab=vocab[rank],
            embedding=vocab[rank] if split_embedding else range(spec.vocab_size),
        )
        for rank, (kv, queries) in enumerate(heads(spec, shares))
    ]
