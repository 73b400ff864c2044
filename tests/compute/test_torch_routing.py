"""Torch's router, against the rule written out token by token."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.torch.routing import route
from models.spec import ExpertSpec
from tests.compute.routing_cases import CASES, Case, by_hand

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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_of_all_engines(case: Case) -> None:
    bias = None if case.bias_array is None else torch.from_numpy(case.bias_array)
    weights, ids = route(torch.from_numpy(case.logits), case.experts, bias)
    case.check(ids.numpy(), weights.numpy())


def test_a_token_whose_scores_all_vanish_gives_numbers() -> None:
    experts = ExpertSpec(num_experts=4, num_active=2, ffn_size=1, scoring="sigmoid")
    weights, _ = route(torch.full((1, 4), -200.0), experts)
    assert torch.isfinite(weights).all()
