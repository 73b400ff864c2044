"""Every family over every mesh: the logits of transformers, in chunks and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compute.families import FAMILIES, Shape, error, shapes_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
TOLERANCE = 2e-4  # of the largest logit; float32 gives a tenth of it and less
CASES = [(name, shape) for name in FAMILIES for shape in shapes_of(name)]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_logits_are_those_of_transformers_over_every_mesh(
    family_folders: dict[str, Path], name: str, shape: Shape
) -> None:
    assert error(family_folders[name], shape) < TOLERANCE
