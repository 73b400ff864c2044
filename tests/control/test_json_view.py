"""Terms as JSON data."""

from __future__ import annotations

import json

from hypothesis import given

from bridge.term import Atom, Pid
from control.json_view import to_json
from tests.bridge.terms import terms


def test_the_forms_that_replies_use() -> None:
    term = {
        Atom("state"): Atom("up"),
        Atom("text"): "é".encode(),
        Atom("leader"): Atom("undefined"),
    }
    assert to_json(term) == {"state": "up", "text": "é", "leader": None}
    assert to_json((1, [2.5, True])) == [1, [2.5, True]]
    assert "n@h" in to_json(Pid("n@h", 1, 2, 3))


@given(terms)
def test_every_term_becomes_json(term: object) -> None:
    json.dumps(to_json(term))
