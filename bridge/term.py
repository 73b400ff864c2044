"""The Erlang terms that Python has no type for.

How terms map, both ways unless said:

==================  ==========================================================
Erlang              Python
==================  ==========================================================
integer, float      int, float (finite)
true, false         bool; None encodes as the atom ``undefined``
other atoms         Atom (a str; a plain str encodes as a UTF-8 *binary*)
binary              bytes
bitstring           BitBinary, when its length is not a multiple of 8 bits
list                list; ImproperList when the tail is not ``[]``
tuple               tuple
map                 dict; MapPairs when Python would merge or refuse the keys
pid, port, ref      Pid, Port, Ref
fun                 Fun (opaque), Export for ``fun M:F/A``
==================  ==========================================================

All are immutable and hashable (as far as what they hold is) and compare by value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self, TypeAlias

from bridge.errors import EncodeError

# A decoded term is as dynamic as Erlang's own: narrow it with `match` before use.
Term: TypeAlias = Any

MAX_ATOM_CHARS: Final = 255  # OTP's own limit

_U16: Final = struct.Struct(">H").pack
_PID_TAIL: Final = struct.Struct(">III").pack
_PORT_TAIL: Final = struct.Struct(">QI").pack
_U32S: Final = tuple(struct.Struct(f">{count}I").unpack for count in range(7))
_put: Final = object.__setattr__


class Atom(str):
    """An Erlang atom other than ``true`` and ``false``, which are Python's bools."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Atom({str.__repr__(self)})"


def atom_bytes(name: str) -> bytes:
    """``name`` as SMALL_ATOM_UTF8_EXT or ATOM_UTF8_EXT. Raises EncodeError."""
    if len(name) > MAX_ATOM_CHARS:
        raise EncodeError(f"atom of {len(name)} characters: OTP allows {MAX_ATOM_CHARS}")
    try:
        text = str.encode(name, "utf-8")
    except UnicodeEncodeError as exc:
        raise EncodeError(f"atom holds a lone surrogate: {str.__repr__(name)}") from exc
    if len(text) < 256:
        return b"w" + bytes((len(text),)) + text
    return b"v" + _U16(len(text)) + text


class _Identifier:
    """Base of Pid, Port and Ref: frozen, equal when the canonical ETF bytes are.

    ``wire`` is the identifier as OTP 28 writes it, without the version byte: computed once,
    because identifiers are compared, hashed and sent far more often than made. Of one that came
    from a peer the other fields are read from it when somebody asks.
    """

    __slots__ = ("_hash", "node", "wire")

    wire: bytes
    node: Atom
    _hash: int

    @classmethod
    def of_wire(cls, wire: bytes, node: Atom) -> Self:
        """The identifier whose canonical bytes, known to be right, are ``wire``."""
        found = object.__new__(cls)
        _put(found, "wire", wire)
        _put(found, "node", node)
        _put(found, "_hash", hash(wire))
        return found

    def _read_fields(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        # Only of a field without a value: one that was made by ``of_wire``.
        if name not in self.__slots__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        self._read_fields()
        return object.__getattribute__(self, name)

    def _freeze(self, wire: bytes) -> None:
        _put(self, "wire", wire)
        _put(self, "_hash", hash(wire))

    def __eq__(self, other: object) -> bool:
        if self.__class__ is not other.__class__:
            return NotImplemented
        return self.wire == other.wire

    def __hash__(self) -> int:
        return self._hash

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable")


class Pid(_Identifier):
    """A process identifier; ``id`` and ``serial`` are 32-bit, so is ``creation``."""

    __slots__ = ("creation", "id", "serial")

    id: int
    serial: int
    creation: int

    def __init__(self, node: str, id: int, serial: int, creation: int) -> None:
        _put(self, "node", node if type(node) is Atom else Atom(node))
        _put(self, "id", id)
        _put(self, "serial", serial)
        _put(self, "creation", creation)
        try:
            tail = _PID_TAIL(id, serial, creation)
        except struct.error as exc:
            raise EncodeError(f"pid fields beyond 32 bits: {id}, {serial}, {creation}") from exc
        self._freeze(b"X" + atom_bytes(node) + tail)

    def _read_fields(self) -> None:
        for name, value in zip(
            ("id", "serial", "creation"), _U32S[3](self.wire[-12:]), strict=True
        ):
            _put(self, name, value)

    def __repr__(self) -> str:
        return f"<{self.node}.{self.id}.{self.serial}>"


class Port(_Identifier):
    """A port identifier; ``id`` is 64-bit."""

    __slots__ = ("creation", "id")

    id: int
    creation: int

    def __init__(self, node: str, id: int, creation: int) -> None:
        _put(self, "node", node if type(node) is Atom else Atom(node))
        _put(self, "id", id)
        _put(self, "creation", creation)
        try:
            tail = _PORT_TAIL(id, creation)
        except struct.error as exc:
            raise EncodeError(f"port fields out of range: {id}, {creation}") from exc
        self._freeze(b"x" + atom_bytes(node) + tail)

    def __repr__(self) -> str:
        return f"#Port<{self.node}.{self.id}>"


class Ref(_Identifier):
    """A reference, alias or monitor id: 1 to 5 words of 32 bits."""

    __slots__ = ("creation", "ids")

    creation: int
    ids: tuple[int, ...]

    def __init__(self, node: str, creation: int, ids: tuple[int, ...]) -> None:
        _put(self, "node", node if type(node) is Atom else Atom(node))
        _put(self, "creation", creation)
        _put(self, "ids", ids)
        num_words = len(ids)
        if not 1 <= num_words <= 5:
            raise EncodeError(f"reference of {num_words} words: OTP has 1 to 5")
        try:
            tail = struct.pack(f">{num_words + 1}I", creation, *ids)
        except struct.error as exc:
            raise EncodeError(f"reference words beyond 32 bits: {creation}, {ids}") from exc
        self._freeze(b"Z" + _U16(num_words) + atom_bytes(node) + tail)

    def _read_fields(self) -> None:
        num_words = self.wire[2]
        creation, *ids = _U32S[num_words + 1](self.wire[-4 * (num_words + 1) :])
        _put(self, "creation", creation)
        _put(self, "ids", tuple(ids))

    def __repr__(self) -> str:
        return f"#Ref<{self.node}.{'.'.join(map(str, self.ids))}>"


@dataclass(frozen=True, slots=True)
class ImproperList:
    """``[A, B | Tail]``: at least one item, and a tail that is not a list."""

    items: tuple[Term, ...]
    tail: Term


@dataclass(frozen=True, slots=True)
class BitBinary:
    """A bitstring: ``bits`` (1 to 7) of the last byte count, from the high end."""

    data: bytes
    bits: int


@dataclass(frozen=True, slots=True)
class MapPairs:
    """An Erlang map that no dict can hold: ``#{1 => a, 1.0 => b}``, ``#{[] => x}``.

    Pairs keep the sender's order, and equality counts that order.
    """

    pairs: tuple[tuple[Term, Term], ...]


@dataclass(frozen=True, slots=True)
class Export:
    """``fun Module:Function/Arity``."""

    module: Atom
    function: Atom
    arity: int


@dataclass(frozen=True, slots=True)
class Fun:
    """A fun of somebody else's code: NEW_FUN_EXT without its tag, given back bit for bit."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class LocalTerm:
    """What ``term_to_binary(T, [local])`` made: only the node that wrote it can read it."""

    raw: bytes
