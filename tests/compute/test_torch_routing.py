"""The routing rule, against its definition written out token by token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.torch.routing import route
from models.spec import ExpertSpec


def by_hand(logits: list[float], experts: ExpertSpec, bias: list[float] | None) -> dict[int, float]:
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


# distinct by far more than rounding, so that there is one right choice
distinct = st.permutations([0.37 * n - 1.5 for n in range(8)])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(distinct, min_size=1, max_size=4),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    group_score=st.sampled_from(["max", "top2_sum"]),
    normalize=st.booleans(),
    biased=st.booleans(),
    num_active=st.integers(1, 4),
)
def test_tokens_go_where_the_rule_says(
    tokens: list[list[float]],
    scoring: Literal["softmax", "sigmoid"],
    groups: tuple[int, int],
    group_score: Literal["max", "top2_sum"],
    normalize: bool,
    biased: bool,
    num_active: int,
) -> None:
    experts = ExpertSpec(
        num_experts=8,
        num_active=num_active,
        ffn_size=1,
        scoring=scoring,
        score_bias=biased,
        normalize=normalize,
        scale=2.5,
        num_groups=groups[0],
        num_active_groups=groups[1],
        group_score=group_score,
    )
    bias = [0.013 * n * (-1) ** n for n in range(8)] if biased else None
    weights, ids = route(
        torch.tensor(tokens), experts, None if bias is None else torch.tensor(bias)
    )
    for row, logits in enumerate(tokens):
        expected = by_hand(logits, experts, bias)
        found = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert found.keys() == expected.keys()
        for expert, weight in expected.items():
            assert found[expert] == pytest.approx(weight, rel=1e-5)


def test_a_group_that_is_out_of_reach_is_so_even_where_all_scores_are_negative() -> None:
    """Scores of a closed group count as minus infinity, not as zero."""
    experts = ExpertSpec(
        num_experts=4,
        num_active=2,
        ffn_size=1,
        scoring="sigmoid",
        num_groups=2,
        num_active_groups=1,
    )
    logits = torch.tensor([[-1.0, -2.0, -1.5, -1.6]])
    ids = route(logits, experts, torch.full((4,), -5.0))[1]
    assert sorted(ids[0].tolist()) == [0, 1]


def test_a_token_whose_scores_all_vanish_gives_numbers() -> None:
    experts = ExpertSpec(num_experts=4, num_active=2, ffn_size=1, scoring="sigmoid")
    weights, _ = route(torch.full((1, 4), -200.0), experts)
    assert torch.isfinite(weights).all()
