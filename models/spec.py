"""What an architecture is, as data: the one record that engines, plans and estimates read.

No code branches on a model's name: everything in which families differ is a field here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"
]
Activation = Literal["silu", "gelu_tanh"]
RopeScaling = Literal["none", "linear", "llama3", "yarn", "divisors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer; ``models.rope`` gives it meaning.

    Attributes:
        theta: base of the frequencies.
        dim: how many of a head's features are rotated (halves paired: i with i + dim/2).
        scaling: which of the fields below apply.
        factor: context extension, for linear, llama3 and yarn.
        divisors: for ``divisors``, one a frequency (dim/2 of them), read from the file.
        attention_factor: yarn's factor on cos and sin; None derives it from ``factor``.
        mscale, mscale_all_dim: DeepSeek's yarn temperatures; 0 where absent.
    """

    theta: float
    dim: int
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """Mixture-of-experts part of the feed-forward layers.

    Attributes:
        num_experts, num_active: routed experts, and how many of them a token uses.
        ffn_size: inner width of one routed expert.
        num_shared: always-active experts (one MLP of ``num_shared * ffn_size``).
        dense_layers: indices of layers that keep a plain MLP of the spec's ``ffn_size``.
        scoring: what turns router logits into scores.
        score_bias: a per-expert bias takes part in the choice, not in the weight.
        normalize: chosen weights are divided by their sum.
        scale: factor on the chosen weights.
        num_groups, num_active_groups: group-limited routing; 1, 1 means none.
        group_score: a group's score is its best expert, or the sum of its two best.
    """

    num_experts: int
    num_active: int
    ffn_size: int
    num_shared: int = 0
    dense_layers: tuple[int, ...] = ()
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    score_bias: bool = False
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_active_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek V2 and V3): ranks and head parts.

    A query head is ``nope_dim`` features without position, then ``rope_dim`` rotated ones; the
    spec's ``head_dim`` is their sum. Keys and values of all heads come from one latent vector of
    ``kv_rank`` features (``kv_b_proj``: per head ``nope_dim`` of a key, then ``v_dim`` of a value)
    beside one rotated key part of ``rope_dim`` that all heads share. The rotated rows of
    ``q_proj``, ``q_b_proj`` and ``kv_a_proj_with_mqa`` are read in halves (i pairs with
    i + rope_dim / 2) like those of every other family, whatever order the file has.

    Attributes:
        q_rank: width of the query's own latent; None where queries are projected in one step.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer.

    Attributes:
        family: names the sharding plan; nothing else may depend on it.
        num_kv_heads: key and value heads; each serves ``num_heads / num_kv_heads`` queries.
        head_dim: features of a head (not always ``hidden_size / num_heads``).
        context_length: tokens the model was trained for.
        rope: position embedding of full-attention layers.
        local_rope: the one of windowed layers; None means the same.
        windows: per layer the attention window in tokens (a query sees itself and the
            ``window - 1`` tokens before it); None means full attention.
        attention_scale: factor on query-key products.
        attention_softcap, logit_softcap: ``cap * tanh(x / cap)`` where set.
        embedding_scale: factor on token embeddings.
        norm_offset: RMS norms multiply by ``weight + norm_offset`` of the weights as stored.
        post_norms: norms also behind attention and MLP, before the residual sum
            (``post_attention_layernorm``, ``post_feedforward_layernorm``; the MLP's own is
            then ``pre_feedforward_layernorm``).
        qk_norm: RMS norm over each head of queries and keys, before rotation.
        attention_bias: biases on q, k, v; ``output_bias``: on o; ``mlp_bias``: on the MLP.
        tied_embeddings: the output layer is ``embed_tokens.weight``.
        experts: None for a dense model.
        latent: None for ordinary attention.
    """

    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    attention_scale: float
    local_rope: RopeSpec | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    tied_embeddings: bool = False
    experts: ExpertSpec | None = None
    latent: LatentSpec | None = None

    def __post_init__(self) -> None:
        """Check what every reader relies on. Raises ValueError naming the field."""
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "vocab_size",
            "context_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2 or self.rope.dim % 2 or not 0 < self.rope.dim <= self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} or rope dim {self.rope.dim} cannot rotate")
        self._check_parts()
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if any(w is not None and w <= 0 for w in self.windows):
            raise ValueError("a sliding window must be positive")
        positive: tuple[float, ...] = (self.norm_eps, self.attention_scale)
        for rope in (self.rope, self.local_rope or self.rope):
            positive += (rope.theta, rope.factor, *rope.divisors)
        if not all(math.isfinite(x) and x > 0 for x in positive):
            raise ValueError("norm_eps, attention_scale and rope numbers must be positive")

    def _check_parts(self) -> None:
        experts, latent = self.experts, self.latent
        if latent is not None:
            sizes = (latent.q_rank or 1, latent.kv_rank, latent.nope_dim, latent.v_dim)
            if min(sizes) <= 0 or latent.nope_dim + latent.rope_dim != self.head_dim:
                raise ValueError(f"head_dim {self.head_dim} is not the sum of {latent}")
            if self.rope.dim != latent.rope_dim or self.num_kv_heads != self.num_heads:
                raise ValueError(f"{self.num_kv_heads} KV heads, rope {self.rope.dim}: {latent}")
        if experts is not None:
            groups = experts.num_groups
            if not 0 < experts.num_active <= experts.num_experts or experts.ffn_size <= 0:
                raise ValueError(f"impossible experts: {experts}")
            if groups <= 0 or experts.num_experts % groups:
                raise ValueError(f"{experts.num_experts} experts are no {groups} equal groups")
            if not 0 < experts.num_active_groups <= groups:
                raise ValueError(f"{experts.num_active_groups} active groups of {groups}")
            if experts.num_active > experts.num_experts // groups * experts.num_active_groups:
                raise ValueError(f"{experts.num_active} active experts do not fit their groups")

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer (0-based) has experts instead of a plain MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def rope_of(self, layer: int) -> RopeSpec:
        """Position embedding of one layer (0-based)."""
        if self.local_rope is not None and self.windows[layer] is not None:
            return self.local_rope
        return self.rope
