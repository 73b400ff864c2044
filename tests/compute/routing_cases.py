"""The rule that sends tokens to experts, written out, and cases that every engine must meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import ExpertSpec


def by_hand(
    logits: Sequence[float], experts: ExpertSpec, bias: Sequence[float] | None
) -> dict[int, float]:
    """Weights of the experts that one token goes to."""
    if experts.scoring == "softmax":
        powers = np.exp(np.array(logits, dtype=np.float64) - max(logits))
        scores = powers / powers.sum()
    else:
        scores = 1 / (1 + np.exp(-np.array(logits, dtype=np.float64)))
    choice = scores + (0 if bias is None else np.array(bias))
    size = experts.num_experts // experts.num_groups
    groups = [range(at, at + size) for at in range(0, experts.num_experts, size)]

    def best(group: range) -> float:
        values = sorted(choice[list(group)])
        return float(values[-1] if experts.group_score == "max" else sum(values[-2:]))

    ranked = sorted(groups, key=best, reverse=True)[: experts.num_active_groups]
    allowed = [expert for group in ranked for expert in group]
    chosen = sorted(allowed, key=lambda expert: choice[expert], reverse=True)
    kept = chosen[: experts.num_active]
    total = sum(scores[expert] for expert in kept) if experts.normalize else 1.0
    return {expert: float(scores[expert] / total * experts.scale) for expert in kept}


@dataclass(frozen=True)
class Case:
    """Some tokens under one rule; scores are apart by far more than rounding."""

    name: str
    experts: ExpertSpec
    bias: tuple[float, ...] | None = None

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Of five tokens, each a permutation of the same values."""
        rng = np.random.default_rng(11)
        count = self.experts.num_experts
        values = (0.37 * np.arange(count) - 0.185 * count).astype(np.float32)
        return np.stack([rng.permutation(values) for _ in range(5)])

    @property
    def bias_array(self) -> npt.NDArray[np.float32] | None:
        """The bias, if there is one."""
        return None if self.bias is None else np.array(self.bias, dtype=np.float32)

    def check(self, ids: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
        """Compare an engine's experts and factors, (5, num_active) each, with the rule."""
        for row, logits in enumerate(self.logits):
            expected = by_hand(logits.tolist(), self.experts, self.bias)
            found = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
            assert found.keys() == expected.keys(), (self.name, row, found, expected)
            np.testing.assert_allclose(
                [found[expert] for expert in expected], list(expected.values()), rtol=1e-5
            )


def _rule(num_experts: int, num_active: int, **more: Any) -> ExpertSpec:
    return ExpertSpec(num_experts=num_experts, num_active=num_active, ffn_size=32, **more)


_SIGMOID: dict[str, Any] = {"scoring": "sigmoid", "group_score": "top2_sum", "score_bias": True}
CASES = [
    Case("mixtral", _rule(8, 2)),
    Case("qwen3", _rule(16, 4, normalize=False)),
    Case("one expert of all", _rule(5, 1)),
    Case("all experts", _rule(4, 4, normalize=False)),
    Case("best of a group", _rule(8, 2, num_groups=4, num_active_groups=2, scale=2.5)),
    Case(
        "sum of the best two, with a bias",
        _rule(8, 3, num_groups=4, num_active_groups=2, scale=2.5, **_SIGMOID),
        tuple(0.013 * n * (-1) ** n for n in range(8)),
    ),
    Case(
        "sum of the best two in groups of one",
        _rule(6, 2, num_groups=6, num_active_groups=3, **_SIGMOID),
        tuple(0.013 * n * (-1) ** n for n in range(6)),
    ),
    Case("best of groups of one", _rule(6, 2, num_groups=6, num_active_groups=2)),
    Case("every group", _rule(8, 3, num_groups=4, num_active_groups=4, **_SIGMOID), (0.0,) * 8),
    Case(
        "negative choices: a closed group counts less than zero",
        _rule(4, 2, num_groups=2, num_active_groups=1, scoring="sigmoid", score_bias=True),
        (-5.0,) * 4,
    ),
]
