"""ModelSpec from a Hugging Face ``config.json``: families' defaults and differences as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import CorruptModel, UnsupportedModel
from models.hf_config import HfConfig
from models.quantization_hf import quantization_of
from models.spec import Activation, Family, ModelSpec, RopeScaling, RopeSpec
from models.spec_hf_parts import expert_spec, latent_spec, temperature

FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",  # the text half of a vision model
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Values that a config may leave out. Source: the configuration classes of transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "deepseek_v2": {"max_position_embeddings": 2048, "q_lora_rank": 1536},
    "deepseek_v3": {"max_position_embeddings": 4096, "q_lora_rank": 1536},
}
SLIDING = ("qwen2", "qwen3", "qwen3_moe")  # use a window only where a flag says so


def from_hf_config(config: Mapping[str, Any], path: Path) -> ModelSpec:
    """Read the spec out of a parsed ``config.json``.

    Args:
        config: the JSON object.
        path: the file, for messages.

    Raises:
        CorruptModel: a field is missing, of the wrong type or impossible.
        UnsupportedModel: a model type, quantisation or option that is not built, by name.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CorruptModel(path, "field 'model_type'", expected="a string", found=repr(model_type))
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            path, f"model type {model_type!r}; read are {', '.join(sorted(FAMILIES))}"
        )
    quantization_of(config, path)  # refuses, by name, methods that are not read
    values = dict(config)
    if isinstance(config.get("text_config"), dict):
        values.update(config["text_config"])
        model_type = str(values.get("model_type", f"{model_type}_text"))
    if model_type not in FAMILIES:
        raise UnsupportedModel(path, f"text model type {model_type!r}")
    try:
        return _spec(
            HfConfig(path, values, DEFAULTS.get(model_type)), FAMILIES[model_type], model_type
        )
    except (ValueError, ArithmeticError) as exc:
        raise CorruptModel(path, f"impossible configuration: {exc}") from exc


def rotary_pairs(config: Mapping[str, Any]) -> bool:
    """Whether rotated rows of latent attention lie pairwise in the checkpoint (they mostly do)."""
    return bool(config.get("rope_interleave", True))


def _spec(config: HfConfig, family: Family, model_type: str) -> ModelSpec:
    gemma = family == "gemma3"
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_layers = config.integer("num_hidden_layers")
    if not 0 < num_layers < 100_000:
        raise ValueError(f"num_hidden_layers {num_layers}")
    latent = latent_spec(config) if family.startswith("deepseek") else None
    if latent is None:
        head_dim = config.integer("head_dim", hidden // num_heads)
        rotated = head_dim
    else:
        head_dim, rotated = latent.nope_dim + latent.rope_dim, latent.rope_dim
    activation = str(config.values.get("hidden_activation" if gemma else "hidden_act") or "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(config.path, f"activation {activation!r}")
    if config.flag("use_bidirectional_attention"):
        raise UnsupportedModel(config.path, "bidirectional attention (an embedding model)")
    bias = config.flag("attention_bias")
    scale = config.number("query_pre_attn_scalar") if gemma else float(head_dim)
    full, local = _ropes(config, rotated)
    experts = expert_spec(config, family, num_layers)
    mlp_bias = config.flag("mlp_bias")
    if experts is not None and mlp_bias:
        raise UnsupportedModel(config.path, "biases in a model with experts")
    return ModelSpec(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        ffn_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        context_length=config.integer("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=full,
        local_rope=local,
        windows=_windows(config, num_layers, model_type),
        attention_scale=scale**-0.5 * (1.0 if latent is None else temperature(full)),
        attention_softcap=config.number("attn_logit_softcapping", 0.0) or None,
        logit_softcap=config.number("final_logit_softcapping", 0.0) or None,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        qk_norm=gemma or family in ("qwen3", "qwen3_moe"),
        attention_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=mlp_bias,
        activation=ACTIVATIONS[activation],
        tied_embeddings=config.flag("tie_word_embeddings"),
        experts=experts,
        latent=latent,
    )


def _windows(config: HfConfig, num_layers: int, model_type: str) -> tuple[int | None, ...]:
    """Window of each layer, from ``layer_types`` or from the older fields that it replaced."""
    window = config.values.get("sliding_window")
    if window is not None:
        window = config.integer("sliding_window")
    if model_type in SLIDING and not config.flag("use_sliding_window"):
        window = None
    if window is None:
        return (None,) * num_layers
    kinds = config.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise config.wrong("layer_types", f"a list of {num_layers}", kinds)
        known = {"full_attention": None, "sliding_attention": window}
        for kind in kinds:
            if kind not in known:
                raise UnsupportedModel(config.path, f"layer type {kind!r}")
        return tuple(known[kind] for kind in kinds)
    if model_type in ("qwen2", "qwen3"):
        first = config.integer("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if model_type == "gemma3_text":
        period = config.integer("sliding_window_pattern")
        return tuple(None if (layer + 1) % period == 0 else window for layer in range(num_layers))
    every = model_type in ("mistral", "mixtral", "qwen3_moe")
    return (window if every else None,) * num_layers


def _ropes(config: HfConfig, head_dim: int) -> tuple[RopeSpec, RopeSpec | None]:
    """Rope of full-attention layers, and of windowed ones where it differs.

    ``rope_parameters`` (transformers 5) holds what ``rope_theta`` and ``rope_scaling`` held.
    """
    parameters = config.mapping("rope_parameters")
    if "full_attention" in parameters:
        full = _rope(config, parameters["full_attention"], head_dim)
        sliding = parameters.get("sliding_attention")
        return full, _rope(config, sliding, head_dim) if sliding else None
    full = _rope(config, parameters or config.mapping("rope_scaling"), head_dim)
    if config.values.get("rope_local_base_freq") is None:
        return full, None
    return full, RopeSpec(theta=config.number("rope_local_base_freq"), dim=full.dim)


def _rope(config: HfConfig, parameters: Mapping[str, Any], head_dim: int) -> RopeSpec:
    if not isinstance(parameters, dict):
        raise config.wrong("rope_parameters", "an object", parameters)
    part = HfConfig(config.path, parameters)
    theta = part.number("rope_theta", config.number("rope_theta", 10000.0))
    share = part.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    known: dict[str, RopeScaling] = {
        "default": "none",
        "linear": "linear",
        "llama3": "llama3",
        "yarn": "yarn",
    }
    if kind not in known:
        raise UnsupportedModel(config.path, f"rope scaling {kind!r}")
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim)
    if kind == "linear":
        return RopeSpec(theta=theta, dim=dim, scaling="linear", factor=part.number("factor"))
    attention_factor = parameters.get("attention_factor")
    return RopeSpec(
        theta=theta,
        dim=dim,
        scaling=known[kind],
        factor=part.number("factor"),
        low_freq_factor=part.number("low_freq_factor", 1.0),
        high_freq_factor=part.number("high_freq_factor", 4.0),
        original_context=part.integer(
            "original_max_position_embeddings", config.integer("max_position_embeddings")
        ),
        beta_fast=part.number("beta_fast", 32.0),
        beta_slow=part.number("beta_slow", 1.0),
        attention_factor=None if attention_factor is None else part.number("attention_factor"),
        mscale=part.number("mscale", 0.0),
        mscale_all_dim=part.number("mscale_all_dim", 0.0),
    )
