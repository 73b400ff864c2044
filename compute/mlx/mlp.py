"""Feed-forward halves: one gated MLP, or routed experts.

Shape letters: N positions, D hidden, F inner features, X experts, A experts that a position uses,
G groups of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from compute.mlx.matrix import Linear, Matrix
from models.spec import Activation, ExpertSpec


class FeedForward(Protocol):
    """What a layer does behind its attention."""

    def __call__(self, n_ND: mx.array) -> mx.array:
        """This rank's share of the sum, (N, D), of normed residuals."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatedMlp:
    """``down(activation(gate(x)) * up(x))``, of this rank's inner features."""

    activation: Activation
    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, n_ND: mx.array) -> mx.array:
        """See :class:`FeedForward`."""
        return self.down(gated(self.gate(n_ND), self.up(n_ND), self.activation))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedExperts:
    """Experts that are here, or this rank's inner features of all of them.

    Attributes:
        here: numbers of the experts that the stacks hold.
        router: float32 (X, D), over all experts.
        bias: float32 (X,), of the choice alone, or None.
        gate, up, down: stacks over ``here``.
        shared: the MLP that every position uses, or None.
    """

    spec: ExpertSpec
    activation: Activation
    here: range
    router: mx.array
    bias: mx.array | None
    gate: Matrix
    up: Matrix
    down: Matrix
    shared: GatedMlp | None

    def __call__(self, n_ND: mx.array) -> mx.array:
        """See :class:`FeedForward`; the router sees float32."""
        logits_NX = n_ND.astype(mx.float32) @ self.router.T
        experts_NA, weights_NA = route(logits_NX, self.bias, self.spec)
        if len(self.here) < self.spec.num_experts:  # what is elsewhere counts nothing here
            local = experts_NA - self.here.start
            inside = (local >= 0) & (local < len(self.here))
            experts_NA = mx.where(inside, local, 0)
            weights_NA = mx.where(inside, weights_NA, 0)
        experts_NA = experts_NA.astype(mx.uint32)
        x_N1D = n_ND[:, None]
        gate_NAF = self.gate.by_expert(x_N1D, experts_NA)
        inner_NAF = gated(gate_NAF, self.up.by_expert(x_N1D, experts_NA), self.activation)
        out_NAD = self.down.by_expert(inner_NAF, experts_NA).astype(mx.float32)
        out_ND = (out_NAD * weights_NA[..., None]).sum(axis=1)
        return out_ND if self.shared is None else out_ND + self.shared(n_ND)


def gated(gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
    """``activation(gate) * up``, the activation in float32."""
    wide = gate.astype(mx.float32)
    if activation == "silu":
        wide = wide * mx.sigmoid(wide)
    else:
        bent = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
        wide = 0.5 * wide * (1 + mx.tanh(bent))
    return wide.astype(up.dtype) * up


def route(
    logits_NX: mx.array, bias_X: mx.array | None, spec: ExpertSpec
) -> tuple[mx.array, mx.array]:
    """Which experts each position uses, and how much of each.

    Args:
        logits_NX: float32.
        bias_X: added to scores for the choice, not for the weights.

    Returns:
        Numbers and float32 weights, (N, A) each.

    Source: Mixtral; DeepSeek-V2 (device-limited routing) and V3 (bias, sum of the best two).
    """
    sigmoid = spec.scoring == "sigmoid"
    scores = mx.sigmoid(logits_NX) if sigmoid else mx.softmax(logits_NX, axis=-1, precise=True)
    choice = scores if bias_X is None else scores + bias_X
    if spec.num_active_groups < spec.num_groups:
        by_group = choice.reshape(choice.shape[0], spec.num_groups, -1)
        if spec.group_score == "max":
            group_NG = by_group.max(axis=-1)
        else:
            group_NG = mx.topk(by_group, min(2, by_group.shape[-1]), axis=-1).sum(axis=-1)
        worst = mx.argpartition(-group_NG, spec.num_active_groups - 1, axis=-1)
        worst = worst[:, spec.num_active_groups :, None]
        fill = mx.array(-mx.inf, mx.float32)
        choice = mx.put_along_axis(by_group, worst, fill, axis=1).reshape(choice.shape)
    best = mx.argpartition(-choice, spec.num_active - 1, axis=-1)[:, : spec.num_active]
    weights = mx.take_along_axis(scores, best, axis=-1)
    if spec.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return best, weights * spec.scale
