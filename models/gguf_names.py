"""GGUF tensor names to canonical names."""

from __future__ import annotations

import re

from models.spec import ModelSpec

WHOLE = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {  # one tensor for all experts; older files have one for each, "ffn_gate.7"
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
NOT_WEIGHTS = frozenset({"rope_freqs.weight"})  # read into the spec
_NUMBER = r"(0|[1-9][0-9]{0,4})"
_LAYER = re.compile(rf"blk\.{_NUMBER}\.([a-z_]+)\.(weight|bias)")
_EXPERT = re.compile(rf"blk\.{_NUMBER}\.(ffn_(?:gate|up|down))\.{_NUMBER}\.weight")
_STACK = re.compile(rf"blk\.{_NUMBER}\.(ffn_(?:gate|up|down)_exps)\.weight")


def canonical(name: str, spec: ModelSpec) -> str | None:
    """Canonical name of a GGUF tensor, or None if the family has no such tensor."""
    if name in WHOLE:
        return WHOLE[name]
    match = _EXPERT.fullmatch(name)
    if match is not None:
        layer, part, expert = match.groups()
        return f"layers.{layer}.mlp.experts.{expert}.{EXPERTS[part]}.weight"
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part, what = match.groups()
    if part == "exp_probs_b":
        return f"layers.{layer}.mlp.gate.e_score_correction_bias"
    if part == "ffn_norm":
        part_name = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    elif part in IN_LAYER:
        part_name = IN_LAYER[part]
    else:
        return None
    return f"layers.{layer}.{part_name}.{what}"


def canonical_stack(name: str, num_experts: int) -> list[str] | None:
    """Canonical names of the experts of a tensor that holds all of a layer, in order, or None."""
    match = _STACK.fullmatch(name)
    if match is None:
        return None
    layer, part = match.groups()
    return [
        f"layers.{layer}.mlp.experts.{expert}.{EXPERTS[part]}.weight"
        for expert in range(num_experts)
    ]
