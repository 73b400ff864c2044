"""Specs: every family's config.json as transformers writes it; rope as it computes it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.layout import expected_tensors
from models.rope import inverse_frequencies
from models.spec import ModelSpec, RopeSpec
from models.spec_hf import from_hf_config
from tests.models.tiny import llama_tensors, write_gguf

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LINEAR, "head_dim": 32}),
    ("mistral", {"sliding_window": 32}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    ("qwen3", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}),
    ("gemma3_text", {"head_dim": 32, "final_logit_softcapping": 30.0, "sliding_window": 24}),
]


def made(kind: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoConfig.for_model(kind, **{**SIZES, **options})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_model_that_transformers_saved_opens(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """All tensors are there in the shapes that the spec expects, with the same values."""
    from transformers import AutoModelForCausalLM

    config = made(kind, options)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = checkpoint.spec
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    for name in checkpoint.names():
        np.testing.assert_array_equal(
            checkpoint.tensor(name).dequantize(), state[name].float().numpy()
        )
    attention = model.model.layers[0].self_attn
    assert spec.attention_scale == pytest.approx(attention.scaling)
    assert spec.head_dim == attention.head_dim
    layer_types = getattr(config, "layer_types", None)
    sliding = [kind == "sliding_attention" for kind in layer_types or []]
    if kind == "mistral":
        sliding = [options["sliding_window"] is not None] * 8
    window = config.sliding_window if any(sliding) else None
    assert spec.windows == tuple(window if on else None for on in sliding or [False] * 8)
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.norm_eps == config.rms_norm_eps
    rotary = model.model.rotary_emb
    if kind == "gemma3_text":
        np.testing.assert_allclose(
            inverse_frequencies(spec.rope_of(5))[0], rotary.full_attention_inv_freq, rtol=1e-6
        )
        np.testing.assert_allclose(
            inverse_frequencies(spec.rope_of(0))[0], rotary.sliding_attention_inv_freq, rtol=1e-6
        )
        assert (spec.norm_offset, spec.post_norms, spec.qk_norm) == (1.0, True, True)
        assert spec.logit_softcap == options.get("final_logit_softcapping")
        assert spec.embedding_scale == 8.0
    else:
        frequencies, factor = inverse_frequencies(spec.rope)
        np.testing.assert_allclose(frequencies, rotary.inv_freq, rtol=1e-6)
        assert factor == pytest.approx(rotary.attention_scaling)


def test_configs_of_the_hub_before_transformers_5() -> None:
    config = {
        **SIZES,
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    }
    spec = from_hf_config(config, Path("config.json"))
    assert spec.rope == RopeSpec(
        theta=500000.0, dim=16, scaling="llama3", factor=8.0, original_context=64
    )
    gemma = {
        **SIZES,
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "head_dim": 16,
    }
    spec = from_hf_config(gemma, Path("config.json"))
    assert spec.rope == RopeSpec(theta=1e6, dim=16, scaling="linear", factor=8.0)
    assert spec.local_rope == RopeSpec(theta=1e4, dim=16)
    assert spec.windows == (*[512] * 5, None, 512, 512)
    vision = {"model_type": "gemma3", "text_config": {**gemma}, "vision_config": {}}
    assert from_hf_config(vision, Path("config.json")) == spec


def test_gguf_rope_divisors_and_qwen_biases(tmp_path: Path) -> None:
    tensors = llama_tensors()
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    tensors["rope_freqs.weight"] = (divisors, "F32")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))
    frequencies, factor = inverse_frequencies(checkpoint.spec.rope)
    plain = inverse_frequencies(RopeSpec(theta=10000.0, dim=16))[0]
    np.testing.assert_allclose(frequencies, plain / divisors, rtol=1e-6)
    assert factor == 1.0
    qwen = open_checkpoint(write_gguf(tmp_path / "b.gguf", llama_tensors(bias=True), arch="qwen2"))
    assert qwen.spec.family == "qwen2"
    assert qwen.spec.attention_bias
    assert qwen.tensor("layers.0.self_attn.q_proj.weight").row_order is None


def test_gguf_gemma3_reads_as_data(tmp_path: Path) -> None:
    tensors = llama_tensors()
    for n in range(2):
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[f"blk.{n}.{name}.weight"] = (np.ones(16, np.float32), "F32")
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{n}.{name}.weight"] = (np.ones(64, np.float32), "F32")
    path = write_gguf(
        tmp_path / "g.gguf", tensors, arch="gemma3", metadata={"attention.sliding_window": 32}
    )
    spec = open_checkpoint(path).spec
    assert (spec.norm_offset, spec.post_norms, spec.qk_norm) == (0.0, True, True)
    assert spec.windows == (32, 32)
    assert spec.rope_of(0) == RopeSpec(theta=10000.0, dim=16)
    assert spec.embedding_scale == 8.0


def test_a_spec_counts_the_weights_of_its_tensors() -> None:
    spec = from_hf_config({**SIZES, "model_type": "llama"}, Path("config.json"))
    tensors = expected_tensors(spec)
    assert len(tensors) == 3 + 8 * 9
    assert json.loads(json.dumps(tensors["layers.7.mlp.gate_proj.weight"])) == [96, 64]


def test_an_impossible_spec_names_its_field() -> None:
    good = from_hf_config({**SIZES, "model_type": "llama"}, Path("config.json"))
    fields = {name: getattr(good, name) for name in ModelSpec.__dataclass_fields__}
    with pytest.raises(ValueError, match="head_dim 15"):
        ModelSpec(**{**fields, "head_dim": 15})
    with pytest.raises(ValueError, match="7 windows for 8 layers"):
        ModelSpec(**{**fields, "windows": (None,) * 7})
    with pytest.raises(ValueError, match="must be positive"):
        ModelSpec(**{**fields, "norm_eps": float("nan")})
