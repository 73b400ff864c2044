"""Reads one rank's slice of a checkpoint into layers on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from compute.mlx.attention import GroupedAttention
from compute.mlx.latent import LatentAttention
from compute.mlx.matrix import Linear, Matrix, load_matrix, load_stack
from compute.mlx.mlp import FeedForward, GatedMlp, RoutedExperts
from models.checkpoint import Checkpoint
from models.layout import EMBEDDING
from models.plans import slices_of
from models.sharding import RankShard
from models.spec import ExpertSpec, LatentSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """Both halves of a decoder layer; norms are float32 with the spec's offset added."""

    attention_norm: mx.array
    attention: GroupedAttention | LatentAttention
    attention_post_norm: mx.array | None
    mlp_norm: mx.array
    mlp: FeedForward
    mlp_post_norm: mx.array | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """All of a rank's slice.

    Attributes:
        embedding: rows of the token embedding; None where no tokens enter.
        final_norm, output: None where no logits leave.
        num_bytes: of everything here.
    """

    embedding: Matrix | None
    layers: tuple[Layer, ...]
    final_norm: mx.array | None
    output: Matrix | None
    num_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    shard: RankShard,
    *,
    dtype: mx.Dtype,
    on_progress: Callable[[int, int], None],
) -> Weights:
    """Load a rank's slice, one tensor at a time.

    Args:
        dtype: of activations, of what cannot stay packed, and of scales.

    Raises:
        CorruptModel: a tensor cannot be read.
    """
    return _Loader(checkpoint, shard, dtype, on_progress).load()


