"""Terms as short text: Erlang's syntax, bounded, never an error."""

from __future__ import annotations

import pytest
from hypothesis import given

from bridge.show import MAX_CHARS, show
from bridge.term import Atom, BitBinary, ImproperList, MapPairs, Term
from tests.bridge.terms import terms


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (Atom("ok"), "ok"),
        (Atom("Not plain"), "'Not plain'"),
        (True, "true"),
        ((Atom("load"),), "{load}"),
        ([1, 2.5, b"a"], '[1,2.5,<<"a">>]'),
        ({Atom("a"): {1: b"\xff\x00"}}, "#{a => #{1 => <<255,0>>}}"),
        (ImproperList((Atom("alias"),), 5), "[alias|5]"),
        (MapPairs(((1, Atom("x")), (1.0, Atom("y")))), "#{1 => x,1.0 => y}"),
        (BitBinary(b" ", 3), "<3 bits>"),
        pytest.param(1 << 20000, "<integer of 20001 bits>", id="huge"),
        (list(range(100)), "[0,1,2,3,4,5,6,7,...]"),
        ([[[[[[1]]]]]], "[[[[...]]]]"),
        ('say "hi"\n', '<<"say \\"hi\\"\\n">>'),
        (object(), "object"),
    ],
)
def test_forms(term: Term, text: str) -> None:
    assert show(term) == text


@given(terms)
def test_every_term_is_shown_within_the_limit(term: Term) -> None:
    assert 0 < len(show(term)) <= MAX_CHARS


def test_what_fails_to_be_shown_is_named() -> None:
    class Odd(dict[int, int]):
        def __len__(self) -> int:
            raise RuntimeError("no")

    assert show(Odd()) == "<Odd that cannot be shown: RuntimeError>"
