"""One rank on MLX: its weights, its key/value memory, and a step over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

import mlx.core as mx
import numpy as np

from compute.errors import OutOfMemory
from compute.mlx.cache import Cache
from compute.mlx.exchange import gathered, summed
from compute.mlx.step import Step
from compute.mlx.weights import Layer, Weights, load_weights
from compute.stage import FloatArray, Peers, Progress, Row
from models.checkpoint import Checkpoint
from models.footprint import passing_bytes
from models.sharding import RankShard
from models.spec import ModelSpec


class MlxStage:
    """A :class:`compute.stage.Stage` made of MLX operations.

    The residual, norms, rotation, softmax of routers and all sums between ranks are float32; the
    projections and the key/value memory have the type of ``activation_type``. Positions of all
    rows go through a projection together, so that a token's last bits may depend on the batch.
    """

    device: Final = "mlx:0"
    kernels: Final = "mlx"

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        weights: Weights,
        *,
        context_tokens: int,
        num_slots: int,
        dtype: mx.Dtype,
    ) -> None:
        self.spec, self.shard = spec, shard
        self.context_tokens, self.num_slots = context_tokens, num_slots
        self._weights, self._dtype = weights, dtype
        latent = spec.latent
        self._cache = Cache(
            num_layers=len(shard.layers),
            num_heads=len(shard.kv_heads) if latent is None else 1,
            widths=(spec.head_dim,) * 2 if latent is None else (latent.kv_rank + latent.rope_dim,),
            context_tokens=context_tokens,
            num_slots=num_slots,
            dtype=dtype,
        )
        self.weights_bytes: int = weights.num_bytes
        self.num_sequences, self.num_pages = self._cache.num_sequences, self._cache.num_pages
        self.kv_bytes: int = self._cache.full_bytes
        self.workspace_bytes: int = passing_bytes(
            spec, shard, context_tokens, num_slots, fused=False
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        shard: RankShard,
        *,
        context_tokens: int,
        num_slots: int,
        on_progress: Progress,
        dtype: mx.Dtype | None = None,
    ) -> MlxStage:
        """Load one rank's slice; see :func:`compute.stage.load_stage`.

        Args:
            dtype: of projections and key/value memory; None takes ``activation_type``.

        Raises:
            CorruptModel, OutOfMemory.
        """
        dtype = dtype or activation_type(checkpoint)
        with _memory("weights"):
            weights = load_weights(checkpoint, shard, dtype=dtype, on_progress=on_progress)
        with _memory("keys and values"):
            stage = cls(
                checkpoint.spec,
                shard,
                weights,
                context_tokens=context_tokens,
                num_slots=num_slots,
                dtype=dtype,
            )
        mx.set_cache_limit(stage.workspace_bytes)  # freed buffers that MLX keeps
        return stage

    def run(
        self, rows: Sequence[Row], incoming: FloatArray | None, peers: Peers | None
    ) -> FloatArray:
        """See :meth:`compute.stage.Stage.run`."""
        with _memory("a step"):
            step = Step(rows)
            self._cache.begin(rows)
            if self.shard.is_first():
                x_ND = self._embed(step, peers)
            else:
                assert incoming is not None
                x_ND = mx.array(incoming)
            for layer in self._weights.layers:
                x_ND = self._layer(layer, x_ND, step, peers)
            out = self._output(x_ND, step, peers) if self.shard.is_last() else x_ND
            mx.eval(out, *self._cache.arrays())
            return np.array(out, dtype=np.float32)

    def close(self) -> None:
        """Free the memory."""
        del self._weights, self._cache
        mx.clear_cache()

    def _embed(self, step: Step, peers: Peers | None) -> mx.array:
        embedding, kept = self._weights.embedding, self.shard.embedding
        assert embedding is not None
        ids = step.ids() - kept.start
        inside = (ids >= 0) & (ids < len(kept))
        x_ND = embedding.rows(mx.array(np.where(inside, ids, 0).astype(np.uint32)))
        if self.spec.embedding_scale != 1.0:
            # the factor is rounded to the weights' type, as the models were trained
            x_ND = x_ND * mx.array(self.spec.embedding_scale, self._dtype)
        x_ND = x_ND.astype(mx.float32)
        if len(kept) == self.spec.vocab_size:
            return x_ND
        return summed(peers, mx.where(mx.array(inside)[:, None], x_ND, mx.array(0.0)))

    def _layer(self, layer: Layer, x_ND: mx.array, step: Step, peers: Peers | None) -> mx.array:
        n_ND = self._norm(x_ND, layer.attention_norm).astype(self._dtype)
        whole = summed(peers, layer.attention(n_ND, step, self._cache))
        if layer.attention_post_norm is not None:
            whole = self._norm(whole, layer.attention_post_norm)
        x_ND = x_ND + whole
        n_ND = self._norm(x_ND, layer.mlp_norm).astype(self._dtype)
        whole = summed(peers, layer.mlp(n_ND))
        if layer.mlp_post_norm is not None:
            whole = self._norm(whole, layer.mlp_post_norm)
        return x_ND + whole

    def _output(self, x_ND: mx.array, step: Step, peers: Peers | None) -> mx.array:
        """Float32 logits (rows that want them, vocab)."""
        norm, output, ends = self._weights.final_norm, self._weights.output, step.ends()
        assert norm is not None
        assert output is not None
        if not ends:  # the layers ran all the same, for the sake of keys and values
            mx.eval(x_ND)
            return mx.zeros((0, self.spec.vocab_size))
        n_BD = self._norm(x_ND[mx.array(ends)], norm).astype(self._dtype)
        logits = gathered(peers, output.multiply(n_BD))
        cap = self.spec.logit_softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, self.spec.norm_eps)


def activation_type(checkpoint: Checkpoint) -> mx.Dtype:
    """Type of projections and key/value memory.

    float32 on a CPU, where nothing narrower is faster. On a GPU what most of the file is made for:
    float32 or bfloat16 as stored; float16 for half precision and for quantised blocks, whose
    scales are halves, so that they stay exact. Models that norm the outputs of their halves do so
    because these are large, beyond the range of float16: they get bfloat16.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    sizes: dict[str, int] = {}
    for name in checkpoint.names():
        weight = checkpoint.tensor(name)
        sizes[weight.kind] = sizes.get(weight.kind, 0) + weight.size_bytes
    most = max(sizes, key=lambda kind: sizes[kind])
    if most == "F32":
        return mx.float32
    if most in ("BF16", "F8_E4M3") or checkpoint.spec.post_norms:
        return mx.bfloat16
    return mx.float16


@contextlib.contextmanager
def _memory(what: str) -> Iterator[None]:
    """MLX says no with a RuntimeError. Raises OutOfMemory."""
    try:
        yield
    except RuntimeError as exc:
        if "allocate" not in str(exc):
            raise
        size = [int(word) for word in str(exc).split() if word.isdecimal()]
        raise OutOfMemory(f"{what} on MLX", size[0] if size else 0) from exc
