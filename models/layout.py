"""Which tensors a model of a given spec has, by canonical name, and their exact shapes.

Canonical names are those of Hugging Face checkpoints without the leading ``model.``; Mixtral's
experts are named as those of the other families (``mlp.experts.0.gate_proj``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from models.spec import ModelSpec

Shape = tuple[int, ...]
EMBEDDING: Final = "embed_tokens.weight"


@lru_cache(maxsize=4)  # tens of thousands of names where there are many experts
def expected_tensors(spec: ModelSpec) -> Mapping[str, Shape]:
    """Every tensor of a model: ``name -> shape``, (out_features, in_features) for linears."""
    ends = end_tensors(spec)
    tensors: dict[str, Shape] = {EMBEDDING: ends[EMBEDDING]}
    for layer in range(spec.num_layers):
        for name, shape in layer_tensors(spec, sparse=spec.is_sparse(layer)).items():
            tensors[f"layers.{layer}.{name}"] = shape
    return MappingProxyType(tensors | ends)  # what is there already stays first


def end_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors that are in no layer: before the first and behind the last, in this order."""
    tensors: dict[str, Shape] = {
        EMBEDDING: (spec.vocab_size, spec.hidden_size),
        "norm.weight": (spec.hidden_size,),
    }
    if not spec.tied_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return tensors


@lru_cache(maxsize=16)
def layer_tensors(spec: ModelSpec, *, sparse: bool = False) -> Mapping[str, Shape]:
    """Tensors of one decoder layer, named relative to it; ``sparse``: of one with experts."""
    return MappingProxyType(_layer_tensors(spec, sparse))


def _layer_tensors(spec: ModelSpec, sparse: bool) -> dict[str, Shape]:
    hidden = spec.hidden_size
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    tensors |= _attention(spec)
    tensors["post_attention_layernorm.weight"] = (hidden,)
    if spec.post_norms:
        tensors["pre_feedforward_layernorm.weight"] = (hidden,)
        tensors["post_feedforward_layernorm.weight"] = (hidden,)
    if not sparse or spec.experts is None:
        return tensors | _mlp("mlp", hidden, spec.ffn_size, bias=spec.mlp_bias)
    experts = spec.experts
    tensors["mlp.gate.weight"] = (experts.num_experts, hidden)
    if experts.score_bias:
        tensors["mlp.gate.e_score_correction_bias"] = (experts.num_experts,)
    if experts.num_shared:
        tensors |= _mlp("mlp.shared_experts", hidden, experts.num_shared * experts.ffn_size)
    for number in range(experts.num_experts):
        tensors |= _mlp(f"mlp.experts.{number}", hidden, experts.ffn_size)
    return tensors


def _attention(spec: ModelSpec) -> dict[str, Shape]:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    queries, keys = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    latent = spec.latent
    tensors: dict[str, Shape] = {}
    if latent is None:
        tensors |= _linear("self_attn.q_proj", queries, hidden, spec.attention_bias)
        tensors |= _linear("self_attn.k_proj", keys, hidden, spec.attention_bias)
        tensors |= _linear("self_attn.v_proj", keys, hidden, spec.attention_bias)
        tensors |= _linear("self_attn.o_proj", hidden, queries, spec.output_bias)
        if spec.qk_norm:
            tensors["self_attn.q_norm.weight"] = (head_dim,)
            tensors["self_attn.k_norm.weight"] = (head_dim,)
        return tensors
    bias, mixed = spec.attention_bias, spec.num_heads * latent.v_dim
    if latent.q_rank is None:
        tensors |= _linear("self_attn.q_proj", queries, hidden, False)
    else:
        tensors |= _linear("self_attn.q_a_proj", latent.q_rank, hidden, bias)
        tensors["self_attn.q_a_layernorm.weight"] = (latent.q_rank,)
        tensors |= _linear("self_attn.q_b_proj", queries, latent.q_rank, False)
    joined = latent.kv_rank + latent.rope_dim
    tensors |= _linear("self_attn.kv_a_proj_with_mqa", joined, hidden, bias)
    tensors["self_attn.kv_a_layernorm.weight"] = (latent.kv_rank,)
    expanded = spec.num_heads * (latent.nope_dim + latent.v_dim)
    tensors |= _linear("self_attn.kv_b_proj", expanded, latent.kv_rank, False)
    return tensors | _linear("self_attn.o_proj", hidden, mixed, spec.output_bias)


def _mlp(name: str, hidden: int, ffn: int, *, bias: bool = False) -> dict[str, Shape]:
    return {
        **_linear(f"{name}.gate_proj", ffn, hidden, bias),
        **_linear(f"{name}.up_proj", ffn, hidden, bias),
        **_linear(f"{name}.down_proj", hidden, ffn, bias),
    }


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    pairs: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    if bias:
        pairs[f"{name}.bias"] = (rows,)
    return pairs
