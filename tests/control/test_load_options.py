"""Options of a load: what shares mean, and what is refused with its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.term import Atom
from control.load_options import MAX_RANKS, BadOption, LoadOptions, MeshShape

A = Atom


def shape(**options: Any) -> MeshShape | None:
    return LoadOptions.from_term({A(name): value for name, value in options.items()}).shape()


@pytest.mark.parametrize(
    ("options", "tensor", "pipeline", "shares"),
    [
        ({"tensor": 1}, 1, 1, (1,)),
        ({"tensor": 3}, 3, 1, (1, 1, 1)),
        ({"pipeline": 2}, 1, 2, (1, 1)),
        ({"tensor": 2, "pipeline": 2}, 2, 2, (1, 1, 1, 1)),
        ({"shares": b"2,1"}, 2, 1, (2, 1)),
        ({"shares": "2, 0.5"}, 2, 1, (2, 0.5)),
        ({"shares": [2, 1.5, 1]}, 3, 1, (2, 1.5, 1)),
        ({"shares": (7,)}, 1, 1, (7,)),
        ({"shares": [2, 1], "pipeline": 1}, 2, 1, (2, 1)),
        ({"shares": [2, 1], "tensor": 2}, 2, 1, (2, 1)),
        ({"shares": [2, 1], "tensor": 1, "pipeline": 2}, 1, 2, (2, 1)),
        ({"shares": [2, 1], "pipeline": 2}, 1, 2, (2, 1)),
        ({"shares": [4, 2, 2, 1], "tensor": 2, "pipeline": 2}, 2, 2, (4, 2, 2, 1)),
    ],
)
def test_shares_follow_the_ranks(
    options: dict[str, Any], tensor: int, pipeline: int, shares: tuple[float, ...]
) -> None:
    assert shape(**options) == MeshShape(tensor, pipeline, shares)


def test_nothing_said_leaves_the_choice() -> None:
    assert shape() is None
    assert shape(slots=2, shares=[], tensor=0) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shares": [2, 1], "tensor": 3}, "shares=2,1: 2 numbers .* = 3 ranks"),
        ({"shares": [2, 1], "tensor": 1}, "2 numbers .* = 1 ranks"),
        ({"shares": [2, 1], "tensor": 2, "pipeline": 2}, "2 numbers .* = 4 ranks"),
        ({"shares": [1, 2, 3], "pipeline": 2}, "3 numbers .* = 2 ranks"),
        ({"tensor": MAX_RANKS, "pipeline": 2}, f"{2 * MAX_RANKS} ranks: at most {MAX_RANKS}"),
        ({"shares": [0, 1]}, "shares: 0 is not a positive number"),
        ({"shares": [True]}, "shares: true"),
        ({"shares": [float("inf")]}, "shares: inf"),
        ({"shares": [b"2"]}, "shares"),
        ({"shares": 2}, "shares: expected a list"),
        ({"shares": b"2,none"}, "shares='2,none'"),
        ({"shares": b"1e9"}, "shares"),
        ({"shares": b"-1"}, "shares"),
        ({"shares": [1] * (MAX_RANKS + 1)}, f"{MAX_RANKS + 1} numbers"),
        ({"engine": b"jax"}, "engine='jax'"),
        ({"device": b"tpu"}, "device='tpu'"),
        ({"engine": b"mlx", "device": b"cuda:0"}, "engine='mlx' does not run on"),
        ({"engine": b"torch", "device": b"mlx"}, "engine='torch' does not run on"),
        ({"experts": b"outside"}, "experts='outside'"),
        ({"slots": 1025}, "slots=1025"),
        ({"slots": -1}, "slots: expected a number from 0"),
        ({"goal": b"speed"}, "goal='speed'"),
        ({"replicas": 17}, "replicas=17: at most 16"),
        ({"replicas": -1}, "replicas: expected a number from 0"),
        ({"priority": 101}, "priority=101: give -100 to 100"),
        ({"priority": -101}, "priority: expected a number from -100"),
        ({"priority": True}, "priority"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        shape(**options)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cuda", "cuda:12", "mlx"])
def test_devices(device: str) -> None:
    assert LoadOptions.from_term({A("device"): device}).device == device


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_goal_replicas_and_priority(priority: int) -> None:
    given = {A("goal"): b"throughput", A("replicas"): 16, A("priority"): priority}
    made = LoadOptions.from_term(given)
    assert (made.goal, made.replicas, made.priority) == ("throughput", 16, priority)


@given(
    tensor=st.integers(1, 5),
    pipeline=st.integers(1, 5),
    data=st.data(),
)
def test_a_grid_has_the_shares_stage_by_stage(
    tensor: int, pipeline: int, data: st.DataObject
) -> None:
    size = tensor * pipeline
    shares = data.draw(st.lists(st.floats(0.01, 100), min_size=size, max_size=size))
    made = shape(tensor=tensor, pipeline=pipeline, shares=shares)
    assert made is not None
    assert [share for stage in made.grid for share in stage] == shares
    assert {len(stage) for stage in made.grid} == {tensor}
    assert made.num_ranks == size
    names = {(False, False): "single", (True, False): "tensor", (False, True): "pipeline"}
    assert made.strategy == names.get((tensor > 1, pipeline > 1), "mixed")
