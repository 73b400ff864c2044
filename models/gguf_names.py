"""GGUF tensor names to canonical names, and the row order that undoes llama's interleaving."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NOT_WEIGHTS = frozenset({"rope_freqs.weight"})  # read into the spec
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")


def canonical(name: str, spec: ModelSpec) -> str | None:
    """Canonical name of a GGUF tensor, or None if the family has no such tensor."""
    if name in WHOLE:
        return WHOLE[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part, what = match.groups()
    if part == "ffn_norm":
        part_name = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    elif part in IN_LAYER:
        part_name = IN_LAYER[part]
    else:
        return None
    return f"layers.{layer}.{part_name}.{what}"


def deinterleave(num_heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """File row of each row of a query or key matrix whose heads are stored pairwise.

    Within a head the file has (pair, half), the canonical order is (half, pair); whole rows
    move, so packed blocks stay intact.

    Source: llama.cpp ``convert_hf_to_gguf.py``, ``LlamaModel.permute``.
    """
    rows = np.arange(num_heads * head_dim, dtype=np.int64)
    return rows.reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
