"""The benchmark of collectives measures real groups."""

from __future__ import annotations

import pytest

from ops.bench import collectives

pytestmark = pytest.mark.slow


def test_it_measures_two_processes() -> None:
    result = collectives.run("shm", 2, floats="16,40000", seconds=0.01)
    assert (result["backend"], result["ranks"]) == ("shm", 2)
    assert [size["floats"] for size in result["all_reduce"]] == [16, 40000]
    assert all(0 < size["median_ms"] <= size["p99_ms"] for size in result["all_reduce"])


def test_a_rank_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        collectives.run("pigeons", 1, floats="16", seconds=0.01)
