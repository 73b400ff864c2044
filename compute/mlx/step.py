"""One run of a stage, as its layers see it: positions, rotations and masks, made once for all.

Shape letters: N positions of all rows, L of one row, S positions seen, P rotated pairs, H heads,
E features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from compute.stage import Row
from models.rope import inverse_frequencies
from models.spec import RopeSpec


class Step:
    """What the rows of a run have in common.

    Attributes:
        rows: in order; their positions follow each other in all arrays.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self._angles: dict[RopeSpec, tuple[mx.array, mx.array]] = {}
        self._masks: dict[tuple[Row, int], mx.array] = {}

    def ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """New tokens, (N,)."""
        return np.array([token for row in self.rows for token in row.ids], dtype=np.int64)

    def spans(self) -> Iterator[tuple[Row, slice]]:
        """Each row and where its positions lie."""
        at = 0
        for row in self.rows:
            yield row, slice(at, at + len(row.ids))
            at += len(row.ids)

    def ends(self) -> list[int]:
        """Last position of each row whose logits are wanted."""
        return [span.stop - 1 for row, span in self.spans() if row.want_logits]

    def rotated(self, x_NHE: mx.array, rope: RopeSpec) -> mx.array:
        """Rotary embedding of the first ``rope.dim`` features of each head, float32.

        Source: Su et al. 2021; feature i is paired with i + dim / 2.
        """
        cosines, sines = self._tables(rope)
        pairs = rope.dim // 2
        x_NHE = x_NHE.astype(mx.float32)
        a, b = x_NHE[..., :pairs], x_NHE[..., pairs : 2 * pairs]
        turned = [a * cosines - b * sines, b * cosines + a * sines]
        if x_NHE.shape[-1] > 2 * pairs:
            turned.append(x_NHE[..., 2 * pairs :])
        return mx.concatenate(turned, axis=-1)

    def _tables(self, rope: RopeSpec) -> tuple[mx.array, mx.array]:
        """Cosines and sines (N, 1, P); of host floats, so that every device has the same."""
        if rope not in self._angles:
            frequencies, factor = inverse_frequencies(rope)
            positions = [
                np.arange(row.start, row.start + len(row.ids), dtype=np.float32)
                for row in self.rows
            ]
            angles = (np.concatenate(positions)[:, None] * frequencies)[:, None]
            scale = np.float32(factor)
            self._angles[rope] = (
                mx.array(np.cos(angles) * scale),
                mx.array(np.sin(angles) * scale),
            )
        return self._angles[rope]

    def mask(self, row: Row, window: int | None) -> mx.array | str | None:
        """Which keys, from ``first_seen`` on, each new position of a row attends to.

        Returns:
            None for all of them, ``"causal"``, or bool (L, S).
        """
        length, stop = len(row.ids), row.start + len(row.ids)
        if length == 1:
            return None
        if window is None or stop <= window:
            return "causal"
        if (row, window) not in self._masks:
            queries = np.arange(row.start, stop)[:, None]
            keys = np.arange(first_seen(row, window), stop)
            self._masks[row, window] = mx.array((keys <= queries) & (keys > queries - window))
        return self._masks[row, window]


def first_seen(row: Row, window: int | None) -> int:
    """First position that any new one of a row attends to."""
    return 0 if window is None else max(0, row.start - window + 1)


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    softcap: float | None,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention of one row.

    Args:
        q: (1, H, L, E).
        k, v: (1, K, S, E), of K key/value heads that serve H / K queries each.
        scale: of the products.
        softcap: ``cap * tanh(product / cap)`` where set.
        mask: see :meth:`Step.mask`.

    Returns:
        (1, H, L, features of a value).
    """
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    heads, length, seen = k.shape[1], q.shape[2], k.shape[2]
    grouped = q.reshape(1, heads, -1, length, q.shape[-1]).astype(mx.float32)
    scores = grouped @ k[:, :, None].swapaxes(-1, -2).astype(mx.float32) * scale
    scores = mx.tanh(scores / softcap) * softcap
    if isinstance(mask, str):
        mask = mx.arange(seen) <= mx.arange(seen - length, seen)[:, None]
    if mask is not None:
        scores = mx.where(mask, scores, mx.array(-mx.inf, mx.float32))
    mixed = mx.softmax(scores, axis=-1).astype(v.dtype) @ v[:, :, None]
    return mixed.reshape(1, q.shape[1], length, v.shape[-1])
