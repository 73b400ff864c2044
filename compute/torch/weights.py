"""Reads one shard of a checkpoint into torch tensors on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compute.shard import Shard
from models.checkpoint import Checkpoint
from models.errors import UnsupportedModel
from models.rope import inverse_frequencies
from models.spec import RopeSpec

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: weight (out, in), and a bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's part of a shard; norms are float32 with the spec's offset added."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: Tensor
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp_post_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchWeights:
    """A whole shard; embedding, final norm and output are empty where it does not have them."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    output: Tensor
    memory_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    shard: Shard,
    *,
    context_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
) -> TorchWeights:
    """Dequantise a shard's weights to ``dtype`` on ``device``, one tensor at a time.

    Raises:
        UnsupportedModel: an architecture that the decoder does not run.
    """
    spec = checkpoint.spec
    if spec.experts is not None:
        raise UnsupportedModel(checkpoint.path, "mixture-of-experts layers on the torch engine")
    if spec.latent is not None:
        raise UnsupportedModel(checkpoint.path, "latent attention on the torch engine")
    loader = _Loader(checkpoint, context_tokens, device, dtype, on_progress)
    layers = tuple(loader.layer(shard, layer) for layer in shard.layers)
    empty = torch.empty(0, device=device, dtype=dtype)
    first, last = shard.is_first(), shard.is_last(spec)
    embedding = empty
    if first or (last and spec.tied_embeddings):
        embedding = loader.matrix("embed_tokens.weight")
    output = empty
    if last:
        output = embedding if spec.tied_embeddings else loader.matrix("lm_head.weight")
    final_norm = loader.norm("norm.weight") if last else empty
    return TorchWeights(
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        output=output,
        memory_bytes=loader.memory_bytes,
    )


class _Loader:
    """Walks a checkpoint once and counts the bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._spec = checkpoint, checkpoint.spec
        self._context_tokens, self._device, self._dtype = context_tokens, device, dtype
        self._on_progress = on_progress
        self._names = frozenset(checkpoint.names())
        self._total_bytes = sum(checkpoint.tensor(name).size_bytes for name in self._names)
        self._done_bytes = 0
        self._ropes: dict[RopeSpec, tuple[Tensor, Tensor]] = {}
        self.memory_bytes = 0
        on_progress(0, self._total_bytes)

    def layer(self, shard: Shard, layer: int) -> LayerWeights:
        """One layer's weights."""
        spec, prefix = self._spec, f"layers.{layer}."
        queries, keys, inner = shard.queries(spec), shard.keys(spec), shard.inner()
        after = self.norm(f"{prefix}post_attention_layernorm.weight")
        posts = spec.post_norms
        return LayerWeights(
            q=self._linear(f"{prefix}self_attn.q_proj", queries, ALL),
            k=self._linear(f"{prefix}self_attn.k_proj", keys, ALL),
            v=self._linear(f"{prefix}self_attn.v_proj", keys, ALL),
            o=self._linear(f"{prefix}self_attn.o_proj", ALL, queries),
            gate=self._linear(f"{prefix}mlp.gate_proj", inner, ALL),
            up=self._linear(f"{prefix}mlp.up_proj", inner, ALL),
            down=self._linear(f"{prefix}mlp.down_proj", ALL, inner),
            attention_norm=self.norm(f"{prefix}input_layernorm.weight"),
            attention_post_norm=after if posts else None,
            mlp_norm=self.norm(f"{prefix}pre_feedforward_layernorm.weight") if posts else after,
            mlp_post_norm=(
                self.norm(f"{prefix}post_feedforward_layernorm.weight") if posts else None
            ),
            q_norm=self.norm(f"{prefix}self_attn.q_norm.weight") if spec.qk_norm else None,
            k_norm=self.norm(f"{prefix}self_attn.k_norm.weight") if spec.qk_norm else None,
            rope=self._rope(spec.rope_of(layer)),
        )

    def matrix(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A dequantised matrix, or the part of it that a shard keeps."""
        weight = self._checkpoint.tensor(name)
        values = torch.from_numpy(weight.dequantize(rows, columns))
        return self._keep(values.to(self._device, self._dtype), weight.size_bytes)

    def norm(self, name: str) -> Tensor:
        """A norm's weight in float32 with the spec's offset."""
        weight = self._checkpoint.tensor(name)
        values = torch.from_numpy(weight.dequantize() + np.float32(self._spec.norm_offset))
        return self._keep(values.to(self._device), weight.size_bytes)

    def _linear(self, name: str, rows: slice, columns: slice) -> Linear:
        weight, bias = self.matrix(f"{name}.weight", rows, columns), None
        # A bias of a partial sum is added once: by the rank that has the first inputs.
        if f"{name}.bias" in self._names and not columns.start:
            stored = self._checkpoint.tensor(f"{name}.bias")
            values = torch.from_numpy(stored.dequantize(rows))
            bias = self._keep(values.to(self._device, self._dtype), stored.size_bytes)
        return Linear(weight, bias)

    def _rope(self, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        if rope not in self._ropes:
            frequencies, factor = inverse_frequencies(rope)
            positions = torch.arange(self._context_tokens, dtype=torch.float32)
            angles = positions[:, None] * torch.from_numpy(frequencies)
            tables = (angles.cos() * factor, angles.sin() * factor)
            self._ropes[rope] = (tables[0].to(self._device), tables[1].to(self._device))
        return self._ropes[rope]

    def _keep(self, tensor: Tensor, stored_bytes: int) -> Tensor:
        self.memory_bytes += tensor.numel() * tensor.element_size()
        self._done_bytes += stored_bytes
        self._on_progress(self._done_bytes, self._total_bytes)
        return tensor
