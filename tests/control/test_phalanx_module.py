"""What the functions of ``phalanx`` take for text and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.rpc import ErlangError
from bridge.term import Atom, MapPairs, Term
from control.phalanx_module import functions, options_of, text

A = Atom
PLAIN = st.text(st.characters(exclude_categories=["Cs"]))


@given(PLAIN)
def test_text_is_a_binary_a_string_or_an_atom(value: str) -> None:
    expected = value.encode()
    assert text(expected) == text([ord(c) for c in value]) == text(A(value)) == expected


@pytest.mark.parametrize("value", [1, 2.5, (), [A("a")], [-1], [0x110000], {}, [[104]], True])
def test_what_is_no_text_is_a_badarg(value: Term) -> None:
    with pytest.raises(ErlangError, match="badarg"):
        text(value)


@pytest.mark.parametrize(
    ("given_options", "options"),
    [
        ([], {}),
        ({}, {}),
        ({A("slots"): 4}, {A("slots"): 4}),
        ({b"slots": 4}, {A("slots"): 4}),
        (MapPairs((([*b"slots"], 4),)), {A("slots"): 4}),
        ([(A("slots"), 4), (A("engine"), [*b"torch"])], {A("slots"): 4, A("engine"): b"torch"}),
        ({A("shares"): [2, 1]}, {A("shares"): [2, 1]}),
        ({A("stop"): [*b"end"]}, {A("stop"): b"end"}),
        ({A("stop"): [[*b"a"], b"b"]}, {A("stop"): [b"a", b"b"]}),
        ({A("stop"): []}, {A("stop"): []}),
    ],
)
def test_options_are_a_map_or_a_list_of_pairs(given_options: Term, options: Term) -> None:
    assert options_of(given_options) == options


@pytest.mark.parametrize("value", [1, [1], [(1,)], b"slots", [(1, 2)], {A("stop"): [3.5]}])
def test_other_options_are_a_badarg(value: Term) -> None:
    with pytest.raises(ErlangError, match="badarg"):
        options_of(value)


def test_the_table_is_what_the_contract_lists() -> None:
    listed = "status/0 leader/0 nodes/0 topology/0 instances/0 load/1 load/2 unload/1 swap/2"
    assert {f"{f}/{n}" for m, f, n in functions() if m == "phalanx"} == {
        *listed.split(),
        "generate/3",
    }
    assert {module for module, _, _ in functions()} == {"phalanx"}
