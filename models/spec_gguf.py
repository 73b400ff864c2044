"""ModelSpec from GGUF metadata: one table of differences per architecture."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from models.errors import CorruptModel, UnsupportedModel
from models.gguf_file import GgufFile
from models.spec import Activation, Family, ModelSpec, RopeSpec
from models.spec_gguf_parts import SIGMOID, expert_spec, latent_spec, tempered


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What an architecture implies that its metadata does not say.

    Attributes:
        interleaved: query and key rows lie pairwise (even, odd) instead of in halves.
        window_pattern: every n-th layer has full attention, the others a window; 0 means that
            a window, if any, covers all layers.
        local_theta: rope base of windowed layers where the metadata has none.
        wide_layers: number of layers of the one size whose attention scale comes from
            ``hidden_size / num_heads``; 0 for none.
        normalize: weights of the chosen experts are divided by their sum, where the metadata
            does not say.
    """

    family: Family
    interleaved: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    scaled_embeddings: bool = False
    window_pattern: int = 0
    local_theta: float | None = None
    wide_layers: int = 0
    normalize: bool = True


# Source: llama.cpp, load_hparams of each architecture. Gemma's norm weights carry their +1.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(family="llama", interleaved=True),
    "qwen2": Architecture(family="qwen2"),
    "qwen3": Architecture(family="qwen3", qk_norm=True),
    "qwen3moe": Architecture(family="qwen3_moe", qk_norm=True),
    "deepseek2": Architecture(family="deepseek_v2", interleaved=True, normalize=False),
    "gemma3": Architecture(
        family="gemma3",
        qk_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        scaled_embeddings=True,
        window_pattern=6,
        local_theta=10000.0,
        wide_layers=62,
    ),
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """Name and table entry of a file's architecture.

    Raises:
        CorruptModel: the file names none.
        UnsupportedModel: one that is not in the table, by name.
    """
    name = file.text("general.architecture")
    if name is None:
        raise CorruptModel(file.path, "metadata 'general.architecture' is missing")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            file.path, f"architecture {name!r}; read from GGUF are {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[name]
    if name == "llama" and file.integer("llama.expert_count"):
        arch = replace(arch, family="mixtral")
    if name == "deepseek2" and file.integer("deepseek2.expert_gating_func") == SIGMOID:
        arch = replace(arch, family="deepseek_v3")
    return name, arch


