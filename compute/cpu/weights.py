"""Reads one rank's slice of a checkpoint into the tables that the kernels use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compute.cpu import tables as t
from compute.cpu.experts import experts_function
from compute.cpu.matmul import tile_function
from compute.cpu.pack import Arena, Packed, pack, vector
from models.checkpoint import Checkpoint
from models.errors import UnsupportedModel
from models.layout import EMBEDDING
from models.plans import slices_of
from models.rope import inverse_frequencies
from models.sharding import RankShard
from models.spec import ExpertSpec, ModelSpec, RopeSpec

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_ATTENTION = {t.Q: "q_proj", t.K: "k_proj", t.V: "v_proj", t.O: "o_proj"}
_MLP = {t.GATE: "gate_proj", t.UP: "up_proj", t.DOWN: "down_proj"}


@dataclass(slots=True)
class Weights:
    """A rank's weights and the tables with their addresses; keeps both alive."""

    dims: Longs
    reals: Floats
    matrices: Longs
    layers: Longs
    packed: list[Packed] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)
    positions: list[Floats] = field(default_factory=list)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.data.nbytes for p in self.packed) + sum(v.nbytes for v in self.vectors)

    @property
    def tables_bytes(self) -> int:
        """Bytes of what is made for positions, not read."""
        return sum(table.nbytes for table in self.positions)


def _lacking(spec: ModelSpec) -> str | None:
    if spec.latent is not None:
        return "multi-head latent attention"
    if spec.head_dim % 16:
        return f"head_dim {spec.head_dim}, not a multiple of 16,"
    return None


def is_supported(spec: ModelSpec) -> bool:
    """Whether the kernels run an architecture."""
    return _lacking(spec) is None


def check_supported(spec: ModelSpec, path: Path) -> None:
    """Raise UnsupportedModel, naming what, for an architecture that the kernels do not run."""
    lacking = _lacking(spec)
    if lacking is not None:
        raise UnsupportedModel(path, f"{lacking} in the compiled kernels")


