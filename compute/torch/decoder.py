"""The decoder in torch: one shard as half layers, with everything families differ in as data.

Shape letters: B sequences, L new positions, S positions seen, D hidden, H heads, K key/value
heads, F inner features of the MLP, E features of a head. A half returns its share of a sum; the
residual is added outside, so that an all-reduce can stand between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.shard import Shard
from compute.torch.weights import LayerWeights, Linear, TorchWeights
from models.spec import ModelSpec


class TorchCache:
    """Keys and values of every slot, contiguous: (layers, slots, K, context, E)."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        *,
        context_tokens: int,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads = len(shard.kv_heads)
        shape = (len(shard.layers), num_slots, heads, context_tokens, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all keys and values."""
        return int(2 * self.keys.numel() * self.keys.element_size())


class Decoder:
    """One shard of a model on one device."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: TorchWeights, cache: TorchCache
    ) -> None:
        self.spec, self.shard, self.weights, self.cache = spec, shard, weights, cache

    def embed(self, ids_L: Tensor) -> Tensor:
        """Residual of new tokens: (L, D)."""
        x_LD = F.embedding(ids_L, self.weights.embedding)
        if self.spec.embedding_scale != 1.0:
            # the factor is rounded to the weights' type, as the models were trained
            x_LD = x_LD * torch.tensor(
                self.spec.embedding_scale, dtype=x_LD.dtype, device=x_LD.device
            )
        return x_LD

    def attention_half(self, index: int, x_LD: Tensor, slot: int, start: int) -> Tensor:
        """Attention of new positions of one slot: this shard's share, (L, D).

        Args:
            index: layer, counted within the shard.
            x_LD: the residual.
            slot: whose cache is read and written.
            start: position of the first of ``x_LD``.
        """
        spec, layer = self.spec, self.weights.layers[index]
        length, size = x_LD.shape[0], spec.head_dim
        n_LD = self._norm(x_LD, layer.attention_norm)
        q_HLE = _linear(n_LD, layer.q).view(length, -1, size).transpose(0, 1)
        k_KLE = _linear(n_LD, layer.k).view(length, -1, size).transpose(0, 1)
        v_KLE = _linear(n_LD, layer.v).view(length, -1, size).transpose(0, 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_HLE, k_KLE = self._norm(q_HLE, layer.q_norm), self._norm(k_KLE, layer.k_norm)
        cosines, sines = (table[start : start + length] for table in layer.rope)
        q_HLE, k_KLE = rotate(q_HLE, cosines, sines), rotate(k_KLE, cosines, sines)
        stop = start + length
        self.cache.keys[index, slot, :, start:stop] = k_KLE
        self.cache.values[index, slot, :, start:stop] = v_KLE
        window = spec.windows[self.shard.layers[index]]
        first = 0 if window is None else max(0, start - window + 1)
        mixed_HLE = self._attend(
            q_HLE,
            self.cache.keys[index, slot, :, first:stop],
            self.cache.values[index, slot, :, first:stop],
            start - first,
            window,
        )
        return _linear(mixed_HLE.transpose(0, 1).reshape(length, -1), layer.o)

    def mlp_half(self, index: int, x_LD: Tensor) -> Tensor:
        """The MLP of a layer: this shard's share, (L, D)."""
        layer = self.weights.layers[index]
        n_LD = self._norm(x_LD, layer.mlp_norm)
        gate_LF = _linear(n_LD, layer.gate)
        if self.spec.activation == "silu":
            gate_LF = F.silu(gate_LF)
        else:
            gate_LF = F.gelu(gate_LF, approximate="tanh")
        return _linear(gate_LF * _linear(n_LD, layer.up), layer.down)

    def add(self, x_LD: Tensor, whole_LD: Tensor, post_norm_D: Tensor | None) -> Tensor:
        """The residual after a half whose shares have been summed."""
        if post_norm_D is not None:
            whole_LD = self._norm(whole_LD, post_norm_D)
        return x_LD + whole_LD

    def layer(self, index: int, x_LD: Tensor, slot: int, start: int) -> Tensor:
        """Both halves of a layer, where this rank holds all of it."""
        weights: LayerWeights = self.weights.layers[index]
        x_LD = self.add(
            x_LD, self.attention_half(index, x_LD, slot, start), weights.attention_post_norm
        )
        return self.add(x_LD, self.mlp_half(index, x_LD), weights.mlp_post_norm)

    def output(self, x_BD: Tensor) -> Tensor:
        """Float32 logits (B, vocab) of residual rows."""
        logits = F.linear(self._norm(x_BD, self.weights.final_norm), self.weights.output).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dim in float32; ``weight`` holds the spec's offset already."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        return (wide * scale * weight).to(x.dtype)

    def _attend(
        self, q_HLE: Tensor, k_KSE: Tensor, v_KSE: Tensor, offset: int, window: int | None
    ) -> Tensor:
        """Attention of L queries, the first of which is position ``offset`` of the S keys."""
        length, seen = q_HLE.shape[1], k_KSE.shape[1]
        scale, cap = self.spec.attention_scale, self.spec.attention_softcap
        mask_LS = None
        if length > 1 or window is not None:
            query_L1 = torch.arange(offset, offset + length, device=q_HLE.device)[:, None]
            key_S = torch.arange(seen, device=q_HLE.device)
            mask_LS = key_S <= query_L1
            if window is not None:
                mask_LS &= key_S > query_L1 - window
        if cap is None:
            return F.scaled_dot_product_attention(
                q_HLE[None],
                k_KSE[None],
                v_KSE[None],
                attn_mask=mask_LS,
                scale=scale,
                enable_gqa=q_HLE.shape[0] != k_KSE.shape[0],
            )[0]
        repeats = q_HLE.shape[0] // k_KSE.shape[0]
        scores = (q_HLE @ k_KSE.repeat_interleave(repeats, 0).transpose(1, 2)).float() * scale
        scores = torch.tanh(scores / cap) * cap
        if mask_LS is not None:
            scores = scores.masked_fill(~mask_LS, float("-inf"))
        return scores.softmax(-1).to(v_KSE.dtype) @ v_KSE.repeat_interleave(repeats, 0)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of the first ``2 * cosines.shape[-1]`` features of each head.

    Args:
        x: (heads, L, E).
        cosines, sines: float32 (L, half of the rotated features).

    Source: Su et al. 2021; feature i is paired with i + dim / 2.
    """
    pairs = cosines.shape[-1]
    a, b, rest = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float(), x[..., 2 * pairs :]
    turned = torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)
