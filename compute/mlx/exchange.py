"""Sums and gathers of tensor ranks, over a ring of MLX or over a group that carries host arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from compute.stage import Peers


def summed(peers: Peers | None, x: mx.array) -> mx.array:
    """The float32 sum of everybody's ``x``; itself where there is nobody. Raises PeerLost."""
    x = x.astype(mx.float32)
    if peers is None:
        return x
    if peers.group.backend == "mlx":
        total: mx.array = peers.sum(x)
        return total
    return mx.array(peers.sum(_host(x)))


def gathered(peers: Peers | None, part: mx.array) -> mx.array:
    """Everybody's columns side by side, float32. Raises PeerLost."""
    part = part.astype(mx.float32)
    if peers is None:
        return part
    if peers.group.backend == "mlx":
        return mx.concatenate(peers.gather(part), axis=1)
    return mx.concatenate([mx.array(other) for other in peers.gather(_host(part))], axis=1)


def _host(x: mx.array) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A copy that the group may change."""
    return np.array(x, dtype=np.float32, order="C")
