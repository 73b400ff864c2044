"""A rank's layers in torch: embedding, half layers and output, with a sum behind each of them.

Shape letters: N new positions of all rows, D hidden, B rows that want logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.torch import attention, latent
from compute.torch.attention import rms_norm, soft_cap
from compute.torch.cache import Cache
from compute.torch.mlp import experts, mlp
from compute.torch.step import Step
from compute.torch.weights import ExpertWeights, HeadWeights, LayerWeights, TorchWeights
from models.sharding import RankShard
from models.spec import ModelSpec

Sum = Callable[[Tensor], Tensor]


class Decoder:
    """One rank of a model on one device. The residual is float32, whatever multiplies."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        weights: TorchWeights,
        cache: Cache,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.shard, self.weights, self.cache = spec, shard, weights, cache
        self.dtype = dtype

    def embed(self, step: Step, total: Sum) -> Tensor:
        """Residual of new tokens (N, D), of a first stage; ``total`` adds the ranks' parts up."""
        table, spec, rows = self.weights.embedding, self.spec, self.shard.embedding
        assert table is not None
        if len(rows) == spec.vocab_size:
            x_ND = F.embedding(step.ids_N, table).float()
        else:
            ids_N = step.ids_N - rows.start
            here_N = (ids_N >= 0) & (ids_N < len(rows))
            x_ND = F.embedding(ids_N * here_N, table).float() * here_N[:, None]
            x_ND = total(x_ND)
        if spec.embedding_scale != 1.0:
            # the factor is rounded to the weights' type, as the models were trained
            x_ND = x_ND * torch.tensor(spec.embedding_scale, dtype=self.dtype).item()
        return x_ND

    def layer(self, index: int, x_ND: Tensor, step: Step, total: Sum) -> Tensor:
        """The residual behind a layer (counted within the rank)."""
        weights = self.weights.layers[index]
        share = total(self._attention(index, x_ND, step, weights).float())
        x_ND = self._add(x_ND, share, weights.attention_post_norm)
        share = total(self._mlp(x_ND, step, weights).float())
        return self._add(x_ND, share, weights.mlp_post_norm)

    def output(self, x_ND: Tensor, step: Step) -> Tensor:
        """Float32 logits (B, this rank's vocab) of the rows that want them, of a last stage."""
        weights = self.weights
        assert weights.output is not None
        assert weights.final_norm is not None
        n_BD = self._norm(x_ND[step.ends], weights.final_norm).to(self.dtype)
        logits = step.alone(len(n_BD)).linear(n_BD, weights.output).float()
        return soft_cap(logits, self.spec.logit_softcap)

    def _attention(self, index: int, x_ND: Tensor, step: Step, layer: LayerWeights) -> Tensor:
        n_ND = self._norm(x_ND, layer.attention_norm).to(self.dtype)
        own = layer.attention
        if isinstance(own, HeadWeights):
            return attention.attention(self.spec, self.shard, own, self.cache, index, n_ND, step)
        return latent.attention(self.spec, self.shard, own, self.cache, index, n_ND, step)

    def _mlp(self, x_ND: Tensor, step: Step, layer: LayerWeights) -> Tensor:
        n_ND = self._norm(x_ND, layer.mlp_norm)
        if isinstance(layer.mlp, ExpertWeights):
            return experts(self.spec, self.shard, layer.mlp, n_ND, step, self.dtype)
        return mlp(layer.mlp, self.spec.activation, n_ND.to(self.dtype), step.blocks)

    def _add(self, x_ND: Tensor, whole_ND: Tensor, post_norm_D: Tensor | None) -> Tensor:
        if post_norm_D is not None:
            whole_ND = self._norm(whole_ND, post_norm_D)
        return x_ND + whole_ND

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps)
