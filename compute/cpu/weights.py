"""Reads one shard of a checkpoint into the tables that the kernels use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compute.cpu import tables as t
from compute.cpu.matmul import tile_function
from compute.cpu.pack import ALL, Arena, Packed, pack, vector
from compute.shard import Shard
from models.checkpoint import Checkpoint
from models.errors import UnsupportedModel
from models.rope import inverse_frequencies
from models.spec import ModelSpec, RopeSpec

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(slots=True)
class Weights:
    """A shard's weights and the tables with their addresses; keeps both alive."""

    dims: Longs
    reals: Floats
    matrices: Longs
    layers: Longs
    packed: list[Packed] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights and tables."""
        return sum(p.data.nbytes for p in self.packed) + sum(v.nbytes for v in self.vectors)


def check_supported(spec: ModelSpec, path: Path) -> None:
    """Raise UnsupportedModel, naming what, for an architecture that the kernels do not run."""
    if spec.experts is not None:
        raise UnsupportedModel(path, "mixture-of-experts layers on the CPU engine")
    if spec.latent is not None:
        raise UnsupportedModel(path, "multi-head latent attention on the CPU engine")
    if spec.head_dim % 16:
        raise UnsupportedModel(path, f"head_dim {spec.head_dim}, not a multiple of 16")


def load_weights(
    checkpoint: Checkpoint,
    shard: Shard,
    *,
    context_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Weights:
    """Pack a shard's weights, one tensor at a time.

    Raises:
        UnsupportedModel: see :func:`check_supported`.
        CorruptModel: a tensor cannot be read.
    """
    spec = checkpoint.spec
    check_supported(spec, checkpoint.path)
    num_layers = len(shard.layers)
    weights = Weights(
        dims=np.zeros(t.NUM_DIMS, dtype=np.int64),
        reals=np.zeros(t.NUM_REALS, dtype=np.float32),
        matrices=np.zeros((num_layers * t.MATRICES_A_LAYER + 2, t.NUM_COLUMNS), dtype=np.int64),
        layers=np.zeros((num_layers, t.NUM_LAYER_COLUMNS), dtype=np.int64),
    )
    _Loader(checkpoint, shard, weights, on_progress).load(context_tokens)
    return weights


class _Loader:
    """Walks a checkpoint once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: Shard,
        weights: Weights,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._spec, self._shard = checkpoint, checkpoint.spec, shard
        self._weights, self._on_progress = weights, on_progress
        self._names = frozenset(checkpoint.names())
        self._arena = Arena()
        self._done_bytes = 0
        self._total_bytes = sum(checkpoint.tensor(name).size_bytes for name in self._names)

    def load(self, context_tokens: int) -> None:
        weights, spec, shard = self._weights, self._spec, self._shard
        dims, reals = weights.dims, weights.reals
        dims[t.HIDDEN], dims[t.HEAD_DIM] = spec.hidden_size, spec.head_dim
        dims[t.NUM_KV_HEADS] = len(shard.kv_heads)
        dims[t.NUM_HEADS] = len(shard.kv_heads) * (spec.num_heads // spec.num_kv_heads)
        dims[t.NUM_LAYERS], dims[t.ROPE_DIM] = len(shard.layers), spec.rope.dim
        dims[t.USES_GELU] = spec.activation == "gelu_tanh"
        reals[t.EPS], reals[t.EMBEDDING_SCALE] = spec.norm_eps, spec.embedding_scale
        reals[t.ATTENTION_SCALE] = spec.attention_scale
        reals[t.ATTENTION_SOFTCAP] = spec.attention_softcap or 0
        reals[t.LOGIT_SOFTCAP] = spec.logit_softcap or 0
        ropes: dict[RopeSpec, int] = {}
        self._on_progress(0, self._total_bytes)
        for row, layer in enumerate(shard.layers):
            rope = spec.rope_of(layer)
            if rope not in ropes:
                ropes[rope] = self._keep(rope_table(rope, context_tokens).reshape(-1))
            weights.layers[row, t.ROPE] = ropes[rope]
            weights.layers[row, t.WINDOW] = spec.windows[layer] or 0
            self._layer(row, f"layers.{layer}.")
        ends = weights.matrices[len(shard.layers) * t.MATRICES_A_LAYER :]
        last = shard.is_last(spec)
        if shard.is_first() or (last and spec.tied_embeddings):
            ends[t.EMBEDDING] = self._matrix("embed_tokens", ALL, ALL)
        if last:
            dims[t.FINAL_NORM] = self._norm("norm.weight")
            tied = spec.tied_embeddings
            ends[t.OUTPUT] = ends[t.EMBEDDING] if tied else self._matrix("lm_head", ALL, ALL)
        self._on_progress(self._total_bytes, self._total_bytes)

    def _layer(self, row: int, prefix: str) -> None:
        spec, shard, info = self._spec, self._shard, self._weights.layers[row]
        queries, keys, inner = shard.queries(spec), shard.keys(spec), shard.inner()
        cuts = {
            t.Q: (queries, ALL),
            t.K: (keys, ALL),
            t.V: (keys, ALL),
            t.O: (ALL, queries),
            t.GATE: (inner, ALL),
            t.UP: (inner, ALL),
            t.DOWN: (ALL, inner),
        }
        for role, (rows, columns) in cuts.items():
            entry = self._matrix(prefix + _NAMES[role], rows, columns)
            self._weights.matrices[row * t.MATRICES_A_LAYER + role] = entry
        info[t.ATTENTION_NORM] = self._norm(f"{prefix}input_layernorm.weight")
        after = self._norm(f"{prefix}post_attention_layernorm.weight")
        if spec.post_norms:
            info[t.ATTENTION_POST_NORM] = after
            info[t.MLP_NORM] = self._norm(f"{prefix}pre_feedforward_layernorm.weight")
            info[t.MLP_POST_NORM] = self._norm(f"{prefix}post_feedforward_layernorm.weight")
        else:
            info[t.MLP_NORM] = after
        if spec.qk_norm:
            info[t.Q_NORM] = self._norm(f"{prefix}self_attn.q_norm.weight")
            info[t.K_NORM] = self._norm(f"{prefix}self_attn.k_norm.weight")

    def _matrix(self, name: str, rows: slice, columns: slice) -> tuple[int, ...]:
        weight = self._checkpoint.tensor(f"{name}.weight")
        packed = pack(weight, rows, columns, arena=self._arena)
        self._weights.packed.append(packed)
        self._step(weight.size_bytes)
        bias = 0
        # A bias of a partial sum is added once: by the rank that has the first inputs.
        if f"{name}.bias" in self._names and not columns.start:
            stored = self._checkpoint.tensor(f"{name}.bias")
            bias = self._keep(vector(stored.dequantize(rows)))
            self._step(stored.size_bytes)
        function = tile_function(packed.kind)
        return (packed.address, packed.kind, packed.tiles, packed.groups, bias, function)

    def _norm(self, name: str) -> int:
        weight = self._checkpoint.tensor(name)
        self._step(weight.size_bytes)
        values = weight.dequantize() + np.float32(self._spec.norm_offset)
        return self._keep(vector(values))

    def _keep(self, values: Floats) -> int:
        self._weights.vectors.append(values)
        return values.ctypes.data

    def _step(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._on_progress(self._done_bytes, self._total_bytes)


def rope_table(rope: RopeSpec, context_tokens: int) -> Floats:
    """Cosines and sines: float32 (context, 2, dim / 2)."""
    frequencies, factor = inverse_frequencies(rope)
    angles = np.arange(context_tokens, dtype=np.float32)[:, None] * frequencies[None, :]
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.float32(factor)
    return np.ascontiguousarray(table, dtype=np.float32)
