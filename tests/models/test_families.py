"""Families with experts and latent attention: tiny models that transformers saved, and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, UnsupportedModel
from models.layout import expected_tensors
from models.rope import inverse_frequencies, mscale
from models.row_order import latent_order
from models.spec import ExpertSpec, LatentSpec
from models.spec_hf import from_hf_config
from tests.models.test_spec import SIZES, made
from tests.models.tiny import Tensors, random_blocks, write_gguf

Array = npt.NDArray[Any]
FEW = {**SIZES, "num_hidden_layers": 3}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
CASES: list[tuple[str, dict[str, Any], ExpertSpec]] = [
    (
        "mixtral",
        {"num_local_experts": 4, "sliding_window": 32},
        ExpertSpec(num_experts=4, num_active=2, ffn_size=96),
    ),
    (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "head_dim": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
        ExpertSpec(num_experts=6, num_active=3, ffn_size=40, dense_layers=(1,)),
    ),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
        ExpertSpec(num_experts=4, num_active=2, ffn_size=768, dense_layers=(0, 2), normalize=False),
    ),
    (
        "deepseek_v2",
        {**LATENT, "n_shared_experts": 2, "q_lora_rank": None},
        ExpertSpec(
            num_experts=8,
            num_active=2,
            ffn_size=32,
            num_shared=2,
            dense_layers=(0,),
            normalize=False,
        ),
    ),
    (
        "deepseek_v2",
        {
            **LATENT,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": YARN,
            "attention_bias": True,
        },
        ExpertSpec(
            num_experts=8,
            num_active=2,
            ffn_size=32,
            num_shared=1,
            dense_layers=(0,),
            normalize=False,
            scale=16.0,
            num_groups=4,
            num_active_groups=2,
        ),
    ),
    (
        "deepseek_v3",
        {
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 2,
            "rope_parameters": YARN,
        },
        ExpertSpec(
            num_experts=8,
            num_active=2,
            ffn_size=32,
            num_shared=1,
            dense_layers=(0, 1),
            scoring="sigmoid",
            score_bias=True,
            scale=2.5,
            num_groups=4,
            num_active_groups=2,
            group_score="top2_sum",
        ),
    ),
    (
        "deepseek_v3",
        {**LATENT, "rope_interleave": False, "n_group": 1, "topk_group": 1},
        ExpertSpec(
            num_experts=8,
            num_active=2,
            ffn_size=32,
            num_shared=1,
            dense_layers=(0,),
            scoring="sigmoid",
            score_bias=True,
            scale=2.5,
            group_score="top2_sum",
        ),
    ),
]


def unfused(state: dict[str, Any]) -> dict[str, Array]:
    """The state of a transformers model by canonical name: its fused experts taken apart."""
    out: dict[str, Array] = {}
    for full, value in state.items():
        name, values = full.removeprefix("model."), value.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            half = values.shape[1] // 2
            for expert, both in enumerate(values):
                start = f"{name.removesuffix('gate_up_proj')}{expert}"
                out[f"{start}.gate_proj.weight"] = both[:half]
                out[f"{start}.up_proj.weight"] = both[half:]
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(values):
                out[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            out[name] = values
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options", "experts"), CASES)
def test_a_model_that_transformers_saved_opens(
    tmp_path: Path, kind: str, options: dict[str, Any], experts: ExpertSpec
) -> None:
    """Every field and tensor is there, with the values of the model in memory."""
    from transformers import AutoModelForCausalLM

    config = made(kind, {**FEW, **options})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec, state = checkpoint.spec, unfused(model.state_dict())
    assert spec.family == kind
    assert spec.experts == experts
    assert set(checkpoint.names()) == set(state)
    paired = options.get("rope_interleave", True)
    for name in checkpoint.names():
        order = latent_order(name.split(".")[-2], spec) if paired and "." in name else None
        expected = state[name] if order is None else state[name][order]
        np.testing.assert_array_equal(checkpoint.tensor(name).dequantize(), expected)
    attention = model.model.layers[0].self_attn
    assert spec.attention_scale == pytest.approx(attention.scaling)
    rotary = model.model.rotary_emb
    frequencies, factor = inverse_frequencies(spec.rope)
    np.testing.assert_allclose(frequencies, rotary.inv_freq, rtol=1e-6)
    assert factor == pytest.approx(rotary.attention_scaling)
    if kind.startswith("deepseek"):
        rank = options["q_lora_rank"]
        assert spec.latent == LatentSpec(q_rank=rank, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=12)
        assert (spec.head_dim, spec.num_kv_heads, spec.rope.dim) == (24, 4, 8)
    else:
        assert spec.latent is None
        assert spec.head_dim == attention.head_dim
        assert spec.qk_norm == (kind == "qwen3_moe")
        assert spec.windows == (options.get("sliding_window"),) * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_as_the_spec_tells_it(tmp_path: Path, kind: str) -> None:
    """Written out from spec and tensors alone, one layer's attention is that of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {**LATENT, "n_group": 1, "topk_group": 1, "rope_parameters": YARN}
    config = made(kind, {**FEW, **options, "n_shared_experts": 1})
    config._attn_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = checkpoint.spec
    latent, length, eps = spec.latent, 7, spec.norm_eps
    assert latent is not None
    x = np.random.default_rng(0).standard_normal((length, 64)).astype(np.float32)
    with torch.no_grad():
        places = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        attention = model.model.layers[0].self_attn
        out = attention(
            hidden_states=torch.from_numpy(x)[None], position_embeddings=places, attention_mask=mask
        )
        expected = out[0][0].numpy()

    def weight(name: str) -> Array:
        return checkpoint.tensor(f"layers.0.self_attn.{name}.weight").dequantize()

    def norm(values: Array, name: str) -> Array:
        scale: Array = weight(name) / np.sqrt((values**2).mean(-1, keepdims=True) + eps)
        return values * scale

    frequencies, factor = inverse_frequencies(spec.rope)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor

    def turned(values: Array) -> Array:
        half = latent.rope_dim // 2
        a, b = values[..., :half], values[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def by_head(values: Array) -> Array:
        return values.reshape(length, spec.num_heads, -1).swapaxes(0, 1)

    q_HLE = by_head(norm(x @ weight("q_a_proj").T, "q_a_layernorm") @ weight("q_b_proj").T)
    q_HLE[..., latent.nope_dim :] = turned(q_HLE[..., latent.nope_dim :])
    joined = x @ weight("kv_a_proj_with_mqa").T
    shared = turned(joined[:, latent.kv_rank :])
    both = norm(joined[:, : latent.kv_rank], "kv_a_layernorm") @ weight("kv_b_proj").T
    k_HLE, v_HLE = np.split(by_head(both), [latent.nope_dim], axis=-1)
    k_HLE = np.concatenate([k_HLE, np.broadcast_to(shared, (4, *shared.shape))], axis=-1)
    scores = q_HLE @ k_HLE.swapaxes(1, 2) * spec.attention_scale + mask[0].numpy()
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ v_HLE
    found = mixed.swapaxes(0, 1).reshape(length, -1) @ weight("o_proj").T
    np.testing.assert_allclose(found, expected, atol=2e-6)


def gguf_tensors(shapes: dict[str, tuple[int, ...]], kind: str = "F32") -> Tensors:
    tensors: Tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1 or name.endswith("gate_inp.weight"):
            values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
            tensors[name] = (values, "F32")
        else:
            rows = int(np.prod(shape[:-1]))
            blocks = random_blocks(kind, rows, shape[-1], seed)
            tensors[name] = (blocks.reshape(*shape[:-1], -1), kind)
    return tensors


def moe_shapes(attention: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (128, 64),
        "output_norm.weight": (64,),
        "output.weight": (128, 64),
    }
    for layer in range(2):
        block = {
            "attn_norm.weight": (64,),
            "ffn_norm.weight": (64,),
            **attention,
            "ffn_gate_inp.weight": (4, 64),
            "ffn_gate_exps.weight": (4, 96, 64),
            "ffn_up_exps.weight": (4, 96, 64),
            "ffn_down_exps.weight": (4, 64, 96),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


ATTENTION: dict[str, tuple[int, ...]] = {
    "attn_q.weight": (64, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64),
}
COUNTS = {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 96}


@pytest.mark.parametrize("stacked", [True, False])
def test_gguf_mixtral_has_one_weight_for_each_expert(tmp_path: Path, stacked: bool) -> None:
    tensors = gguf_tensors(moe_shapes(ATTENTION), "Q4_0")
    whole = tensors["blk.1.ffn_up_exps.weight"][0]
    if not stacked:  # as older files have it
        for layer in range(2):
            for part in ("gate", "up", "down"):
                blocks, kind = tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight")
                for expert in range(4):
                    tensors[f"blk.{layer}.ffn_{part}.{expert}.weight"] = (blocks[expert], kind)
    path = tmp_path / "m.gguf"
    checkpoint = open_checkpoint(write_gguf(path, tensors, metadata=COUNTS))
    assert checkpoint.spec.family == "mixtral"
    assert checkpoint.spec.experts == ExpertSpec(num_experts=4, num_active=2, ffn_size=96)
    weight = checkpoint.tensor("layers.1.mlp.experts.2.up_proj.weight")
    np.testing.assert_array_equal(weight.packed(), whole[2])
    assert weight.shape == (96, 64)
    assert checkpoint.tensor("layers.0.self_attn.q_proj.weight").row_order is not None


def test_gguf_qwen3moe_reads_as_data(tmp_path: Path) -> None:
    norms: dict[str, tuple[int, ...]] = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
    shapes = moe_shapes({**ATTENTION, **norms})
    metadata = {**COUNTS, "feed_forward_length": 640, "expert_feed_forward_length": 96}
    path = write_gguf(tmp_path / "q.gguf", gguf_tensors(shapes), arch="qwen3moe", metadata=metadata)
    spec = open_checkpoint(path).spec
    assert (spec.family, spec.qk_norm, spec.ffn_size) == ("qwen3_moe", True, 640)
    assert spec.experts == ExpertSpec(num_experts=4, num_active=2, ffn_size=96)


DEEPSEEK: dict[str, tuple[int, ...]] = {
    "attn_q_a.weight": (24, 64),
    "attn_q_a_norm.weight": (24,),
    "attn_q_b.weight": (4 * 24, 24),
    "attn_kv_a_mqa.weight": (40, 64),
    "attn_kv_a_norm.weight": (32,),
    "attn_kv_b.weight": (4 * 28, 32),
    "attn_output.weight": (64, 48),
    "ffn_gate_shexp.weight": (96, 64),
    "ffn_up_shexp.weight": (96, 64),
    "ffn_down_shexp.weight": (64, 96),
    "exp_probs_b.bias": (4,),
}
DEEPSEEK_KEYS: dict[str, Any] = {
    **COUNTS,
    "expert_feed_forward_length": 96,
    "attention.head_count_kv": 4,
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 24,
    "attention.value_length": 12,
    "rope.dimension_count": 8,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_group_count": 2,
    "expert_group_used_count": 1,
    "expert_weights_scale": 2.5,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.1,
}


HALVES: dict[str, tuple[int, ...]] = {
    "attn_k_b.weight": (4, 32, 16),
    "attn_v_b.weight": (4, 12, 32),
}


def deepseek_gguf(
    path: Path, halves: dict[str, tuple[int, ...]] | None = None, **keys: Any
) -> Path:
    """Write a tiny DeepSeek V3, with the halves of its ``kv_b_proj`` apart if they are given."""
    shapes = moe_shapes(DEEPSEEK)
    for part in ("gate_inp", "gate_exps", "up_exps", "down_exps"):
        del shapes[f"blk.0.ffn_{part}.weight"]
    for name in list(shapes):
        if name.startswith("blk.0.") and ("shexp" in name or "exp_probs" in name):
            del shapes[name]
    if halves is not None:
        for layer in range(2):
            del shapes[f"blk.{layer}.attn_kv_b.weight"]
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in halves.items()}
    shapes |= {
        "blk.0.ffn_gate.weight": (80, 64),
        "blk.0.ffn_up.weight": (80, 64),
        "blk.0.ffn_down.weight": (64, 80),
    }
    metadata = {**DEEPSEEK_KEYS, "feed_forward_length": 80, **keys}
    return write_gguf(path, gguf_tensors(shapes), arch="deepseek2", metadata=metadata)


def test_gguf_deepseek_reads_as_data(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(deepseek_gguf(tmp_path / "d.gguf"))
    spec = checkpoint.spec
    assert spec.family == "deepseek_v3"
    assert spec.latent == LatentSpec(q_rank=24, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=12)
    assert spec.experts == ExpertSpec(
        num_experts=4,
        num_active=2,
        ffn_size=96,
        num_shared=1,
        dense_layers=(0,),
        scoring="sigmoid",
        score_bias=True,
        normalize=False,
        scale=2.5,
        num_groups=2,
        num_active_groups=1,
        group_score="top2_sum",
    )
    assert spec.attention_scale == pytest.approx(24**-0.5 * mscale(40.0, 1.0) ** 2)
    assert inverse_frequencies(spec.rope)[1] == 1.0
    assert (spec.ffn_size, spec.head_dim, spec.num_kv_heads) == (80, 24, 4)
    order = checkpoint.tensor("layers.1.self_attn.q_b_proj.weight").row_order
    assert order is not None
    assert order[:24].tolist() == [*range(16), 16, 18, 20, 22, 17, 19, 21, 23]


NEWER = {
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 12,
}


def test_gguf_deepseek_of_the_newer_kind_reads_the_same(tmp_path: Path) -> None:
    older = open_checkpoint(deepseek_gguf(tmp_path / "d.gguf"))
    path = deepseek_gguf(tmp_path / "n.gguf", HALVES, **NEWER)
    newer = open_checkpoint(path)
    assert newer.spec == older.spec
    assert newer.names() == older.names()
    weight = newer.tensor("layers.1.self_attn.kv_b_proj.weight")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    keys = reader["blk.1.attn_k_b.weight"].data.reshape(4, 32, 16)
    values = reader["blk.1.attn_v_b.weight"].data.reshape(4, 12, 32)
    whole = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(4 * 28, 32)
    np.testing.assert_array_equal(weight.dequantize(), whole)
    for start, stop in ((28, 84), (5, 31), (16, 28), (40, 40), (100, 112)):
        part = weight.dequantize(slice(start, stop), slice(3, 20))
        np.testing.assert_array_equal(part, whole[start:stop, 3:20])
        narrow = weight.rows(slice(start, stop))
        np.testing.assert_array_equal(narrow.dequantize(), whole[start:stop])
    with pytest.raises(ValueError, match="JOINED has no blocks"):
        weight.packed()
    assert weight.size_bytes == 4 * 112 * 32
    weight.release()


@pytest.mark.parametrize(
    ("halves", "says"),
    [
        ({"attn_k_b.weight": (4, 32, 16)}, r"blk\.\d\.attn_v_b\.weight.*missing"),
        ({**HALVES, "attn_v_b.weight": (4, 12, 30)}, r"keys of \(4, 32, 16\) beside values"),
        ({**HALVES, "attn_v_b.weight": (48, 32)}, "not three-dimensional"),
        ({**HALVES, "attn_v_b.weight": (4, 13, 32)}, r"expected \(112, 32\)"),
    ],
)
def test_halves_that_do_not_belong_together_are_named(
    tmp_path: Path, halves: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(CorruptModel, match=says):
        open_checkpoint(deepseek_gguf(tmp_path / "n.gguf", halves, **NEWER))


def test_gguf_deepseek_without_a_size_is_named(tmp_path: Path) -> None:
    path = deepseek_gguf(tmp_path / "d.gguf", **{"attention.value_length": None})
    with pytest.raises(CorruptModel, match=r"attention\.value_length' is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("deepseek_v2", {"topk_method": "best"}, "topk_method 'best'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("mixtral", {"mlp_bias": True}, "biases in a model with experts"),
    ],
)
def test_routing_that_is_not_built_is_named(kind: str, options: dict[str, Any], says: str) -> None:
    config = {**SIZES, **LATENT, "model_type": kind, **options}
    with pytest.raises(UnsupportedModel, match=says):
        from_hf_config(config, Path("config.json"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_experts_per_tok": 9}, "impossible experts"),
        ({"n_group": 3}, "8 experts are no 3 equal groups"),
        ({"n_group": 4, "topk_group": 5}, "5 active groups of 4"),
        ({"n_group": 8, "topk_group": 1}, "2 active experts do not fit"),
        ({"kv_lora_rank": 0}, "not the sum"),
        ({"num_key_value_heads": 2}, "2 KV heads"),
    ],
)
def test_impossible_experts_and_latents_are_named(options: dict[str, Any], says: str) -> None:
    config = {**SIZES, **LATENT, "n_group": 1, "topk_group": 1, "model_type": "deepseek_v3"}
    with pytest.raises(CorruptModel, match=says):
        from_hf_config({**config, **options}, Path("config.json"))


def test_multi_token_prediction_behind_the_last_layer_is_left_out() -> None:
    from models.stored_hf import canonical

    config = {**SIZES, **LATENT, "model_type": "deepseek_v3", "n_group": 1, "topk_group": 1}
    spec = from_hf_config(config, Path("config.json"))
    assert canonical("model.layers.8.eh_proj.weight", spec) is None
    assert canonical("model.layers.7.mlp.gate.weight", spec) == "layers.7.mlp.gate.weight"
    assert "layers.7.mlp.gate.e_score_correction_bias" in expected_tensors(spec)
