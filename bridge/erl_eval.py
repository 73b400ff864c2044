"""Evaluates what the inspection shell is given: terms, variables, and calls of known functions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from bridge.erl_parse import (
    BinaryOf,
    Call,
    Expression,
    ListOf,
    Literal,
    MapOf,
    Match,
    TupleOf,
    Variable,
)
from bridge.errors import BridgeError
from bridge.process import Process
from bridge.rpc import Functions
from bridge.term import Atom, ImproperList, MapPairs, Term

# Takes the process it runs in and the arguments.
Command: TypeAlias = Callable[..., Awaitable[Term]]
Commands: TypeAlias = dict[tuple[str, int], Command]  # (name, number of arguments)


class EvalError(BridgeError):
    """What was typed cannot be evaluated; ``str`` reads as the Erlang shell prints it."""


class Evaluator:
    """One shell session: its variables stay bound.

    Args:
        commands: called without a module.
        functions: called as ``module:name(...)``.
    """

    def __init__(self, commands: Commands, functions: Functions) -> None:
        self._commands: Final = commands
        self._functions: Final = functions
        self.bindings: dict[str, Term] = {}

    async def evaluate(self, me: Process, expressions: list[Expression]) -> Term:
        """The value of the last expression. Raises EvalError, and what the functions raise."""
        value: Term = None
        for expression in expressions:
            value = await self._value(me, expression)
        return value

    async def _value(self, me: Process, expression: Expression) -> Term:
        match expression:
            case Literal(value):
                return value
            case Variable(name, (line, column)):
                if name not in self.bindings:
                    raise EvalError(f"* {line}:{column}: variable '{name}' is unbound")
                return self.bindings[name]
            case Match(name, inner):
                value = await self._value(me, inner)
                if name != "_" and self.bindings.setdefault(name, value) != value:
                    raise EvalError("** exception error: no match of right hand side value")
                return value
            case TupleOf(items):
                return tuple(await self._values(me, items))
            case ListOf(items, tail):
                values, rest = await self._values(me, items), await self._value(me, tail)
                return values + rest if isinstance(rest, list) else ImproperList((*values,), rest)
            case MapOf(pairs):
                found = [(await self._value(me, k), await self._value(me, v)) for k, v in pairs]
                try:
                    made = dict(found)
                except TypeError:
                    return MapPairs(tuple(found))
                return made
            case BinaryOf(parts):
                return b"".join(_bytes_of(part) for part in await self._values(me, parts))
            case Call(module, function, arguments):
                return await self._call(me, module, function, arguments)

    async def _values(self, me: Process, items: tuple[Expression, ...]) -> list[Term]:
        return [await self._value(me, item) for item in items]

    async def _call(
        self, me: Process, module: Atom | None, function: Atom, items: tuple[Expression, ...]
    ) -> Term:
        arity = len(items)
        found = (
            self._commands.get((function, arity))
            if module is None
            else self._functions.get((module, function, arity))
        )
        if found is None:
            what = (
                f"shell command {function}" if module is None else f"function {module}:{function}"
            )
            raise EvalError(f"** exception error: undefined {what}/{arity}")
        return await found(me, *await self._values(me, items))


def _bytes_of(part: Term) -> bytes:
    match part:
        case int():
            return bytes((part & 255,))
        case list() if all(isinstance(code, int) for code in part):
            return bytes(code & 255 for code in part)
        case _:
            raise EvalError("** exception error: bad argument in a binary")