def from_gguf(file: GgufFile, tensor_names: Collection[str] | None = None) -> ModelSpec:
    """Read the spec of a GGUF file.

    Args:
        file: the (first) file, which holds the metadata.
        tensor_names: names over all files of a split model; None takes ``file``'s own.

    Raises:
        CorruptModel: a needed value is missing, of the wrong type or impossible.
        UnsupportedModel: an architecture or option that is not built, by name.
    """
    name, arch = architecture_of(file)
    names = file.tensors.keys() if tensor_names is None else tensor_names

    def need(key: str) -> int:
        value = file.integer(f"{name}.{key}")
        if value is None:
            raise CorruptModel(file.path, f"metadata '{name}.{key}' is missing")
        return value

    num_layers, hidden, num_heads = (
        need("block_count"),
        need("embedding_length"),
        need("attention.head_count"),
    )
    if num_heads <= 0:
        raise CorruptModel(file.path, f"impossible {name}.attention.head_count {num_heads}")
    latent = latent_spec(file, name)
    if latent is None:
        head_dim = file.integer(f"{name}.attention.key_length") or hidden // num_heads
        value_dim = file.integer(f"{name}.attention.value_length") or head_dim
        if value_dim != head_dim:
            raise UnsupportedModel(file.path, f"values of {value_dim} beside keys of {head_dim}")
    else:
        head_dim = latent.nope_dim + latent.rope_dim
    tokens = file.strings("tokenizer.ggml.tokens")
    vocab = file.integer(f"{name}.vocab_size") or (len(tokens) if tokens is not None else 0)
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is not None and len(embeddings.shape) == 2:
        vocab = embeddings.shape[0]  # padded vocabularies have more rows than tokens
    eps = file.number(f"{name}.attention.layer_norm_rms_epsilon")
    rope = _rope(file, name, file.integer(f"{name}.rope.dimension_count") or head_dim)
    factor = 1.0
    if latent is not None:
        rope, factor = tempered(file, name, rope)
    wide = num_layers == arch.wide_layers
    window = file.integer(f"{name}.attention.sliding_window") or None
    pattern = file.metadata.get(f"{name}.attention.sliding_window_pattern")
    period = pattern if isinstance(pattern, int) and pattern > 0 else arch.window_pattern
    local_theta = file.number(f"{name}.rope.freq_base_swa") or arch.local_theta
    if not 0 < num_layers < 100_000:
        raise CorruptModel(file.path, f"impossible {name}.block_count {num_layers}")
    num_kv = file.integer(f"{name}.attention.head_count_kv")
    experts = expert_spec(file, name, arch.normalize, num_layers, names)
    dense_ffn = file.integer(f"{name}.feed_forward_length")
    if dense_ffn is None and experts is not None and not experts.dense_layers:
        dense_ffn = experts.ffn_size  # no layer has one
    try:
        return ModelSpec(
            family=arch.family,
            num_layers=num_layers,
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=num_heads if latent is not None else num_kv or num_heads,
            head_dim=head_dim,
            ffn_size=dense_ffn or need("feed_forward_length"),
            vocab_size=vocab,
            context_length=need("context_length"),
            norm_eps=1e-6 if eps is None else eps,
            rope=rope,
            local_rope=RopeSpec(theta=local_theta, dim=rope.dim) if local_theta else None,
            windows=tuple(
                None if period and (layer + 1) % period == 0 else window
                for layer in range(num_layers)
            ),
            attention_scale=(hidden / num_heads if wide else head_dim) ** -0.5 * factor,
            attention_softcap=file.number(f"{name}.attn_logit_softcapping") or None,
            logit_softcap=file.number(f"{name}.final_logit_softcapping") or None,
            embedding_scale=hidden**0.5 if arch.scaled_embeddings else 1.0,
            post_norms=arch.post_norms,
            qk_norm=arch.qk_norm,
            attention_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_q_a.bias"} & set(names)),
            output_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_up.bias" in names,
            activation=arch.activation,
            tied_embeddings="output.weight" not in names,
            experts=experts,
            latent=latent,
        )
    except (ValueError, ArithmeticError) as exc:
        raise CorruptModel(file.path, f"impossible metadata: {exc}") from exc


def _rope(file: GgufFile, name: str, dim: int) -> RopeSpec:
    theta = file.number(f"{name}.rope.freq_base") or 10000.0
    divisors = file.tensors.get("rope_freqs.weight")
    if divisors is not None:
        if divisors.kind != "F32" or divisors.shape != (dim // 2,):
            raise CorruptModel(
                file.path,
                "wrong frequency divisors",
                tensor=divisors.name,
                expected=f"F32 {(dim // 2,)}",
                found=f"{divisors.kind} {divisors.shape}",
            )
        values = np.frombuffer(file.bytes_of(divisors).tobytes(), dtype="<f4")
        return RopeSpec(
            theta=theta, dim=dim, scaling="divisors", divisors=tuple(float(v) for v in values)
        )
    kind = file.text(f"{name}.rope.scaling.type") or "none"
    factor = file.number(f"{name}.rope.scaling.factor") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeSpec(theta=theta, dim=dim)
    if kind == "linear":
        return RopeSpec(theta=theta, dim=dim, scaling="linear", factor=factor)
    if kind == "yarn":
        return RopeSpec(
            theta=theta,
            dim=dim,
            scaling="yarn",
            factor=factor,
            original_context=file.integer(f"{name}.rope.scaling.original_context_length")
            or file.integer(f"{name}.context_length")
            or 0,
            beta_fast=file.number(f"{name}.rope.scaling.yarn_beta_fast") or 32.0,
            beta_slow=file.number(f"{name}.rope.scaling.yarn_beta_slow") or 1.0,
        )
    raise UnsupportedModel(file.path, f"rope scaling {kind!r}")
