"""An instance's spec travels between machines whole, and nonsense is refused by its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from bridge.term import Atom, Term
from control.instance_spec import InstanceSpec, RankSpec, spec_of, spec_term
from control.load_options import MeshShape

A = Atom
NODES = ("a@10.0.0.1", "b@10.0.0.2", "c@[fd00::3]")
TEXT = st.text("abc/.-é", min_size=1, max_size=12)
COUNT = st.integers(0, 2**50)


@st.composite
def specs(draw: st.DrawFn) -> InstanceSpec:
    tensor, pipeline = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num = tensor * pipeline
    ranks = tuple(
        RankSpec(
            node=draw(st.sampled_from(NODES)),
            path=Path("/", draw(TEXT)),
            device=draw(st.sampled_from(("", "cpu", "cuda:1"))),
            pool=draw(st.sampled_from(("memory", "cuda:1"))),
            threads=draw(COUNT),
            memory_bytes=draw(COUNT),
            limit_bytes=draw(COUNT),
        )
        for _ in range(num)
    )
    shares = draw(st.lists(st.floats(0.001, 1e12), min_size=num, max_size=num))
    return InstanceSpec(
        id=draw(TEXT),
        model=draw(TEXT),
        context_tokens=draw(st.integers(1, 10**6)),
        num_slots=draw(st.integers(1, 64)),
        shape=MeshShape(tensor, pipeline, tuple(shares)),
        ranks=ranks,
        experts=draw(st.sampled_from(("inside", "across"))),
        engine=draw(st.sampled_from(("torch", "mlx"))),
        first_epoch=draw(COUNT),
        addresses=tuple((node, f"10.0.0.{i}") for i, node in enumerate(NODES)),
    )


@given(specs())
def test_a_spec_comes_back_as_it_went(spec: InstanceSpec) -> None:
    assert spec_of(etf.decode(etf.encode(spec_term(spec)))) == spec


def two(*nodes: str, **more: Any) -> InstanceSpec:
    ranks = tuple(
        RankSpec(
            node=node,
            path=Path(f"/models/{node}/m.gguf"),
            device="cpu",
            pool="memory",
            threads=1,
            memory_bytes=1,
            limit_bytes=1,
        )
        for node in nodes
    )
    return InstanceSpec(id="m-1", model="m", context_tokens=8, num_slots=1, ranks=ranks, **more)


def test_the_coordinator_is_where_the_head_is() -> None:
    pipeline = two("a@h", "b@h", "b@h", shape=MeshShape.even(1, 3))
    assert (pipeline.head_node, pipeline.path) == ("b@h", Path("/models/b@h/m.gguf"))
    assert pipeline.nodes == ("a@h", "b@h")
    assert two("a@h", "b@h", shape=MeshShape.even(2, 1)).head_node == "a@h"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": b""}, "id"),
        ({"id": A("a"), "tensor": 0}, "tensor"),
        ({"tensor": True}, "tensor"),
        ({"pipeline": 2}, "mesh"),
        ({"shares": [1.0]}, "mesh"),
        ({"shares": [1.0, -1.0]}, "shares"),
        ({"shares": [1.0, A("nan")]}, "shares"),
        ({"ranks": [{}, {}]}, "node"),
        ({"ranks": A("none")}, "ranks"),
        ({"slots": 0}, "slots"),
        ({"first_epoch": -1}, "first_epoch"),
        ({"addresses": [A("x")]}, "addresses"),
        ({"addresses": [(A("a@h"), b"10.0.0.1")]}, "addresses: none of b@h"),
        ({"engine": 3}, "engine"),
    ],
)
def test_nonsense_is_refused_with_its_field(change: dict[str, Term], field: str) -> None:
    spec = two("a@h", "b@h", shape=MeshShape.even(2, 1), addresses=(("a@h", "h"), ("b@h", "h")))
    term = spec_term(spec)
    assert isinstance(term, dict)
    assert spec_of(term) == spec
    with pytest.raises(ValueError, match=field):
        spec_of({**term, **{A(key): value for key, value in change.items()}})


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a map"):
        spec_of(A("spec"))
