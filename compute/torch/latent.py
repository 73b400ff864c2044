"""Latent attention (DeepSeek): one latent vector of each position serves all heads.

Keys and values are never made: the up-projection is absorbed into the queries and into what is
mixed, so that attention works on the cache as it is (576 numbers a position for DeepSeek-V3 where
its heads' keys and values are 40,960). For a decoded token that is by far the least work. For
long rows making keys and values would take fewer multiplications (256 positions of V3's shape:
426 K instead of 557 K for each head and position seen), but they would have to be made anew for
every position seen: measured on a CPU it is 1.3 times as fast with 512 positions seen, and no
faster with 2048.

Shape letters: N new positions of all rows, L of one row, S positions that it sees, H heads,
C features of the latent vector, P rotated features, E features of a query, V of a value.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.torch.attention import rms_norm, rotate, soft_cap, softmax
from compute.torch.cache import Cache
from compute.torch.step import Step
from compute.torch.weights import LatentWeights
from models.sharding import RankShard
from models.spec import ModelSpec

SCORES: Final = 1 << 23  # numbers of one product of queries and keys: 32 MiB


def attention(
    spec: ModelSpec,
    shard: RankShard,
    weights: LatentWeights,
    cache: Cache,
    index: int,
    n_ND: Tensor,
    step: Step,
) -> Tensor:
    """This rank's share of a layer's attention: (N, D), to be summed over the ranks.

    Args:
        index: of the layer, counted within the rank.
        n_ND: the normed residual.

    Source: DeepSeek-V2 (2024), section 2.1 and appendix C.
    """
    latent, layer = spec.latent, shard.layers[index]
    assert latent is not None
    blocks, turns = step.blocks, step.turns(spec.rope_of(layer))
    x_ND = n_ND
    if weights.q_down is not None and weights.q_down_norm is not None:
        x_ND = blocks.linear(n_ND, weights.q_down)
        x_ND = rms_norm(x_ND, weights.q_down_norm, spec.norm_eps).to(n_ND.dtype)
    q_NHE = blocks.linear(x_ND, weights.query).unflatten(-1, (-1, spec.head_dim))
    both = blocks.linear(n_ND, weights.down)
    c_NC = rms_norm(both[:, : latent.kv_rank], weights.down_norm, spec.norm_eps).to(n_ND.dtype)
    shared_N1P = rotate(both[:, None, latent.kv_rank :], *turns)
    cache.put(index, torch.cat([c_NC[:, None], shared_N1P], -1))
    keys_HEC, values_HVC = weights.up.split([latent.nope_dim, latent.v_dim], dim=1)
    q_NHC = blocks.run(lambda part: _by_head(part, keys_HEC), q_NHE[..., : latent.nope_dim])
    q = torch.cat([q_NHC, rotate(q_NHE[..., latent.nope_dim :], *turns)], -1)
    mixed_NHC = torch.empty_like(q_NHC)
    window = spec.windows[layer]
    for span in step.spans:
        keys, _ = cache.seen(index, span, window)
        mixed_NHC[span.flat] = attend(
            q[span.flat],
            keys[0],
            latent.kv_rank,
            step.mask(span, window),
            scale=spec.attention_scale,
            cap=spec.attention_softcap,
        )
    up_HCV = values_HVC.transpose(1, 2)
    mixed_NHV = blocks.run(lambda part: _by_head(part, up_HCV), mixed_NHC)
    return blocks.linear(mixed_NHV.flatten(1), weights.output)


def attend(
    q_LHC: Tensor,
    seen_SC: Tensor,
    kv_rank: int,
    mask_LS: Tensor | None,
    *,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Attention of one row's absorbed queries in float32: latent vectors (L, H, C).

    Args:
        q_LHC: absorbed features, and behind them the rotated ones.
        seen_SC: the cache's part, of the same features.
        kv_rank: how many of them are the latent vector.
        mask_LS: what each position sees; None for all.
    """
    q, seen = q_LHC.float() * scale, seen_SC.float()
    # The fused attention of GPUs ends at 256 features; for one position it does not pay.
    if q.device.type == "cpu" and cap is None and mask_LS is not None:
        mixed = fused(q, seen, kv_rank, mask_LS)
    else:
        mixed = plain(q, seen, kv_rank, mask_LS, cap)
    return mixed.to(q_LHC.dtype)


def fused(q_LHC: Tensor, seen_SC: Tensor, kv_rank: int, mask_LS: Tensor) -> Tensor:
    """Scores are never all in memory: the keys serve as values, of which too many are mixed."""
    keys = seen_SC.expand(1, q_LHC.shape[1], -1, -1)
    mixed = F.scaled_dot_product_attention(
        q_LHC.transpose(0, 1)[None], keys, keys, attn_mask=mask_LS, scale=1.0
    )
    return mixed[0, ..., :kv_rank].transpose(0, 1)


def plain(
    q_LHC: Tensor,
    seen_SC: Tensor,
    kv_rank: int,
    mask_LS: Tensor | None,
    cap: float | None,
    most: int = SCORES,
) -> Tensor:
    """Two multiplications; queries are taken so few at a time that scores are ``most`` numbers."""
    heads, parts = q_LHC.shape[1], []
    room = max(1, most // (heads * len(seen_SC)))
    for start in range(0, len(q_LHC), room):
        q = q_LHC[start : start + room].flatten(0, 1)
        scores = soft_cap(q @ seen_SC.T, cap).unflatten(0, (-1, heads))
        mask = None if mask_LS is None else mask_LS[start : start + room, None]
        shares = softmax(scores, mask).flatten(0, 1)
        parts.append((shares @ seen_SC[:, :kv_rank]).unflatten(0, (-1, heads)))
    return torch.cat(parts)


def _by_head(x_NHA: Tensor, weights_HAB: Tensor) -> Tensor:
    """Every head's features through its own matrix: (N, H, B)."""
    return torch.bmm(x_NHA.transpose(0, 1), weights_HAB).transpose(0, 1)
