"""MLX's router sends tokens where the rule says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")
import mlx.core as mx

from compute.mlx.mlp import route
from tests.compute.routing_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_go_where_the_rule_says(case: Case) -> None:
    bias = None if case.bias_array is None else mx.array(case.bias_array)
    ids, weights = route(mx.array(case.logits), bias, case.experts)
    case.check(np.array(ids), np.array(weights))
