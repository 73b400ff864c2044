"""Terms to bytes: one loop over an explicit stack, so that depth is a number, not a crash.

Writes what OTP 28 writes (``term_to_binary`` with its default options), bit for bit.
Source: erl_ext_dist, "External Term Format"; erts ``external.c``, ``enc_term_int``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

from bridge.errors import EncodeError
from bridge.term import (
    Atom,
    BitBinary,
    Export,
    Fun,
    ImproperList,
    LocalTerm,
    MapPairs,
    Pid,
    Port,
    Ref,
    Term,
    atom_bytes,
)

MAX_DEPTH: Final = 256  # containers inside containers; both directions
MAX_CACHED: Final = 8192  # entries of each memo; it is emptied when full

_U32: Final = struct.Struct(">I").pack
_TAG_U16: Final = struct.Struct(">BH").pack
_TAG_U32: Final = struct.Struct(">BI").pack
_TAG_I32: Final = struct.Struct(">Bi").pack
_TAG_F64: Final = struct.Struct(">Bd").pack

_SMALL_INTS: Final = tuple(bytes((97, value)) for value in range(256))
_SMALL_TUPLES: Final = tuple(bytes((104, arity)) for arity in range(256))
_NIL_TAIL: Final[tuple[Term]] = ([],)
_INT_ONLY: Final = {int}
_TRUE: Final = atom_bytes("true")
_FALSE: Final = atom_bytes("false")
_UNDEFINED: Final = atom_bytes("undefined")

_atom_wires: dict[str, bytes] = {}


def encode_term(term: Term, prefix: bytes = b"") -> bytes:
    """``prefix`` followed by ``term`` without a version byte.

    Raises:
        EncodeError: no Erlang form, not finite, a value beyond OTP's limits, or nested
            deeper than MAX_DEPTH (so also a list that holds itself).
    """
    out = [prefix]
    append = out.append
    known_atom = _atom_wires.get
    stack: list[Iterator[Term]] = []
    turns: Iterator[Term] = iter((term,))
    while True:
        for term in turns:
            kind = type(term)
            if kind is int:
                if 0 <= term < 256:
                    append(_SMALL_INTS[term])
                elif -0x8000_0000 <= term < 0x8000_0000:
                    append(_TAG_I32(98, term))
                else:
                    append(_big(term))
                continue
            if kind is Atom:
                append(known_atom(term) or _atom(term))
                continue
            if kind is bytes:
                append(_TAG_U32(109, len(term)))
                append(term)
                continue
            if kind is tuple:
                size = len(term)
                append(_SMALL_TUPLES[size] if size < 256 else _TAG_U32(105, size))
                below = iter(term)
            elif kind is Ref or kind is Pid or kind is Port:
                append(term.wire)
                continue
            elif kind is list:
                if not term:
                    append(b"j")
                    continue
                if type(term[0]) is int and set(map(type, term)) == _INT_ONLY:
                    append(_int_list(term))
                    continue
                append(_TAG_U32(108, len(term)))
                below = chain(term, _NIL_TAIL)
            elif kind is float:
                if term - term != 0.0:  # infinite, or not a number
                    raise EncodeError(f"{term} is no Erlang float")
                append(_TAG_F64(70, term))
                continue
            elif kind is bool:
                append(_TRUE if term else _FALSE)
                continue
            elif kind is dict:
                append(_TAG_U32(116, len(term)))
                below = chain.from_iterable(term.items())
            elif kind is ImproperList:
                append(_TAG_U32(108, len(term.items)))
                below = chain(term.items, (term.tail,))
            elif kind is MapPairs:
                append(_TAG_U32(116, len(term.pairs)))
                below = chain.from_iterable(term.pairs)
            elif (leaf := _LEAVES.get(kind)) is not None:
                append(leaf(term))
                continue
            else:
                below = iter((_plain(term),))
            if len(stack) >= MAX_DEPTH:
                raise EncodeError(f"term nests deeper than {MAX_DEPTH}")
            stack.append(turns)
            turns = below
            break
        else:
            if not stack:
                return b"".join(out)
            turns = stack.pop()


def _atom(name: Atom) -> bytes:
    wire = atom_bytes(name)
    if len(_atom_wires) >= MAX_CACHED:
        _atom_wires.clear()
    _atom_wires[name] = wire
    return wire


def _big(value: int) -> bytes:
    """SMALL_BIG_EXT or LARGE_BIG_EXT: sign, then the magnitude in little-endian bytes."""
    magnitude = abs(value)
    size = (magnitude.bit_length() + 7) // 8
    head = bytes((110, size)) if size < 256 else _TAG_U32(111, size)
    return head + (b"\1" if value < 0 else b"\0") + magnitude.to_bytes(size, "little")


def _int_list(values: list[int]) -> bytes:
    """A non-empty list of plain ints: prompts and text, so it is done in bulk."""
    size = len(values)
    low, high = min(values), max(values)
    if low >= 0 and high < 256 and size <= 0xFFFF:
        return _TAG_U16(107, size) + bytes(values)
    if low >= 256 and high < 0x8000_0000:
        packed = struct.pack(f">{size}i", *values)
        body = bytearray(5 * size)
        body[0::5] = b"b" * size
        for byte in range(4):
            body[byte + 1 :: 5] = packed[byte::4]
        return b"%b%bj" % (_TAG_U32(108, size), bytes(body))
    small, tagged = _SMALL_INTS, _TAG_I32
    if low >= -0x8000_0000 and high < 0x8000_0000:
        parts = [small[v] if 0 <= v < 256 else tagged(98, v) for v in values]
    else:
        parts = [
            small[v]
            if 0 <= v < 256
            else (tagged(98, v) if -0x8000_0000 <= v < 0x8000_0000 else _big(v))
            for v in values
        ]
    return b"%b%bj" % (_TAG_U32(108, size), b"".join(parts))


def _binary(data: bytes | bytearray | memoryview) -> bytes:
    body = bytes(data)
    return _TAG_U32(109, len(body)) + body


def _text(text: str) -> bytes:
    try:
        return _binary(str.encode(text, "utf-8"))
    except UnicodeEncodeError as exc:
        raise EncodeError("text holds a lone surrogate: it has no UTF-8 form") from exc


def _bit_binary(term: BitBinary) -> bytes:
    if not (1 <= term.bits <= 7 and term.data):
        raise EncodeError(f"bitstring of {len(term.data)} bytes with {term.bits} bits in the last")
    return _TAG_U32(77, len(term.data)) + bytes((term.bits,)) + term.data


def _export(term: Export) -> bytes:
    if not 0 <= term.arity <= 255:
        raise EncodeError(f"arity {term.arity} of {term.module}:{term.function}")
    return b"q" + atom_bytes(term.module) + atom_bytes(term.function) + _SMALL_INTS[term.arity]


def _local(term: LocalTerm) -> bytes:
    return b"y" + term.raw


def _fun(term: Fun) -> bytes:
    return b"p" + term.raw


_LEAVES: Final[dict[type, Callable[[Term], bytes]]] = {
    str: _text,
    type(None): lambda _: _UNDEFINED,
    bytearray: _binary,
    memoryview: _binary,
    BitBinary: _bit_binary,
    Export: _export,
    Fun: _fun,
    LocalTerm: _local,
}


_BASES: Final[tuple[type[Any], ...]] = (int, float, Atom, str, bytes, tuple, list, dict)


def _plain(term: Term) -> Term:
    """An instance of a subclass (IntEnum, StrEnum, NamedTuple) as what it extends."""
    for base in _BASES:
        if isinstance(term, base):
            return base(term)
    raise EncodeError(f"{type(term).__name__} has no Erlang form: {_short(term)}")


def _short(term: Term) -> str:
    try:
        text = repr(term)
    except Exception:  # noqa: BLE001  # a broken __repr__ must not hide what went wrong
        return "(no repr)"
    return text if len(text) <= 80 else text[:77] + "..."
