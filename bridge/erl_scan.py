"""Erlang text to tokens, in the shapes of OTP's ``erl_scan`` that a remote shell also sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bridge.errors import BridgeError
from bridge.term import Atom, Term

Location = tuple[int, int]  # line, column, both from 1


class ErlangSyntaxError(BridgeError):
    """Text is no Erlang expression; ``str`` reads as the Erlang shell prints it."""

    def __init__(self, location: Location, text: str) -> None:
        super().__init__(location, text)
        self.location, self.text = location, text

    def __str__(self) -> str:
        return f"* {self.location[0]}:{self.location[1]}: {self.text}"


@dataclass(frozen=True, slots=True)
class Token:
    """``kind``: atom, var, integer, float, string, char, dot, or the symbol itself."""

    kind: str
    location: Location
    value: Term = None


_TOKEN: Final = re.compile(
    r"""
    (?P<space>\s+|%[^\n]*)
  | (?P<float>\d[\d_]*\.\d[\d_]*(?:[eE][+-]?\d+)?)
  | (?P<based>\d{1,2}\#[0-9a-zA-Z_]+)
  | (?P<integer>\d[\d_]*)
  | (?P<atom>[a-zß-öø-ÿ][\w@]*)
  | (?P<var>[A-Z_][\w@]*)
  | (?P<quoted>'(?:[^'\\]|\\.)*')
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<char>\$(?:\\.|[^\\]))
  | (?P<dot>\.(?=\s|%|$))
  | (?P<symbol>=:=|=/=|=>|:=|->|<-|\|\||<<|>>|==|/=|=<|>=|\+\+|--|::|[][(){}<>,;:|\#/=+*.!?-])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE: Final = re.compile(
    r"\\(?:x\{([0-9a-fA-F]+)\}|x([0-9a-fA-F]{2})|([0-7]{1,3})|\^(.)|(.))", re.DOTALL
)
_NAMED: Final = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "b": "\b",
    "f": "\f",
    "e": "\x1b",
    "s": " ",
    "d": "\x7f",
}


def scan(text: str) -> list[Token]:
    """Tokens of ``text``, the final dot included if there is one. Raises ErlangSyntaxError."""
    return list(_scan(text))


def _scan(text: str) -> Iterator[Token]:
    line, line_start, pos = 1, 0, 0
    while pos < len(text):
        here = (line, pos - line_start + 1)
        found = _TOKEN.match(text, pos)
        if found is None:
            kind = {"'": "atom", '"': "string"}.get(text[pos])
            raise ErlangSyntaxError(here, f"unterminated {kind}" if kind else "illegal character")
        kind, word = str(found.lastgroup), found.group()
        if kind != "space":
            yield _token(kind, word, here)
        pos = found.end()
        breaks = word.count("\n")
        if breaks:
            line += breaks
            line_start = found.start() + word.rindex("\n") + 1


def _token(kind: str, word: str, here: Location) -> Token:
    match kind:
        case "integer" | "based":
            base, mark, digits = word.rpartition("#")
            try:
                return Token(
                    "integer", here, int(digits.replace("_", ""), int(base) if mark else 10)
                )
            except ValueError:  # a digit or a base that there is not, or thousands of digits
                raise ErlangSyntaxError(here, "illegal integer") from None
        case "float":
            value = float(word.replace("_", ""))
            if value == float("inf"):
                raise ErlangSyntaxError(here, "illegal float")
            return Token("float", here, value)
        case "string":
            return Token("string", here, [ord(c) for c in _unescape(word[1:-1])])
        case "char":
            return Token("char", here, ord(_unescape(word[1:])))
        case "atom" | "quoted":
            name = _unescape(word[1:-1]) if kind == "quoted" else word
            atom: Term = Atom(name) if name not in ("true", "false") else name == "true"
            return Token("atom", here, atom)
        case "var":
            return Token("var", here, word)
        case "dot":
            return Token("dot", here)
        case _:
            return Token(word, here)


def _unescape(text: str) -> str:
    def char(found: re.Match[str]) -> str:
        wide, two, octal, control, plain = found.groups()
        if wide or two:
            code = int(wide or two, 16)
            return chr(code) if code < 0x110000 else "�"
        if octal:
            return chr(int(octal, 8))
        return chr(ord(control) & 31) if control else _NAMED.get(plain, plain)

    return _ESCAPE.sub(char, text) if "\\" in text else text


def from_erlang(tokens: Term) -> list[Token]:
    """Tokens that a stock ``erl_scan`` made. Raises ErlangSyntaxError: they are none."""
    found = []
    for token in tokens if isinstance(tokens, list) else [None]:
        match token:
            case (str() | bool() as kind, where, *value) if len(value) <= 1:
                line, column = where if isinstance(where, tuple) and len(where) == 2 else (where, 1)
                if isinstance(line, int) and isinstance(column, int):
                    word = str(kind).lower() if isinstance(kind, bool) else str(kind)
                    found.append(Token(word, (line, column), value[0] if value else None))
                    continue
        raise ErlangSyntaxError((1, 1), "no tokens of erl_scan")
    return found
