"""Terms as JSON data: atoms and binaries become text, tuples lists, keys text."""

from __future__ import annotations

from typing import Any

from bridge.term import Atom, Pid, Port, Ref, Term

_UNDEFINED = Atom("undefined")


def to_json(term: Term) -> Any:
    """``term`` as ``json.dumps`` takes it. ``undefined`` becomes null; identifiers their text."""
    match term:
        case bool() | int() | float():
            return term
        case Atom() if term == _UNDEFINED:
            return None
        case str():
            return str(term)
        case bytes():
            return term.decode("utf-8", "replace")
        case list() | tuple():
            return [to_json(item) for item in term]
        case dict():
            return {str(to_json(key)): to_json(value) for key, value in term.items()}
        case Pid() | Ref() | Port():
            return repr(term)
        case _:
            return repr(term)