class _Loader:
    """Walks a slice once and counts the bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: RankShard,
        dtype: mx.Dtype,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._spec, self._shard = checkpoint, checkpoint.spec, shard
        self._dtype, self._on_progress = dtype, on_progress
        self._slices = slices_of(checkpoint.spec, shard)
        self._total = sum(self._stored_bytes(name) for name in self._slices)
        self._done = self._num_bytes = 0

    def load(self) -> Weights:
        spec, shard = self._spec, self._shard
        self._on_progress(0, self._total)
        embedding = self._matrix(EMBEDDING) if EMBEDDING in self._slices else None
        layers = tuple(self._layer(index, layer) for index, layer in enumerate(shard.layers))
        final_norm, output = None, None
        if shard.is_last():
            final_norm = self._norm("norm.weight")
            if spec.tied_embeddings:
                assert embedding is not None
                output = self._rows_of(embedding, shard.vocab)
            else:
                output = self._matrix("lm_head.weight")
        if shard.is_first():
            assert embedding is not None
            embedding = self._rows_of(embedding, shard.embedding)
        self._checkpoint.release()
        return Weights(
            embedding=embedding if shard.is_first() else None,
            layers=layers,
            final_norm=final_norm,
            output=output,
            num_bytes=self._num_bytes,
        )

    def _layer(self, index: int, layer: int) -> Layer:
        spec, prefix = self._spec, f"layers.{layer}."
        after = self._norm(f"{prefix}post_attention_layernorm.weight")
        if spec.post_norms:
            mlp_norm = self._norm(f"{prefix}pre_feedforward_layernorm.weight")
            mlp_post_norm = self._norm(f"{prefix}post_feedforward_layernorm.weight")
        attention_norm = self._norm(f"{prefix}input_layernorm.weight")
        attention: GroupedAttention | LatentAttention
        if spec.latent is None:
            attention = self._grouped(index, layer)
        else:
            attention = self._latent(index, layer, spec.latent)
        mlp: FeedForward
        if spec.experts is not None and spec.is_sparse(layer):
            mlp = self._experts(f"{prefix}mlp.", spec.experts)
        else:
            mlp = self._mlp(f"{prefix}mlp.")
        return Layer(
            attention_norm=attention_norm,
            attention=attention,
            attention_post_norm=after if spec.post_norms else None,
            mlp_norm=mlp_norm if spec.post_norms else after,
            mlp=mlp,
            mlp_post_norm=mlp_post_norm if spec.post_norms else None,
        )

    def _grouped(self, index: int, layer: int) -> GroupedAttention:
        spec, prefix = self._spec, f"layers.{layer}.self_attn."
        return GroupedAttention(
            spec=spec,
            index=index,
            window=spec.windows[layer],
            rope=spec.rope_of(layer),
            q=self._linear(f"{prefix}q_proj"),
            k=self._linear(f"{prefix}k_proj"),
            v=self._linear(f"{prefix}v_proj"),
            o=self._linear(f"{prefix}o_proj"),
            q_norm=self._norm(f"{prefix}q_norm.weight") if spec.qk_norm else None,
            k_norm=self._norm(f"{prefix}k_norm.weight") if spec.qk_norm else None,
        )

    def _latent(self, index: int, layer: int, latent: LatentSpec) -> LatentAttention:
        prefix = f"layers.{layer}.self_attn."
        direct = latent.q_rank is None
        name = f"{prefix}kv_b_proj.weight"
        weight = self._checkpoint.tensor(name)
        expand = mx.array(weight.dequantize(*self._slices[name])).astype(self._dtype)
        expand = expand.reshape(-1, latent.nope_dim + latent.v_dim, latent.kv_rank)
        to_keys = mx.contiguous(expand[:, : latent.nope_dim])
        to_values = mx.contiguous(expand[:, latent.nope_dim :].swapaxes(1, 2))
        mx.eval(to_keys, to_values)
        weight.release()
        self._count(name, to_keys.nbytes + to_values.nbytes)
        return LatentAttention(
            spec=self._spec,
            latent=latent,
            index=index,
            rope=self._spec.rope_of(layer),
            q=self._linear(f"{prefix}q_proj") if direct else None,
            q_a=None if direct else self._linear(f"{prefix}q_a_proj"),
            q_a_norm=None if direct else self._norm(f"{prefix}q_a_layernorm.weight"),
            q_b=None if direct else self._linear(f"{prefix}q_b_proj"),
            kv_a=self._linear(f"{prefix}kv_a_proj_with_mqa"),
            kv_a_norm=self._norm(f"{prefix}kv_a_layernorm.weight"),
            to_keys=to_keys,
            to_values=to_values,
            o=self._linear(f"{prefix}o_proj"),
        )

    def _mlp(self, prefix: str) -> GatedMlp:
        return GatedMlp(
            activation=self._spec.activation,
            gate=self._linear(f"{prefix}gate_proj"),
            up=self._linear(f"{prefix}up_proj"),
            down=self._linear(f"{prefix}down_proj"),
        )

    def _experts(self, prefix: str, experts: ExpertSpec) -> RoutedExperts:
        router, bias = f"{prefix}gate.weight", f"{prefix}gate.e_score_correction_bias"
        return RoutedExperts(
            spec=experts,
            activation=self._spec.activation,
            here=self._shard.experts,
            router=self._floats(router),
            bias=self._floats(bias) if experts.score_bias else None,
            gate=self._stack(prefix, "gate_proj"),
            up=self._stack(prefix, "up_proj"),
            down=self._stack(prefix, "down_proj"),
            shared=self._mlp(f"{prefix}shared_experts.") if experts.num_shared else None,
        )

    def _stack(self, prefix: str, name: str) -> Matrix:
        names = [f"{prefix}experts.{number}.{name}.weight" for number in self._shard.experts]
        rows, columns = self._slices[names[0]]
        weights = [self._checkpoint.tensor(full) for full in names]
        stack = load_stack(weights, rows, columns, self._dtype)
        for full in names:
            self._count(full, 0)
        self._num_bytes += stack.num_bytes
        return stack

    def _matrix(self, name: str) -> Matrix:
        rows, columns = self._slices[name]
        matrix = load_matrix(self._checkpoint.tensor(name), rows, columns, self._dtype)
        self._count(name, matrix.num_bytes)
        return matrix

    def _rows_of(self, embedding: Matrix, kept: range) -> Matrix:
        """The rows of the embedding that one of its two uses needs."""
        held = self._slices[EMBEDDING][0]
        if (held.start, held.stop) == (kept.start, kept.stop):
            return embedding
        return embedding.between(kept.start - held.start, kept.stop - held.start)

    def _linear(self, name: str) -> Linear:
        bias = f"{name}.bias"
        matrix = self._matrix(f"{name}.weight")
        if bias not in self._slices:
            return Linear(matrix)
        return Linear(matrix, self._floats(bias, dtype=self._dtype))

    def _norm(self, name: str) -> mx.array:
        return self._floats(name, offset=self._spec.norm_offset)

    def _floats(self, name: str, *, offset: float = 0.0, dtype: mx.Dtype = mx.float32) -> mx.array:
        values = self._checkpoint.tensor(name).dequantize(*self._slices[name])
        array = mx.array(values + np.float32(offset)).astype(dtype)
        mx.eval(array)
        self._count(name, array.nbytes)
        return array

    def _count(self, name: str, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._done += self._stored_bytes(name)
        self._on_progress(self._done, self._total)

    def _stored_bytes(self, name: str) -> int:
        """Bytes of the file that hold what is kept of a weight."""
        weight, whole, kept = self._checkpoint.tensor(name), 1, 1
        for size, part in zip(weight.shape, self._slices[name], strict=True):
            whole, kept = whole * size, kept * (part.stop - part.start)
        return weight.size_bytes * kept // whole
