"""Small specs of every family, for the tests of plans, shards and estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.spec import ModelSpec
from models.spec_hf import from_hf_config

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 72,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "n_group": 4,
    "topk_group": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "mlp_bias": True, "attention_bias": True},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-bias": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "num_attention_heads": 4,
        "attention_bias": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "attention_bias": True,
    },
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "attention_bias": True},
    "deepseek_v2-lite": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "attention_bias": True},
    "deepseek_v3-lite": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": None},
}


def small(name: str, **fields: Any) -> ModelSpec:
    """A small spec of ``FAMILIES``, with some fields of its config changed."""
    return from_hf_config({**SIZES, **FAMILIES[name], **fields}, Path("config.json"))
