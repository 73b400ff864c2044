"""Tokens to expressions: terms, calls and variables, all that the inspection shell evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from bridge.erl_format import format_term
from bridge.erl_scan import ErlangSyntaxError, Location, Token, scan
from bridge.term import Atom, Term

MAX_DEPTH: Final = 100


@dataclass(frozen=True, slots=True)
class Literal:
    value: Term


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    location: Location


@dataclass(frozen=True, slots=True)
class Match:
    """``Name = Value``."""

    name: str
    value: Expression


@dataclass(frozen=True, slots=True)
class Call:
    module: Atom | None
    function: Atom
    arguments: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class TupleOf:
    items: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class ListOf:
    items: tuple[Expression, ...]
    tail: Expression


@dataclass(frozen=True, slots=True)
class MapOf:
    pairs: tuple[tuple[Expression, Expression], ...]


@dataclass(frozen=True, slots=True)
class BinaryOf:
    parts: tuple[Expression, ...]


Expression: TypeAlias = Literal | Variable | Match | Call | TupleOf | ListOf | MapOf | BinaryOf


def parse_text(text: str) -> list[Expression]:
    """The expressions of ``text``; its final dot may be missing. Raises ErlangSyntaxError."""
    return parse(scan(text))


def parse(tokens: list[Token]) -> list[Expression]:
    """The expressions separated by commas up to the dot. Raises ErlangSyntaxError."""
    return _Parser(tokens).expressions()


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        last = tokens[-1].location if tokens else (1, 1)
        self._tokens = [*tokens, Token("dot", last)]
        self._next = 0
        self._depth = 0

    def expressions(self) -> list[Expression]:
        if self._kind() == "dot":
            return []
        found = [self._expression()]
        while self._skip(","):
            found.append(self._expression())
        self._expect("dot")
        if self._next < len(self._tokens) - 1:
            self._fail()
        return found

    # --- tokens

    def _kind(self) -> str:
        return self._tokens[self._next].kind

    def _take(self) -> Token:
        token = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _skip(self, kind: str) -> bool:
        if self._kind() != kind:
            return False
        if self._next < len(self._tokens) - 1:
            self._next += 1
        return True

    def _expect(self, kind: str) -> None:
        if not self._skip(kind):
            self._fail()

    def _fail(self) -> None:
        token = self._tokens[self._next]
        match token.kind:
            case "dot":
                word = ""
            case "var":
                word = str(token.value)
            case "atom" | "integer" | "float" | "string" | "char":
                word = format_term(token.value)
            case kind:
                word = f"'{kind}'"
        raise ErlangSyntaxError(token.location, f"syntax error before: {word}")

    # --- expressions

    def _expression(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ErlangSyntaxError(self._tokens[self._next].location, "nested too deep")
        try:
            return self._primary()
        finally:
            self._depth -= 1

    def _primary(self) -> Expression:
        token = self._tokens[self._next]
        match token.kind:
            case "integer" | "float" | "char":
                return Literal(self._take().value)
            case "+" | "-":
                self._take()
                number = self._tokens[self._next]
                if number.kind not in ("integer", "float"):
                    self._fail()
                self._take()
                return Literal(-number.value if token.kind == "-" else number.value)
            case "string":
                text: list[int] = []
                while self._kind() == "string":
                    text += self._take().value
                return Literal(text)
            case "atom":
                return self._atom()
            case "var":
                self._take()
                if self._skip("="):
                    return Match(str(token.value), self._expression())
                return Variable(str(token.value), token.location)
            case "{":
                self._take()
                return TupleOf(self._items("}"))
            case "[":
                self._take()
                return self._list()
            case "#":
                self._take()
                self._expect("{")
                return self._map()
            case "<<":
                self._take()
                return self._binary()
            case "(":
                self._take()
                inner = self._expression()
                self._expect(")")
                return inner
        self._fail()
        raise AssertionError

    def _atom(self) -> Expression:
        token = self._take()
        module = None
        if self._kind() == ":" and isinstance(token.value, Atom):
            self._take()
            if self._kind() != "atom":
                self._fail()
            module, token = token.value, self._take()
            if self._kind() != "(":
                self._fail()
        if self._kind() != "(":
            return Literal(token.value)
        self._take()
        name = token.value if isinstance(token.value, Atom) else Atom(str(token.value).lower())
        return Call(module, name, self._items(")"))

    def _items(self, end: str) -> tuple[Expression, ...]:
        if self._skip(end):
            return ()
        items = [self._expression()]
        while self._skip(","):
            items.append(self._expression())
        self._expect(end)
        return tuple(items)

    def _list(self) -> Expression:
        nil = Literal([])
        if self._skip("]"):
            return nil
        items = [self._expression()]
        while self._skip(","):
            items.append(self._expression())
        tail = self._expression() if self._skip("|") else nil
        self._expect("]")
        return ListOf(tuple(items), tail)

    def _map(self) -> Expression:
        pairs: list[tuple[Expression, Expression]] = []
        while not self._skip("}"):
            if pairs:
                self._expect(",")
            key = self._expression()
            self._expect("=>")
            pairs.append((key, self._expression()))
        return MapOf(tuple(pairs))

    def _binary(self) -> Expression:
        parts: list[Expression] = []
        while not self._skip(">>"):
            if parts:
                self._expect(",")
            part = self._expression()
            if self._skip("/"):
                # utf8 is what text in binaries needs; other types are not spoken here.
                if self._tokens[self._next].value != "utf8":
                    self._fail()
                self._take()
                if isinstance(part, Literal) and isinstance(part.value, list):
                    part = Literal(list("".join(map(chr, part.value)).encode("utf-8", "replace")))
            parts.append(part)
        return BinaryOf(tuple(parts))