def load_weights(
    checkpoint: Checkpoint,
    shard: RankShard,
    *,
    context_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Weights:
    """Pack a rank's slice, one tensor at a time; pages of the file are given back at once.

    Raises:
        UnsupportedModel: see :func:`check_supported`.
        CorruptModel: a tensor cannot be read.
        OutOfMemory: no room.
    """
    spec = checkpoint.spec
    check_supported(spec, checkpoint.path)
    num_layers = len(shard.layers)
    num_experts = sum(spec.is_sparse(layer) for layer in shard.layers) * len(shard.experts)
    num_matrices = num_layers * t.MATRICES_A_LAYER + t.ENDS + num_experts * t.MATRICES_AN_EXPERT
    weights = Weights(
        dims=np.zeros(t.NUM_DIMS, dtype=np.int64),
        reals=np.zeros(t.NUM_REALS, dtype=np.float32),
        matrices=np.zeros((num_matrices, t.NUM_COLUMNS), dtype=np.int64),
        layers=np.zeros((num_layers, t.NUM_LAYER_COLUMNS), dtype=np.int64),
    )
    _Loader(checkpoint, shard, weights, on_progress).load(context_tokens)
    return weights


class _Loader:
    """Walks a rank's slice once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: RankShard,
        weights: Weights,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._spec, self._shard = checkpoint, checkpoint.spec, shard
        self._weights, self._on_progress = weights, on_progress
        self._parts = slices_of(checkpoint.spec, shard)
        self._arena = Arena()
        self._next_expert = len(shard.layers) * t.MATRICES_A_LAYER + t.ENDS
        self._done_bytes = 0
        self._total_bytes = sum(self._size_bytes(name) for name in self._parts)

    def load(self, context_tokens: int) -> None:
        weights, spec, shard = self._weights, self._spec, self._shard
        self._describe()
        ropes: dict[RopeSpec, int] = {}
        self._on_progress(0, self._total_bytes)
        for row, layer in enumerate(shard.layers):
            rope = spec.rope_of(layer)
            if rope not in ropes:
                weights.positions.append(rope_table(rope, context_tokens).reshape(-1))
                ropes[rope] = weights.positions[-1].ctypes.data
            weights.layers[row, t.ROPE] = ropes[rope]
            weights.layers[row, t.WINDOW] = spec.windows[layer] or 0
            self._layer(row, f"layers.{layer}.", spec.is_sparse(layer))
        self._ends()
        self._checkpoint.release()
        assert not self._parts, f"not read: {sorted(self._parts)}"

    def _describe(self) -> None:
        spec, shard = self._spec, self._shard
        dims, reals = self._weights.dims, self._weights.reals
        dims[t.HIDDEN], dims[t.HEAD_DIM] = spec.hidden_size, spec.head_dim
        dims[t.NUM_KV_HEADS], dims[t.NUM_HEADS] = len(shard.kv_heads), len(shard.query_heads)
        dims[t.NUM_LAYERS], dims[t.ROPE_DIM] = len(shard.layers), spec.rope.dim
        dims[t.USES_GELU] = spec.activation == "gelu_tanh"
        dims[t.IS_FIRST], dims[t.IS_LAST] = shard.is_first(), shard.is_last()
        dims[t.EMBEDDING_START] = shard.embedding.start
        dims[t.EMBEDDING_STOP] = shard.embedding.stop
        reals[t.EPS], reals[t.EMBEDDING_SCALE] = spec.norm_eps, spec.embedding_scale
        reals[t.ATTENTION_SCALE] = spec.attention_scale
        reals[t.ATTENTION_SOFTCAP] = spec.attention_softcap or 0
        if spec.experts is not None:
            describe_experts(dims, reals, spec.experts, shard.experts)
            dims[t.EXPERTS_FUNCTION] = experts_function()

    def _ends(self) -> None:
        spec, shard = self._spec, self._shard
        ends = self._weights.matrices[len(shard.layers) * t.MATRICES_A_LAYER :]
        last, tied = shard.is_last(), spec.tied_embeddings
        if last:
            self._weights.dims[t.FINAL_NORM] = self._norm("norm.weight")
        if last and not tied:
            ends[t.OUTPUT] = self._matrix("lm_head")
        both = shard.is_first() and last and tied
        if both and shard.embedding != shard.vocab:
            # either use has rows of its own; what both have is kept twice
            columns = self._parts[EMBEDDING][1]
            ends[t.EMBEDDING] = self._pack(EMBEDDING, _rows(shard.embedding), columns)
            ends[t.OUTPUT] = self._matrix("embed_tokens", _rows(shard.vocab))
        elif both:
            ends[t.EMBEDDING] = ends[t.OUTPUT] = self._matrix("embed_tokens")
        elif shard.is_first():
            ends[t.EMBEDDING] = self._matrix("embed_tokens")
        elif last and tied:
            ends[t.OUTPUT] = self._matrix("embed_tokens")

    def _layer(self, row: int, prefix: str, sparse: bool) -> None:
        spec, info = self._spec, self._weights.layers[row]
        mine = self._weights.matrices[row * t.MATRICES_A_LAYER :]
        for role, name in _ATTENTION.items():
            mine[role] = self._matrix(f"{prefix}self_attn.{name}")
        if sparse:
            self._experts(row, f"{prefix}mlp.")
        else:
            for role, name in _MLP.items():
                mine[role] = self._matrix(f"{prefix}mlp.{name}")
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

    def _experts(self, row: int, prefix: str) -> None:
        assert self._spec.experts is not None
        matrices, info = self._weights.matrices, self._weights.layers[row]
        mine = matrices[row * t.MATRICES_A_LAYER :]
        mine[t.ROUTER] = self._matrix(f"{prefix}gate")
        if self._spec.experts.score_bias:
            info[t.SCORE_BIAS] = self._vector(f"{prefix}gate.e_score_correction_bias")
        if self._spec.experts.num_shared:
            for role, name in _MLP.items():
                mine[role] = self._matrix(f"{prefix}shared_experts.{name}")
        info[t.EXPERTS] = self._next_expert
        for number in self._shard.experts:
            for role, name in enumerate(_MLP.values()):
                entry = self._matrix(f"{prefix}experts.{number}.{name}")
                matrices[self._next_expert + role] = entry
            self._next_expert += t.MATRICES_AN_EXPERT

    def _matrix(self, name: str, rows: slice | None = None) -> tuple[int, ...]:
        """A matrix with its bias, by the plan's slices; ``rows`` narrows them."""
        size_bytes = self._size_bytes(f"{name}.weight")
        kept, columns = self._parts.pop(f"{name}.weight")
        entry = self._pack(f"{name}.weight", kept if rows is None else rows, columns)
        self._progress(size_bytes)
        bias = 0
        if f"{name}.bias" in self._parts:  # a bias of a sum: on one rank alone
            bias = self._vector(f"{name}.bias")
        return (*entry[: t.BIAS], bias, *entry[t.BIAS + 1 :])

    def _pack(self, name: str, rows: slice, columns: slice) -> tuple[int, ...]:
        weight = self._checkpoint.tensor(name)
        packed = pack(weight, rows, columns, arena=self._arena)
        self._weights.packed.append(packed)
        function = tile_function(packed.kind)
        return (packed.address, packed.kind, packed.tiles, packed.groups, 0, function)

    def _norm(self, name: str) -> int:
        return self._vector(name, self._spec.norm_offset)

    def _vector(self, name: str, offset: float = 0.0) -> int:
        """Address of a bias or a norm's weights."""
        size_bytes = self._size_bytes(name)
        (kept,) = self._parts.pop(name)
        values = vector(self._checkpoint.tensor(name).dequantize(kept) + np.float32(offset))
        self._weights.vectors.append(values)
        self._progress(size_bytes)
        return values.ctypes.data

    def _size_bytes(self, name: str) -> int:
        """Bytes of the file that belong to the slice of a tensor."""
        weight = self._checkpoint.tensor(name)
        size = weight.size_bytes
        for part, full in zip(self._parts[name], weight.shape, strict=True):
            size = size * (part.stop - part.start) // full
        return size

    def _progress(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._on_progress(self._done_bytes, self._total_bytes)


def _rows(kept: range) -> slice:
    return slice(kept.start, kept.stop)


def describe_experts(dims: Longs, reals: Floats, experts: ExpertSpec, here: range) -> None:
    """Write the rule of choice, and which experts are here, into the tables."""
    dims[t.NUM_EXPERTS], dims[t.NUM_ACTIVE] = experts.num_experts, experts.num_active
    dims[t.FIRST_EXPERT], dims[t.NUM_EXPERTS_HERE] = here.start, len(here)
    dims[t.USES_SIGMOID] = experts.scoring == "sigmoid"
    dims[t.NORMALIZES] = experts.normalize
    dims[t.NUM_GROUPS] = experts.num_groups
    dims[t.NUM_ACTIVE_GROUPS] = experts.num_active_groups
    dims[t.ADDS_TWO_BEST] = experts.group_score == "top2_sum"
    reals[t.EXPERT_SCALE] = experts.scale


def rope_table(rope: RopeSpec, context_tokens: int) -> Floats:
    """Cosines and sines: float32 (context, 2, dim / 2)."""
    frequencies, factor = inverse_frequencies(rope)
    angles = np.arange(context_tokens, dtype=np.float32)[:, None] * frequencies[None, :]
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.float32(factor)
    return np.ascontiguousarray(table, dtype=np.float32)
