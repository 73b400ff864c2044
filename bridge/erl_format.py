"""Terms as Erlang text, as ``io:format("~p")`` lays them out."""

from __future__ import annotations

import re
from typing import Final

from bridge.term import (
    Atom,
    BitBinary,
    Export,
    Fun,
    ImproperList,
    MapPairs,
    Pid,
    Port,
    Ref,
    Term,
)

MAX_DEPTH: Final = 200

_PLAIN_ATOM: Final = re.compile(r"[a-zß-öø-ÿ][\w@]*\Z")
_RESERVED: Final = re.compile(
    r"after|and|andalso|band|begin|bnot|bor|bsl|bsr|bxor|case|catch|cond|div|else|end|fun|if|let"
    r"|maybe|not|of|or|orelse|receive|rem|try|when|xor"
)
_ESCAPES: Final = {
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    "\b": "\\b",
    "\f": "\\f",
    "\x1b": "\\e",
    "\x7f": "\\d",
    "\\": "\\\\",
}


def format_term(term: Term, *, width: int = 80, node: str | None = None) -> str:
    """``term`` as Erlang source, broken into lines of ``width`` where that is possible.

    Args:
        node: its pids, ports and references are shown as local ones, ``<0.5.0>``.
    """
    return _lay_out(_tree(term, node, 0), 0, width)


# A text, or (opening, [(label, child)], closing): the label of a map entry is "Key => ".
_Tree = str | tuple[str, list[tuple[str, "_Tree"]], str]


def _tree(term: Term, node: str | None, depth: int) -> _Tree:
    if depth > MAX_DEPTH:
        return "..."
    match term:
        case bool():
            return "true" if term else "false"
        case None:
            return "undefined"
        case Atom():
            return _atom(term)
        case int():
            return str(term) if term.bit_length() < 10_000 else hex(term).replace("0x", "16#")
        case float():
            return _float(term)
        case str():
            return _tree(term.encode("utf-8", "replace"), node, depth)
        case bytes():
            return _binary(term)
        case list():
            if term and (text := _printable(term)) is not None:
                return f'"{text}"'
            return "[", [("", _tree(item, node, depth + 1)) for item in term], "]"
        case tuple():
            return "{", [("", _tree(item, node, depth + 1)) for item in term], "}"
        case ImproperList():
            parts = [("", _tree(item, node, depth + 1)) for item in term.items]
            return "[", [*parts, ("|", _tree(term.tail, node, depth + 1))], "]"
        case dict() | MapPairs():
            pairs = term.items() if isinstance(term, dict) else term.pairs
            entries: list[tuple[str, _Tree]] = [
                (
                    _lay_out(_tree(key, node, depth + 1), 0, 1 << 30) + " => ",
                    _tree(value, node, depth + 1),
                )
                for key, value in pairs
            ]
            return "#{", entries, "}"
        case Pid():
            return f"<{_where(term.node, node)}.{term.id}.{term.serial}>"
        case Port():
            return f"#Port<{_where(term.node, node)}.{term.id}>"
        case Ref():
            words = ".".join(str(word) for word in reversed(term.ids))
            return f"#Ref<{_where(term.node, node)}.{words}>"
        case Export():
            return f"fun {_atom(term.module)}:{_atom(term.function)}/{term.arity}"
        case Fun():
            return f"#Fun<{len(term.raw)} bytes>"
        case BitBinary():
            last = term.data[-1] >> (8 - term.bits)
            return "<<" + ",".join([*map(str, term.data[:-1]), f"{last}:{term.bits}"]) + ">>"
        case _:
            return f"'{repr(term)[:200]}'"


def _where(owner: str, node: str | None) -> str:
    return "0" if owner == node else owner


def _atom(name: str) -> str:
    if _PLAIN_ATOM.match(name) and not _RESERVED.fullmatch(name):
        return name
    return "'" + _escaped(name, "'") + "'"


def _escaped(text: str, quote: str) -> str:
    return "".join("\\" + c if c == quote else _ESCAPES.get(c, c) for c in text)


def _float(value: float) -> str:
    text = repr(value)
    mantissa, mark, exponent = text.partition("e")
    if not mark:
        return text
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent)}"


def _printable(codes: list[Term]) -> str | None:
    """The inside of a string literal, if ``codes`` are printable characters."""
    if not all(type(code) is int and 0 <= code < 0x110000 for code in codes):
        return None
    text = "".join(map(chr, codes))
    return _escaped(text, '"') if all(c.isprintable() or c in _ESCAPES for c in text) else None


def _binary(data: bytes) -> _Tree:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if all(c.isprintable() or c in _ESCAPES for c in text):
        kind = "" if text.isascii() else "/utf8"
        return f'<<"{_escaped(text, chr(34))}"{kind}>>' if text else "<<>>"
    return "<<" + ",".join(map(str, data)) + ">>"


def _lay_out(tree: _Tree, indent: int, width: int) -> str:
    flat = _flat(tree, width - indent)
    if flat is not None:
        return flat
    if isinstance(tree, str):
        return tree
    opening, entries, closing = tree
    inner = indent + len(opening)
    lines = []
    for index, (label, child) in enumerate(entries):
        bar = label == "|"
        text = ("" if bar else label) + _lay_out(child, inner + (0 if bar else len(label)), width)
        if index == 0:
            lines.append(text)
        else:
            lines.append(("|" if bar else ",") + "\n" + " " * inner + text)
    return opening + "".join(lines) + closing


def _flat(tree: _Tree, room: int) -> str | None:
    """``tree`` on one line, or None if that needs more than ``room`` columns."""
    if isinstance(tree, str):
        return tree if len(tree) <= room else None
    opening, entries, closing = tree
    text = opening
    for index, (label, child) in enumerate(entries):
        if index and label != "|":
            text += ","
        text += label
        inside = _flat(child, room - len(text))
        if inside is None:
            return None
        text += inside
    return text + closing if len(text) + len(closing) <= room else None
