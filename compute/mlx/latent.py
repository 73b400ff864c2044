"""Multi-head latent attention (DeepSeek V2 and V3), on the latent vectors themselves.

Only a latent vector and one rotated key part are remembered of a position. The projection from
latent to keys is applied to the queries instead, and the one to values after the mix: then all
heads share one "key" (latent and rotated part) and one "value" (latent).

Shape letters: N positions of all rows, D hidden, H heads, C latent features, R rotated ones.

Source: DeepSeek-V2 (2024), section 2.1; the absorbed form is that of its appendix.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from compute.mlx.cache import Cache
from compute.mlx.matrix import Linear
from compute.mlx.step import Step, attend
from models.spec import LatentSpec, ModelSpec, RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentAttention:
    """A rank's heads of one layer.

    Attributes:
        index: of the layer within the rank.
        q: from the residual to queries, or None where ``q_a``, ``q_a_norm`` and ``q_b`` do it.
        kv_a: from the residual to latent and rotated key part.
        to_keys: (H, nope, C), from ``kv_b_proj``; ``to_values``: (H, C, features of a value).
    """

    spec: ModelSpec
    latent: LatentSpec
    index: int
    rope: RopeSpec
    q: Linear | None
    q_a: Linear | None
    q_a_norm: mx.array | None
    q_b: Linear | None
    kv_a: Linear
    kv_a_norm: mx.array
    to_keys: mx.array
    to_values: mx.array
    o: Linear

    def __call__(self, n_ND: mx.array, step: Step, cache: Cache) -> mx.array:
        """This rank's share of the sum, (N, D), of normed residuals."""
        spec, latent, dtype = self.spec, self.latent, n_ND.dtype
        q = self._queries(n_ND).reshape(n_ND.shape[0], -1, spec.head_dim)
        turned = step.rotated(q[..., latent.nope_dim :], self.rope).astype(dtype)
        seeking_HNC = q[..., : latent.nope_dim].swapaxes(0, 1) @ self.to_keys
        q_HN = mx.concatenate([seeking_HNC, turned.swapaxes(0, 1)], axis=-1)
        joined = self.kv_a(n_ND)
        c_NC = self._normed(joined[:, : latent.kv_rank], self.kv_a_norm)
        shared = step.rotated(joined[:, None, latent.kv_rank :], self.rope)[:, 0]
        known = mx.concatenate([c_NC, shared], axis=-1)
        cache.put(self.index, (known[None, None],))
        mixed = []
        for row, span in step.spans():
            (keys,) = cache.seen(self.index, row, 0)
            out = attend(
                q_HN[:, span][None].astype(keys.dtype),
                keys,
                keys[..., : latent.kv_rank],
                scale=spec.attention_scale,
                softcap=spec.attention_softcap,
                mask=step.mask(row, None),
            )
            values = out[0].astype(dtype) @ self.to_values
            mixed.append(values.swapaxes(0, 1).reshape(len(row.ids), -1))
        return self.o(mixed[0] if len(mixed) == 1 else mx.concatenate(mixed))

    def _queries(self, n_ND: mx.array) -> mx.array:
        if self.q is not None:
            return self.q(n_ND)
        assert self.q_a is not None
        assert self.q_b is not None
        assert self.q_a_norm is not None
        return self.q_b(self._normed(self.q_a(n_ND), self.q_a_norm).astype(n_ND.dtype))

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.spec.norm_eps)
