"""Reads one rank's slice of a checkpoint into torch tensors on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from compute.torch.linear import Linear
from models.checkpoint import Checkpoint
from models.layout import EMBEDDING
from models.plans import slices_of
from models.sharding import RankShard

HALVES: Final = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """Ordinary attention: queries, keys and values of this rank's heads in one projection."""

    qkv: Linear
    output: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentWeights:
    """Latent attention.

    Attributes:
        q_down, q_down_norm: to the query's own latent; None where queries take one step.
        query: to the queries of this rank's heads.
        down, down_norm: to the latent vector and the rotated key part, whole on every rank.
        up: (heads, nope + value, latent), from the latent vector to keys and values.
        output: of this rank's heads.
    """

    q_down: Linear | None
    q_down_norm: Tensor | None
    query: Linear
    down: Linear
    down_norm: Tensor
    up: Tensor
    output: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """This rank's inner features: gate over up in one projection, and down."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Experts of a layer.

    Attributes:
        router: float32 (all experts, hidden).
        score_bias: float32 (all experts,), or None.
        gate_up, down: (experts here, 2 * inner, hidden) and (experts here, hidden, inner).
        shared: the MLP that is always active, or None.
    """

    router: Linear
    score_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    shared: MlpWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's part of a rank; norms are float32 with the spec's offset added."""

    attention: HeadWeights | LatentWeights
    mlp: MlpWeights | ExpertWeights
    attention_norm: Tensor
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp_post_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchWeights:
    """All of a rank.

    Attributes:
        embedding: rows ``shard.embedding``; None behind the first stage.
        final_norm, output: rows ``shard.vocab``; None before the last stage.
    """

    embedding: Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor | None
    output: Linear | None
    memory_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    shard: RankShard,
    *,
    device: torch.device,
    compute: torch.dtype,
    storage: torch.dtype | None,
    on_progress: Callable[[int, int], None],
) -> TorchWeights:
    """Read what the shard's plan names, some rows of one tensor at a time, and nothing else.

    Args:
        compute: of activations; biases are kept so.
        storage: of matrices; None keeps those stored in 16 bits as they are, the others in
            ``compute``.
        on_progress: told ``(done, total)`` bytes of the slice as stored.
    """
    return _Loader(checkpoint, shard, device, compute, storage, on_progress).all()


class _Loader:
    """Walks a slice once and counts the bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: RankShard,
        device: torch.device,
        compute: torch.dtype,
        storage: torch.dtype | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint, self._spec, self._shard = checkpoint, checkpoint.spec, shard
        self._device, self._compute, self._storage = device, compute, storage
        self._on_progress = on_progress
        self._slices = slices_of(checkpoint.spec, shard)
        self._done_bytes, self._memory_bytes = 0, 0
        self._total_bytes = sum(self._stored_bytes(name) for name in self._slices)
        on_progress(0, self._total_bytes)

    def all(self) -> TorchWeights:
        shard = self._shard
        layers = tuple(self._layer(f"layers.{layer}") for layer in shard.layers)
        embedding, output = None, None
        if EMBEDDING in self._slices:
            start, table = self._slices[EMBEDDING][0].start, self._matrix(EMBEDDING)
            if shard.is_first():
                embedding = _rows(table, shard.embedding, start)
            if shard.is_last() and self._spec.tied_embeddings:
                output = Linear(_rows(table, shard.vocab, start))
        if "lm_head.weight" in self._slices:
            output = Linear(self._matrix("lm_head.weight"))
        return TorchWeights(
            embedding=embedding,
            layers=layers,
            final_norm=self._norm("norm") if shard.is_last() else None,
            output=output,
            memory_bytes=self._memory_bytes,
        )

    def _layer(self, at: str) -> LayerWeights:
        behind, post = "post_attention_layernorm", self._spec.post_norms
        return LayerWeights(
            attention=self._heads(f"{at}.self_attn")
            if self._spec.latent is None
            else self._latent(f"{at}.self_attn"),
            mlp=self._experts(f"{at}.mlp")
            if f"{at}.mlp.gate.weight" in self._slices
            else self._mlp(f"{at}.mlp"),
            attention_norm=self._norm(f"{at}.input_layernorm"),
            attention_post_norm=self._norm(f"{at}.{behind}") if post else None,
            mlp_norm=self._norm(f"{at}.{'pre_feedforward_layernorm' if post else behind}"),
            mlp_post_norm=self._norm(f"{at}.post_feedforward_layernorm") if post else None,
        )

    def _heads(self, at: str) -> HeadWeights:
        norms = self._spec.qk_norm
        return HeadWeights(
            qkv=self._linear(f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj"),
            output=self._linear(f"{at}.o_proj"),
            q_norm=self._norm(f"{at}.q_norm") if norms else None,
            k_norm=self._norm(f"{at}.k_norm") if norms else None,
        )

    def _latent(self, at: str) -> LatentWeights:
        latent = self._spec.latent
        assert latent is not None
        down = latent.q_rank is not None
        # taken apart by head and multiplied by head: kept in the type that multiplies
        up = self._matrix(f"{at}.kv_b_proj.weight", dtype=self._compute)
        return LatentWeights(
            q_down=self._linear(f"{at}.q_a_proj") if down else None,
            q_down_norm=self._norm(f"{at}.q_a_layernorm") if down else None,
            query=self._linear(f"{at}.q_b_proj" if down else f"{at}.q_proj"),
            down=self._linear(f"{at}.kv_a_proj_with_mqa"),
            down_norm=self._norm(f"{at}.kv_a_layernorm"),
            up=up.view(-1, latent.nope_dim + latent.v_dim, latent.kv_rank),
            output=self._linear(f"{at}.o_proj"),
        )

    def _mlp(self, at: str) -> MlpWeights:
        return MlpWeights(
            gate_up=self._linear(f"{at}.gate_proj", f"{at}.up_proj"),
            down=self._linear(f"{at}.down_proj"),
        )

    def _experts(self, at: str) -> ExpertWeights:
        bias, router = f"{at}.gate.e_score_correction_bias", f"{at}.gate.weight"
        each = [f"{at}.experts.{number}" for number in self._shard.experts]
        halves = [f"{name}.{part}_proj.weight" for name in each for part in ("gate", "up")]
        gate_up = self._matrix(*halves)
        down = self._matrix(*(f"{name}.down_proj.weight" for name in each))
        shared = f"{at}.shared_experts"
        return ExpertWeights(
            router=Linear(self._matrix(router, dtype=torch.float32)),
            score_bias=self._vector([bias]) if bias in self._slices else None,
            gate_up=gate_up.view(len(each), -1, self._spec.hidden_size),
            down=down.view(len(each), self._spec.hidden_size, -1),
            shared=self._mlp(shared) if f"{shared}.down_proj.weight" in self._slices else None,
        )

    def _linear(self, *modules: str) -> Linear:
        """One projection, or several of the same input behind each other."""
        biases = [name for module in modules if (name := f"{module}.bias") in self._slices]
        weight = self._matrix(*(f"{module}.weight" for module in modules))
        return Linear(weight, self._vector(biases).to(self._compute) if biases else None)

    def _norm(self, module: str) -> Tensor:
        """A norm's factor, with the spec's offset."""
        return self._vector([f"{module}.weight"]) + self._spec.norm_offset

    def _vector(self, names: Sequence[str]) -> Tensor:
        """Float32 vectors behind each other."""
        parts = []
        for name in names:
            weight = self._checkpoint.tensor(name)
            parts.append(torch.from_numpy(weight.dequantize(*self._slices[name])))
            self._read(name)
        whole = torch.cat(parts).to(self._device)
        self._memory_bytes += whole.nbytes
        return whole

    def _matrix(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        """The rank's part of one matrix, or of several above each other: (rows, columns)."""
        rows = [self._slices[name][0] for name in names]
        columns = self._slices[names[0]][1]
        height = sum(part.stop - part.start for part in rows)
        whole = torch.empty(
            (height, columns.stop - columns.start),
            dtype=dtype or self._kept_as(names),
            device=self._device,
        )
        at = 0
        for name, part in zip(names, rows, strict=True):
            weight = self._checkpoint.tensor(name)
            for some in weight.chunks(part):
                values = torch.from_numpy(weight.dequantize(some, columns))
                whole[at : at + len(values)].copy_(values)
                at += len(values)
            self._read(name)
        self._memory_bytes += whole.nbytes
        return whole

    def _kept_as(self, names: Sequence[str]) -> torch.dtype:
        if self._storage is not None:
            return self._storage
        kinds = {self._checkpoint.tensor(name).kind for name in names}
        return HALVES.get(kinds.pop(), self._compute) if len(kinds) == 1 else self._compute

    def _stored_bytes(self, name: str) -> int:
        weight = self._checkpoint.tensor(name)
        part = [kept.stop - kept.start for kept in self._slices[name]]
        return int(weight.size_bytes * (np.prod(part) / np.prod(weight.shape)))

    def _read(self, name: str) -> None:
        self._done_bytes += self._stored_bytes(name)
        self._on_progress(self._done_bytes, self._total_bytes)


def _rows(table: Tensor, kept: range, start: int) -> Tensor:
    return table[kept.start - start : kept.stop - start]
