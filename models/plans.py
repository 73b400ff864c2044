"""Sharding plans: for each family a table from weight to rule, and what a rank reads by it.

A ``*`` in a pattern stands for a number: of a layer, then of an expert. A weight that matches no
line is an error; none can match two, since the numbers alone are free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from models.errors import ModelError
from models.layout import EMBEDDING, Shape, end_tensors, layer_tensors
from models.sharding import Along, RankShard, Rule, Split, Whole, cut
from models.spec import Family, ModelSpec

Plan = Mapping[str, Rule]
Part = tuple[slice, ...]  # of one weight, a slice for each dimension

_COPY: Final = Rule(Split.COPY)
_ONCE: Final = Rule(Split.FIRST)


def _out(along: Along, whole: Whole | None = None) -> Rule:
    return Rule(Split.ALL_TO_SHARDED, along, whole)


def _in(along: Along, whole: Whole | None = None) -> Rule:
    return Rule(Split.SHARDED_TO_ALL, along, whole)


ENDS: Final[Plan] = {
    EMBEDDING: _out(Along.EMBEDDING),
    "norm.weight": _COPY,
    "lm_head.weight": _out(Along.VOCAB),
    "layers.*.input_layernorm.weight": _COPY,
    "layers.*.post_attention_layernorm.weight": _COPY,
}
ATTENTION: Final[Plan] = {
    "layers.*.self_attn.q_proj.weight": _out(Along.QUERY_HEADS, "head_dim"),
    "layers.*.self_attn.k_proj.weight": _out(Along.KV_HEADS, "head_dim"),
    "layers.*.self_attn.v_proj.weight": _out(Along.KV_HEADS, "head_dim"),
    "layers.*.self_attn.o_proj.weight": _in(Along.QUERY_HEADS, "head_dim"),
}
ATTENTION_BIAS: Final[Plan] = {
    "layers.*.self_attn.q_proj.bias": _out(Along.QUERY_HEADS, "head_dim"),
    "layers.*.self_attn.k_proj.bias": _out(Along.KV_HEADS, "head_dim"),
    "layers.*.self_attn.v_proj.bias": _out(Along.KV_HEADS, "head_dim"),
    "layers.*.self_attn.o_proj.bias": _ONCE,
}
HEAD_NORMS: Final[Plan] = {
    "layers.*.self_attn.q_norm.weight": _COPY,
    "layers.*.self_attn.k_norm.weight": _COPY,
}
POST_NORMS: Final[Plan] = {
    "layers.*.pre_feedforward_layernorm.weight": _COPY,
    "layers.*.post_feedforward_layernorm.weight": _COPY,
}
LATENT_ATTENTION: Final[Plan] = {
    "layers.*.self_attn.q_proj.weight": _out(Along.QUERY_HEADS, "head_dim"),
    "layers.*.self_attn.q_a_proj.weight": _COPY,
    "layers.*.self_attn.q_a_proj.bias": _COPY,
    "layers.*.self_attn.q_a_layernorm.weight": _COPY,
    "layers.*.self_attn.q_b_proj.weight": _out(Along.QUERY_HEADS, "head_dim"),
    "layers.*.self_attn.kv_a_proj_with_mqa.weight": _COPY,
    "layers.*.self_attn.kv_a_proj_with_mqa.bias": _COPY,
    "layers.*.self_attn.kv_a_layernorm.weight": _COPY,
    "layers.*.self_attn.kv_b_proj.weight": _out(Along.QUERY_HEADS, "key_value_dim"),
    "layers.*.self_attn.o_proj.weight": _in(Along.QUERY_HEADS, "value_dim"),
    "layers.*.self_attn.o_proj.bias": _ONCE,
}
MLP: Final[Plan] = {
    "layers.*.mlp.gate_proj.weight": _out(Along.FFN),
    "layers.*.mlp.up_proj.weight": _out(Along.FFN),
    "layers.*.mlp.down_proj.weight": _in(Along.FFN),
}
MLP_BIAS: Final[Plan] = {
    "layers.*.mlp.gate_proj.bias": _out(Along.FFN),
    "layers.*.mlp.up_proj.bias": _out(Along.FFN),
    "layers.*.mlp.down_proj.bias": _ONCE,
}
EXPERTS: Final[Plan] = {
    "layers.*.mlp.gate.weight": _COPY,
    "layers.*.mlp.experts.*.gate_proj.weight": _out(Along.EXPERT_FFN),
    "layers.*.mlp.experts.*.up_proj.weight": _out(Along.EXPERT_FFN),
    "layers.*.mlp.experts.*.down_proj.weight": _in(Along.EXPERT_FFN),
}
SHARED_EXPERTS: Final[Plan] = {
    "layers.*.mlp.shared_experts.gate_proj.weight": _out(Along.SHARED_FFN),
    "layers.*.mlp.shared_experts.up_proj.weight": _out(Along.SHARED_FFN),
    "layers.*.mlp.shared_experts.down_proj.weight": _in(Along.SHARED_FFN),
}
SCORE_BIAS: Final[Plan] = {"layers.*.mlp.gate.e_score_correction_bias": _COPY}

PLANS: Final[Mapping[Family, Plan]] = {
    "llama": {**ENDS, **ATTENTION, **ATTENTION_BIAS, **MLP, **MLP_BIAS},
    "qwen2": {**ENDS, **ATTENTION, **ATTENTION_BIAS, **MLP},
    "qwen3": {**ENDS, **ATTENTION, **ATTENTION_BIAS, **HEAD_NORMS, **MLP},
    "gemma3": {**ENDS, **ATTENTION, **ATTENTION_BIAS, **HEAD_NORMS, **POST_NORMS, **MLP},
    "mixtral": {**ENDS, **ATTENTION, **EXPERTS},
    "qwen3_moe": {**ENDS, **ATTENTION, **ATTENTION_BIAS, **HEAD_NORMS, **MLP, **EXPERTS},
    "deepseek_v2": {**ENDS, **LATENT_ATTENTION, **MLP, **EXPERTS, **SHARED_EXPERTS},
    "deepseek_v3": {
        **ENDS,
        **LATENT_ATTENTION,
        **MLP,
        **EXPERTS,
        **SHARED_EXPERTS,
        **SCORE_BIAS,
    },
}
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


class UnmatchedWeight(ModelError):
    """A plan has no rule for a weight."""

    kind = "unmatched_weight"

    def __init__(self, family: str, name: str) -> None:
        super().__init__(family, name)
        self.family, self.name = family, name

    def __str__(self) -> str:
        return (
            f"no rule for weight {self.name!r} in the sharding plan of {self.family}. "
            "Add a line to its table in models/plans.py."
        )


def rule_for(family: Family, name: str) -> Rule:
    """The one rule that a weight matches. Raises UnmatchedWeight, naming it."""
    rule = PLANS[family].get(_NUMBER.sub("*", name))
    if rule is None:
        raise UnmatchedWeight(family, name)
    return rule


def slices_of(spec: ModelSpec, shard: RankShard) -> dict[str, Part]:
    """Every weight that a rank reads and the part of it, in the order of the forward pass.

    A tied output layer is the embedding: its rows are then those that either use needs.

    Raises:
        UnmatchedWeight: the plan has no rule for a weight that the rank would read.
    """
    ends = end_slices(spec, shard)
    kept = {EMBEDDING: ends.pop(EMBEDDING)} if EMBEDDING in ends else {}
    kinds = {spec.is_sparse(layer) for layer in shard.layers}
    parts = {sparse: layer_slices(spec, shard, sparse=sparse) for sparse in kinds}
    for layer in shard.layers:
        for name, part in parts[spec.is_sparse(layer)].items():
            kept[f"layers.{layer}.{name}"] = part
    return kept | ends


def end_slices(spec: ModelSpec, shard: RankShard) -> dict[str, Part]:
    """The same of weights that are in no layer."""
    kept: dict[str, Part] = {}
    for name, shape in end_tensors(spec).items():
        part: Part | None
        if name == EMBEDDING:
            rows = _embedding_rows(spec, shard)
            part = None if rows is None else (rows, slice(0, shape[1]))
        else:
            part = cut(rule_for(spec.family, name), shape, shard, spec) if shard.is_last() else None
        if part is not None:
            kept[name] = part
    return kept


def layer_slices(spec: ModelSpec, shard: RankShard, *, sparse: bool) -> dict[str, Part]:
    """The same of any one of the rank's layers, with experts or without; named relative to it."""
    kept: dict[str, Part] = {}
    parts: dict[tuple[str, Shape], Part | None] = {}  # experts are cut alike
    for name, shape in layer_tensors(spec, sparse=sparse).items():
        expert = _NUMBER.search(name)
        if expert is not None and int(expert[0]) not in shard.experts:
            continue
        like = name if expert is None else f"{name[: expert.start()]}*{name[expert.end() :]}"
        if (like, shape) not in parts:
            rule = rule_for(spec.family, f"layers.0.{name}")
            parts[like, shape] = cut(rule, shape, shard, spec)
        part = parts[like, shape]
        if part is not None:
            kept[name] = part
    return kept


def _embedding_rows(spec: ModelSpec, shard: RankShard) -> slice | None:
    uses = [shard.embedding] if shard.is_first() else []
    if spec.tied_embeddings and shard.is_last():
        uses.append(shard.vocab)
    if not uses:
        return None
    return slice(min(use.start for use in uses), max(use.stop for use in uses))
