"""Which tensors a model of a given spec has, by canonical name, and their exact shapes.

Canonical names are those of Hugging Face checkpoints without the leading ``model.``.
"""

from __future__ import annotations

from models.spec import ModelSpec

Shape = tuple[int, ...]


def expected_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of a dense model: ``name -> shape``, (out_features, in_features) for linears."""
    tensors: dict[str, Shape] = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        for name, shape in layer_tensors(spec).items():
            tensors[f"layers.{layer}.{name}"] = shape
    tensors["norm.weight"] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return tensors


def layer_tensors(spec: ModelSpec) -> dict[str, Shape]:
    """Tensors of one decoder layer, named relative to it."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    linears: list[tuple[str, int, int, bool]] = [
        ("self_attn.q_proj", queries, hidden, spec.attention_bias),
        ("self_attn.k_proj", keys, hidden, spec.attention_bias),
        ("self_attn.v_proj", keys, hidden, spec.attention_bias),
        ("self_attn.o_proj", hidden, queries, spec.output_bias),
        ("mlp.gate_proj", ffn, hidden, spec.mlp_bias),
        ("mlp.up_proj", ffn, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, ffn, spec.mlp_bias),
    ]
    for name, rows, columns, bias in linears:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)
    if spec.qk_norm:
        tensors["self_attn.q_norm.weight"] = (spec.head_dim,)
        tensors["self_attn.k_norm.weight"] = (spec.head_dim,)
    tensors["post_attention_layernorm.weight"] = (hidden,)
    if spec.post_norms:
        tensors["pre_feedforward_layernorm.weight"] = (hidden,)
        tensors["post_feedforward_layernorm.weight"] = (hidden,)
    return tensors
