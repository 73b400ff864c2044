"""Text in terms: peers send it as binaries, atoms or character lists; we read all three."""

from __future__ import annotations

from bridge.show import show
from bridge.term import Term


def text_of(value: Term) -> str:
    """``value`` as text: UTF-8 binary, atom, str or character list; else shown shortly.

    Bytes that are not UTF-8 become replacement characters: this is for people to read.
    """
    match value:
        case str():
            return str(value)
        case bytes():
            return value.decode("utf-8", "replace")
        case list() if value and all(isinstance(c, int) and 0 <= c < 0x110000 for c in value):
            return "".join(map(chr, value))
        case _:
            return show(value)
