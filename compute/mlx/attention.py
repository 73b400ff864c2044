"""Ordinary attention: query heads in groups that share a key/value head.

Shape letters: N positions of all rows, L of one row, D hidden, H query heads, K key/value heads,
E features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from compute.mlx.cache import Cache
from compute.mlx.matrix import Linear
from compute.mlx.step import Step, attend, first_seen
from models.spec import ModelSpec, RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupedAttention:
    """A rank's heads of one layer.

    Attributes:
        index: of the layer within the rank.
        window: in tokens, or None.
        q_norm, k_norm: float32 (E,), or None.
    """

    spec: ModelSpec
    index: int
    window: int | None
    rope: RopeSpec
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: mx.array | None
    k_norm: mx.array | None

    def __call__(self, n_ND: mx.array, step: Step, cache: Cache) -> mx.array:
        """This rank's share of the sum, (N, D), of normed residuals."""
        spec, num = self.spec, n_ND.shape[0]
        q = self._turned(self.q(n_ND), self.q_norm, step)
        k = self._turned(self.k(n_ND), self.k_norm, step)
        v = self.v(n_ND).reshape(num, -1, spec.head_dim)
        cache.put(self.index, (_by_head(k), _by_head(v)))
        mixed = []
        for row, span in step.spans():
            keys, values = cache.seen(self.index, row, first_seen(row, self.window))
            out = attend(
                _by_head(q[span]).astype(keys.dtype),
                keys,
                values,
                scale=spec.attention_scale,
                softcap=spec.attention_softcap,
                mask=step.mask(row, self.window),
            )
            mixed.append(out[0].swapaxes(0, 1).reshape(len(row.ids), -1))
        whole = mixed[0] if len(mixed) == 1 else mx.concatenate(mixed)
        return self.o(whole.astype(n_ND.dtype))

    def _turned(self, x: mx.array, norm: mx.array | None, step: Step) -> mx.array:
        x_NHE = x.reshape(x.shape[0], -1, self.spec.head_dim)
        if norm is not None:
            x_NHE = mx.fast.rms_norm(x_NHE.astype(mx.float32), norm, self.spec.norm_eps)
        return step.rotated(x_NHE, self.rope)


def _by_head(x_LHE: mx.array) -> mx.array:
    """(1, H, L, E)."""
    return x_LHE.swapaxes(0, 1)[None]
