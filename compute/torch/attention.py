"""Ordinary attention: queries, keys and values by head, with everything families differ in.

Shape letters: N new positions of all rows, L of one row, S positions that it sees, H query heads,
K key/value heads, R queries of a key/value head, E features of a head, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.torch.cache import Cache
from compute.torch.step import Step
from compute.torch.weights import HeadWeights
from models.sharding import RankShard
from models.spec import ModelSpec


def attention(
    spec: ModelSpec,
    shard: RankShard,
    weights: HeadWeights,
    cache: Cache,
    index: int,
    n_ND: Tensor,
    step: Step,
) -> Tensor:
    """This rank's share of a layer's attention: (N, D), to be summed over the ranks.

    Args:
        index: of the layer, counted within the rank.
        n_ND: the normed residual.
    """
    layer, size = shard.layers[index], spec.head_dim
    queries, keys = len(shard.query_heads), len(shard.kv_heads)
    heads = step.blocks.linear(n_ND, weights.qkv).unflatten(-1, (queries + 2 * keys, size))
    q_NHE, k_NKE, v_NKE = heads.split([queries, keys, keys], dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q_NHE = rms_norm(q_NHE, weights.q_norm, spec.norm_eps).to(n_ND.dtype)
        k_NKE = rms_norm(k_NKE, weights.k_norm, spec.norm_eps).to(n_ND.dtype)
    turns = step.turns(spec.rope_of(layer))
    q_NHE, k_NKE = rotate(q_NHE, *turns), rotate(k_NKE, *turns)
    cache.put(index, k_NKE, v_NKE)
    mixed_NHE = torch.empty_like(q_NHE)
    window = spec.windows[layer]
    for span in step.spans:
        mixed_NHE[span.flat] = attend(
            q_NHE[span.flat],
            *cache.seen(index, span, window),
            step.mask(span, window),
            scale=spec.attention_scale,
            cap=spec.attention_softcap,
        )
    return step.blocks.linear(mixed_NHE.flatten(1), weights.output)


def attend(
    q_LHE: Tensor,
    k_KSE: Tensor,
    v_KSE: Tensor,
    mask_LS: Tensor | None,
    *,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Attention of one row's queries: (L, H, E)."""
    length, heads = q_LHE.shape[:2]
    repeats = heads // len(k_KSE)
    # The queries of a key/value head side by side, as if they were more positions of it.
    q = q_LHE.unflatten(1, (-1, repeats)).permute(1, 2, 0, 3).flatten(1, 2)
    mask = None if mask_LS is None else mask_LS.repeat(repeats, 1)
    if cap is None:
        mixed = F.scaled_dot_product_attention(
            q[None], k_KSE[None], v_KSE[None], attn_mask=mask, scale=scale
        )[0]
    else:
        scores = (q.float() @ k_KSE.float().transpose(1, 2)) * scale
        mixed = softmax(soft_cap(scores, cap), mask).to(v_KSE.dtype) @ v_KSE
    return mixed.unflatten(1, (repeats, length)).permute(2, 0, 1, 3).flatten(1, 2)


def softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Shares of what each query sees."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Squeeze values into ``-cap .. cap``."""
    return x if cap is None else torch.tanh(x / cap) * cap


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dim, in float32; ``weight`` holds the spec's offset already."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_NHE: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of the first ``2 * cosines.shape[-1]`` features of each head.

    Args:
        x_NHE: heads of some positions.
        cosines, sines: float32 (N, 1, half of the rotated features).

    Source: Su et al. 2021; feature i is paired with i + dim / 2.
    """
    pairs = cosines.shape[-1]
    a, b = x_NHE[..., :pairs].float(), x_NHE[..., pairs : 2 * pairs].float()
    turned = [a * cosines - b * sines, b * cosines + a * sines]
    rest = x_NHE[..., 2 * pairs :]
    return torch.cat([*(part.to(x_NHE.dtype) for part in turned), rest], -1)
