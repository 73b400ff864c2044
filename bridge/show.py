"""Terms of strangers as short text for logs and error messages: bounded work, never an error."""

from __future__ import annotations

import reprlib
from typing import Final

from bridge.term import Atom, Term

MAX_CHARS: Final = 200
_MAX_BITS: Final = 256


class _Show(reprlib.Repr):
    """Python's bounded repr; integers are bounded too (it would refuse to print huge ones)."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxtuple = self.maxlist = self.maxdict = 8
        self.maxstring = self.maxother = 80

    def repr1(self, x: object, level: int) -> str:
        match x:
            case Atom():
                return str(x)[:80]
            case int() if x.bit_length() > _MAX_BITS:
                return f"<integer of {x.bit_length()} bits>"
            case bytes() if len(x) > self.maxstring:
                return f"{x[: self.maxstring]!r}..."
        return super().repr1(x, level)


_show: Final = _Show()


def show(term: Term, max_chars: int = MAX_CHARS) -> str:
    """``term`` in at most ``max_chars`` characters."""
    try:
        text = _show.repr(term)
    except Exception as exc:  # noqa: BLE001 - a message that cannot be shown must not end a server
        text = f"<{type(term).__name__} that cannot be shown: {type(exc).__name__}>"
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
