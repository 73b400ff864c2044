"""Experts and latent attention out of GGUF metadata."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from models.errors import CorruptModel, UnsupportedModel
from models.gguf_file import GgufFile
from models.rope import mscale
from models.spec import ExpertSpec, LatentSpec, RopeSpec

SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func


def expert_spec(
    file: GgufFile, name: str, normalize: bool, num_layers: int, tensor_names: Collection[str]
) -> ExpertSpec | None:
    """The experts of a file that has them, else None.

    Args:
        file: whose metadata is read.
        name: of its architecture.
        normalize: where the metadata does not say.
        num_layers: of the model.
        tensor_names: of all its files; a layer with a plain MLP is one that has ``ffn_gate``.

    Raises:
        CorruptModel: a value is missing or of the wrong type.
        UnsupportedModel: a way of scoring that is not built.

    Source: llama.cpp ``llama-model.cpp``, ``load_hparams`` of llama, qwen3moe and deepseek2.
    """

    def read(key: str, default: int | None = None) -> int:
        value = file.integer(f"{name}.{key}")
        value = default if value is None else value
        if value is None:
            raise CorruptModel(file.path, f"metadata '{name}.{key}' is missing")
        return value

    count = file.integer(f"{name}.expert_count")
    if not count:
        return None
    gating = read("expert_gating_func", SOFTMAX) or SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        raise UnsupportedModel(file.path, f"expert_gating_func {gating}")
    sigmoid = gating == SIGMOID
    says = file.flag(f"{name}.expert_weights_norm")
    return ExpertSpec(
        num_experts=count,
        num_active=read("expert_used_count"),
        ffn_size=file.integer(f"{name}.expert_feed_forward_length") or read("feed_forward_length"),
        num_shared=read("expert_shared_count", 0),
        dense_layers=tuple(
            layer for layer in range(num_layers) if f"blk.{layer}.ffn_gate.weight" in tensor_names
        ),
        scoring="sigmoid" if sigmoid else "softmax",
        score_bias=any(key.endswith(".exp_probs_b.bias") for key in tensor_names),
        normalize=normalize if says is None else says,
        scale=file.number(f"{name}.expert_weights_scale") or 1.0,
        num_groups=read("expert_group_count", 1) or 1,
        num_active_groups=read("expert_group_used_count", 1) or 1,
        group_score="top2_sum" if sigmoid else "max",
    )


def latent_spec(file: GgufFile, name: str) -> LatentSpec | None:
    """Latent attention of a file that has it, else None. Raises CorruptModel.

    Newer files give the latent's own sizes as key and value length, and the heads' as ``_mla``.
    """
    kv_rank = file.integer(f"{name}.attention.kv_lora_rank")
    if not kv_rank:
        return None
    sizes: dict[str, int] = {}
    for what in ("key", "value"):
        key = f"{name}.attention.{what}_length"
        size = file.integer(f"{key}_mla") or file.integer(key)
        if not size:
            raise CorruptModel(file.path, f"metadata '{key}' is missing")
        sizes[what] = size
    rope_dim = file.integer(f"{name}.rope.dimension_count")
    if not rope_dim:
        raise CorruptModel(file.path, f"metadata '{name}.rope.dimension_count' is missing")
    return LatentSpec(
        q_rank=file.integer(f"{name}.attention.q_lora_rank") or None,
        kv_rank=kv_rank,
        nope_dim=sizes["key"] - rope_dim,
        rope_dim=rope_dim,
        v_dim=sizes["value"],
    )


def tempered(file: GgufFile, name: str, rope: RopeSpec) -> tuple[RopeSpec, float]:
    """DeepSeek's yarn: the rope without a factor of its own, and that on the attention scale.

    Source: llama.cpp ``deepseek2.cpp`` and its discussion 7416: ``yarn_log_multiplier`` is a
        tenth of ``mscale_all_dim``.
    """
    if rope.scaling != "yarn":
        return rope, 1.0
    strength = 10 * (file.number(f"{name}.rope.scaling.yarn_log_multiplier") or 0.0)
    factor = mscale(rope.factor, strength) ** 2
    return replace(rope, attention_factor=1.0, mscale_all_dim=strength), factor
