"""Every family over every mesh: the logits of transformers, in chunks and token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compute.random_model import RandomCheckpoint, small_spec
from compute.stage import Row
from models.mesh import Experts, grid, mesh, whole
from tests.compute.families import FAMILIES, Mesh, Shape, error, on_torch, shapes_of
from tests.compute.made import made
from tests.models.specs import small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
TOLERANCE = 2e-4  # of the largest logit; float32 gives a tenth of it and less
CASES = [(name, shape) for name in FAMILIES for shape in shapes_of(name)]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_logits_are_those_of_transformers_over_every_mesh(
    family_folders: dict[str, Path], name: str, shape: Shape
) -> None:
    assert error(family_folders[name], shape) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "experts"),
    [("llama", "inside"), ("gemma3_text", "inside"), ("deepseek_v3", "across")],
)
def test_as_many_ranks_as_query_heads(name: str, experts: Experts) -> None:
    """Eight ranks of very different shares, where there are eight query heads."""
    model = RandomCheckpoint(small_spec(name))
    shares = (0.1, 3, 1, 1, 7, 0.5, 2, 1)
    shards = mesh(model.spec, grid(shares), experts=experts, split_embedding=True)
    one = Mesh([[on_torch(model, whole(model.spec))]])
    many = Mesh([[on_torch(model, shard) for shard in shards]])
    for row in (Row(0, tuple(range(500, 530)), 0), Row(0, (3,), 30)):
        expected = one.run([row])
        assert np.abs(many.run([row]) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "deepseek_v2-lite", "deepseek_v3"])
def test_packed_weights_of_all_kinds_are_cut_anywhere(name: str) -> None:
    """Blocks that a cut divides are read by both ranks."""
    model = made(small(name), kinds=("Q4_0", "Q8_0", "F16", "Q4_1", "BF16", "F32"))
    one = Mesh([[on_torch(model, whole(model.spec))]])
    rows = [Row(0, tuple(range(20)), 0), Row(2, (3,), 0)]
    expected = one.run(rows)
    for shape in ((3, 1, 1), (1, 1, 1, 1, 1)):
        shards = mesh(model.spec, grid(shape), split_embedding=True)
        many = Mesh([[on_torch(model, shard) for shard in shards]])
        assert np.abs(many.run(rows) - expected).max() < 2e-5 * np.abs(expected).max()
