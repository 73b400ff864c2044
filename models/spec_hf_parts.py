"""Experts and latent attention out of a ``config.json``: each family's field names and defaults."""

from __future__ import annotations

from typing import Literal

from models.errors import UnsupportedModel
from models.hf_config import HfConfig
from models.rope import mscale
from models.spec import ExpertSpec, Family, LatentSpec, RopeSpec


def expert_spec(config: HfConfig, family: Family, num_layers: int) -> ExpertSpec | None:
    """The experts of a family that has them, else None.

    Raises:
        CorruptModel: a field of the wrong type.
        UnsupportedModel: a way of routing that is not built, by name.

    Source: transformers, ``modeling_mixtral``, ``modeling_qwen3_moe``, ``modeling_deepseek_v2``
        and ``modeling_deepseek_v3``.
    """
    if family == "mixtral":
        return ExpertSpec(
            num_experts=config.integer("num_local_experts"),
            num_active=config.integer("num_experts_per_tok"),
            ffn_size=config.integer("intermediate_size"),
        )
    if family == "qwen3_moe":
        return ExpertSpec(
            # transformers 5 writes Mixtral's name, the hub's files have the family's own
            num_experts=config.integer("num_local_experts", config.integer("num_experts", 128)),
            num_active=config.integer("num_experts_per_tok"),
            ffn_size=config.integer("moe_intermediate_size"),
            dense_layers=_dense_by_step(config, num_layers),
            normalize=config.flag("norm_topk_prob"),
        )
    if family == "deepseek_v2":
        return _deepseek_v2(config, num_layers)
    if family == "deepseek_v3":
        return _deepseek_v3(config, num_layers)
    return None


def latent_spec(config: HfConfig) -> LatentSpec:
    """DeepSeek's latent attention. Raises CorruptModel for a field of the wrong type."""
    return LatentSpec(
        q_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_rank=config.integer("kv_lora_rank", 512),
        nope_dim=config.integer("qk_nope_head_dim", 128),
        rope_dim=config.integer("qk_rope_head_dim", 64),
        v_dim=config.integer("v_head_dim", 128),
    )


def temperature(rope: RopeSpec) -> float:
    """Factor on DeepSeek's attention scale: the square of yarn's ``mscale_all_dim``."""
    if rope.scaling == "none" or not rope.mscale_all_dim:
        return 1.0
    return mscale(rope.factor, rope.mscale_all_dim) ** 2


def _dense_by_step(config: HfConfig, num_layers: int) -> tuple[int, ...]:
    step = config.integer("decoder_sparse_step", 1)
    plain = config.values.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(type(layer) is int for layer in plain):
        raise config.wrong("mlp_only_layers", "a list of layers", plain)
    if step < 1:
        raise config.wrong("decoder_sparse_step", "at least 1", step)
    return tuple(n for n in range(num_layers) if n in plain or (n + 1) % step)


def _dense_first(config: HfConfig, num_layers: int, default: int) -> tuple[int, ...]:
    if config.integer("moe_layer_freq", 1) != 1:
        raise UnsupportedModel(
            config.path, f"moe_layer_freq {config.values['moe_layer_freq']}; 1 is read"
        )
    first = config.integer("first_k_dense_replace", default)
    return tuple(range(min(first, num_layers)))


def _scoring(config: HfConfig, expected: Literal["softmax", "sigmoid"]) -> None:
    found = config.values.get("scoring_func") or expected
    if found != expected:
        raise UnsupportedModel(config.path, f"scoring_func {found!r} where {expected!r} is read")


def _deepseek_v2(config: HfConfig, num_layers: int) -> ExpertSpec:
    _scoring(config, "softmax")
    method = config.values.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModel(config.path, f"topk_method {method!r} in deepseek_v2")
    grouped = method == "group_limited_greedy"
    if config.flag("norm_topk_prob"):
        raise UnsupportedModel(config.path, "norm_topk_prob in deepseek_v2")
    return ExpertSpec(
        num_experts=config.integer("n_routed_experts", 64),
        num_active=config.integer("num_experts_per_tok"),
        ffn_size=config.integer("moe_intermediate_size", 1407),
        num_shared=config.integer("n_shared_experts", 0),
        dense_layers=_dense_first(config, num_layers, 0),
        normalize=False,
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.integer("n_group") if grouped else 1,
        num_active_groups=config.integer("topk_group") if grouped else 1,
        group_score="max",
    )


def _deepseek_v3(config: HfConfig, num_layers: int) -> ExpertSpec:
    _scoring(config, "sigmoid")
    method = config.values.get("topk_method") or "noaux_tc"
    if method != "noaux_tc":
        raise UnsupportedModel(config.path, f"topk_method {method!r} in deepseek_v3")
    return ExpertSpec(
        num_experts=config.integer("n_routed_experts", 256),
        num_active=config.integer("num_experts_per_tok", 8),
        ffn_size=config.integer("moe_intermediate_size", 2048),
        num_shared=config.integer("n_shared_experts", 0),
        dense_layers=_dense_first(config, num_layers, 3),
        scoring="sigmoid",
        score_bias=True,
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        num_groups=config.integer("n_group", 8),
        num_active_groups=config.integer("topk_group", 4),
        group_score="top2_sum",
    )
