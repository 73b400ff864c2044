"""Latent attention (DeepSeek): one latent vector of each position serves all heads.

Keys and values are never made: the up-projection is absorbed into the queries and into what is
mixed, so that attention works on the cache as it is (576 numbers a position for DeepSeek-V3 where
its heads' keys and values are 40,960). For a decoded token that is by far the least work; for
long rows making keys and values would take fewer multiplications (at 256 positions of V3's
shape 426 K instead of 557 K for each head and position seen), but keeps them all in memory.

Shape letters: N new positions of all rows, L of one row, S positions that it sees, H heads,
C features of the latent vector, P rotated features, E features of a query, V of a value.
"""

from __future__ import annotations

from typing import Final

import torch
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
    cache.put(index, step, torch.cat([c_NC[:, None], shared_N1P], -1))
    keys_HEC, values_HVC = weights.up.split([latent.nope_dim, latent.v_dim], dim=1)
    q_NHC = blocks.run(lambda part: _by_head(part, keys_HEC), q_NHE[..., : latent.nope_dim])
    q = torch.cat([q_NHC, rotate(q_NHE[..., latent.nope_dim :], *turns)], -1)
    mixed_NHC = torch.empty_like(q_NHC)
    window = spec.windows[layer]
    for span in step.spans:
        seen = cache.keys[index, span.slot, 0, span.first(window) : span.stop]
        mixed_NHC[span.flat] = attend(
            q[span.flat],
            seen,
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
    most: int = SCORES,
) -> Tensor:
    """Attention of one row's absorbed queries in float32: latent vectors (L, H, C).

    Args:
        q_LHC: absorbed features, and behind them the rotated ones.
        seen_SC: the cache's part, of the same features.
        kv_rank: how many of them are the latent vector.
        mask_LS: what each position sees; None for all.
        most: queries are taken so few at a time that there are no more scores at once.
    """
    length, heads, _ = q_LHC.shape
    keys_CS = seen_SC.float().T
    values_SC = seen_SC[:, :kv_rank].float()
    parts = []
    room = max(1, most // (heads * len(seen_SC)))
    for start in range(0, length, room):
        q = q_LHC[start : start + room]
        scores = (q.float().flatten(0, 1) @ keys_CS).unflatten(0, (-1, heads)) * scale
        mask = None if mask_LS is None else mask_LS[start : start + room, None]
        shares = softmax(soft_cap(scores, cap), mask)
        parts.append((shares.flatten(0, 1) @ values_SC).unflatten(0, (-1, heads)))
    return torch.cat(parts).to(q_LHC.dtype)


def _by_head(x_NHA: Tensor, weights_HAB: Tensor) -> Tensor:
    """Every head's features through its own matrix: (N, H, B)."""
    return torch.bmm(x_NHA.transpose(0, 1), weights_HAB).transpose(0, 1)
