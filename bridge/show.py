"""Terms as short text for logs and error messages, in Erlang's syntax.

For terms of strangers: bounded work whatever they send, and never an error. What is no term
(our own objects pass between local processes too) is shown by its type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bridge.term import Atom, BitBinary, Export, ImproperList, MapPairs, Pid, Port, Ref, Term

MAX_CHARS: Final = 200
_MAX_DEPTH: Final = 4
_MAX_ITEMS: Final = 8
_MAX_BITS: Final = 256
_MAX_BYTES: Final = 80


def show(term: Term, max_chars: int = MAX_CHARS) -> str:
    """``term`` in at most ``max_chars`` characters."""
    try:
        text = _text(term, _MAX_DEPTH)
    except Exception as exc:  # noqa: BLE001 - a message that cannot be shown must not end a server
        text = f"<{type(term).__name__} that cannot be shown: {type(exc).__name__}>"
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def _text(x: Term, depth: int) -> str:
    match x:
        case bool():
            return "true" if x else "false"
        case Atom():
            plain = x.isidentifier() and x[:1].islower()
            return str(x[:_MAX_BYTES]) if plain else f"'{x[:_MAX_BYTES]}'"
        case int() if x.bit_length() > _MAX_BITS:
            return f"<integer of {x.bit_length()} bits>"
        case int() | float() | Pid() | Ref() | Port():
            return repr(x)
        case str():
            return _binary(x.encode("utf-8", "replace"))
        case bytes():
            return _binary(x)
        case BitBinary():
            return f"<{8 * (len(x.data) - 1) + x.bits} bits>"
        case Export():
            return f"fun {x.module}:{x.function}/{x.arity}"
        case tuple() | list() | dict() | ImproperList() | MapPairs():
            return "..." if depth == 0 else _container(x, depth - 1)
        case None:
            return "undefined"
        case _:
            return type(x).__name__


def _container(x: Term, depth: int) -> str:
    match x:
        case tuple():
            return f"{{{_items(x, depth)}}}"
        case list():
            return f"[{_items(x, depth)}]"
        case ImproperList():
            return f"[{_items(x.items, depth)}|{_text(x.tail, depth)}]"
        case MapPairs():
            return f"#{{{_pairs(x.pairs, len(x.pairs), depth)}}}"
        case _:
            return f"#{{{_pairs(x.items(), len(x), depth)}}}"


def _items(items: Iterable[Term], depth: int) -> str:
    shown: list[str] = []
    for item in items:
        if len(shown) == _MAX_ITEMS:
            shown.append("...")
            break
        shown.append(_text(item, depth))
    return ",".join(shown)


def _pairs(pairs: Iterable[tuple[Term, Term]], count: int, depth: int) -> str:
    shown: list[str] = []
    for (key, value), _ in zip(pairs, range(_MAX_ITEMS), strict=False):
        shown.append(f"{_text(key, depth)} => {_text(value, depth)}")
    if count > _MAX_ITEMS:
        shown.append("...")
    return ",".join(shown)


def _binary(data: bytes) -> str:
    cut = data[:_MAX_BYTES]
    more = "..." if len(data) > _MAX_BYTES else ""
    text = cut.decode("utf-8", "replace")
    if all(c.isprintable() or c in "\n\t" for c in text) and "\ufffd" not in text[:-4]:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'<<"{quoted}{more}">>'
    return f"<<{','.join(map(str, cut[:16]))}{',...' if len(data) > 16 else ''}>>"
