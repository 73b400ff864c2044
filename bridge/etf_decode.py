"""Bytes to terms, down to a fixed depth; nothing is allocated by a length field.

Reads every tag that OTP 25 to 28 write, and the older ones that still name the same terms.
Source: erl_ext_dist, "External Term Format"; erts ``external.c``, ``dec_term``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Final, TypeAlias

from bridge.errors import DecodeError, EncodeError
from bridge.etf_encode import MAX_CACHED, MAX_DEPTH, encode_term
from bridge.term import Atom, BitBinary, Export, Fun, ImproperList, MapPairs, Pid, Port, Ref, Term

AtomTable: TypeAlias = Sequence[Term]  # what ATOM_CACHE_REF i means: the i-th entry

_U16: Final = struct.Struct(">H").unpack_from
_U32: Final = struct.Struct(">I").unpack_from
_I32: Final = struct.Struct(">i").unpack_from
_F64: Final = struct.Struct(">d").unpack_from
_INT_FLOAT: Final = struct.Struct(">ixd").unpack_from
_BYTE_FLOAT: Final = struct.Struct(">Bxd").unpack_from
_PID_TAIL: Final = struct.Struct(">III").unpack_from
_PID_TAIL_OLD: Final = struct.Struct(">IIB").unpack_from
_PORT_TAIL: Final = struct.Struct(">QI").unpack_from
_PORT_TAIL_NEW: Final = struct.Struct(">II").unpack_from
_PORT_TAIL_OLD: Final = struct.Struct(">IB").unpack_from

_TOO_DEEP: Final = f"term nests deeper than {MAX_DEPTH}"

# Memos of bytes already understood: the same few atoms, pids and references come all the time.
_atoms: dict[bytes, Term] = {}
_identifiers: dict[bytes, Pid | Ref] = {}
known_atom: Final = _atoms.get  # by SMALL_ATOM_UTF8_EXT
known_identifier: Final = _identifiers.get  # by NEW_PID_EXT or NEWER_REFERENCE_EXT


def decode_term(data: bytes, pos: int = 0, atom_table: AtomTable = ()) -> tuple[Term, int]:
    """The term whose tag is at ``data[pos]``, and the position after it.

    Args:
        data: may go on after the term.
        atom_table: atoms of this packet's distribution header.

    Raises:
        DecodeError: cut short, unknown tag, nested deeper than MAX_DEPTH, or a value that
            Erlang cannot hold. Nothing else is ever raised, whatever the bytes.
    """
    try:
        if data[pos] == 104:  # nearly every message is a small tuple
            items, pos = _read(data, pos + 2, data[pos + 1], MAX_DEPTH - 1, atom_table)
            return tuple(items), pos
        items, pos = _read(data, pos, 1, MAX_DEPTH, atom_table)
        return items[0], pos
    except (IndexError, struct.error):
        raise DecodeError(f"term cut short: {len(data)} bytes") from None
    except EncodeError as exc:  # an identifier whose fields are out of range
        raise DecodeError(str(exc)) from exc
    except RecursionError:  # the caller is deep in calls already, or funs hold funs
        raise DecodeError(_TOO_DEEP) from None


def _read(
    data: bytes, pos: int, count: int, depth: int, atom_table: AtomTable
) -> tuple[list[Term], int]:
    """``count`` terms in a row and the position after them.

    Calls itself for containers, at most ``depth`` times deep; what a list or map announces is
    compared with the bytes that are there before anything is made of it.
    """
    items: list[Term] = []
    append = items.append
    for _ in repeat(None, count):
        tag = data[pos]
        if tag == 97:  # SMALL_INTEGER_EXT
            append(data[pos + 1])
            pos += 2
        elif tag == 98:  # INTEGER_EXT
            append(_I32(data, pos + 1)[0])
            pos += 5
        elif tag == 119:  # SMALL_ATOM_UTF8_EXT
            stop = pos + 2 + data[pos + 1]
            atom = known_atom(data[pos:stop])
            append(_small_atom(data, pos, stop) if atom is None else atom)
            pos = stop
        elif tag == 104:  # SMALL_TUPLE_EXT
            if not depth:
                raise DecodeError(_TOO_DEEP)
            # {Integer, Float} comes in long lists: probabilities, times, coordinates.
            if data[pos + 1] == 2 and data[pos + 2] == 98 and data[pos + 7] == 70:
                pair = _INT_FLOAT(data, pos + 3)
                pos += 16
            elif data[pos + 1] == 2 and data[pos + 2] == 97 and data[pos + 4] == 70:
                pair = _BYTE_FLOAT(data, pos + 3)
                pos += 13
            else:
                below, pos = _read(data, pos + 2, data[pos + 1], depth - 1, atom_table)
                append(tuple(below))
                continue
            if pair[1] - pair[1] != 0.0:
                raise DecodeError("float is not finite")
            append(pair)
        elif tag == 70:  # NEW_FLOAT_EXT
            (value,) = _F64(data, pos + 1)
            if value - value != 0.0:  # infinite, or not a number
                raise DecodeError("float is not finite")
            append(value)
            pos += 9
        elif tag == 109:  # BINARY_EXT
            start = pos + 5
            pos = start + _U32(data, pos + 1)[0]
            if pos > len(data):
                raise DecodeError(f"binary of {pos - start} bytes, {len(data) - start} there")
            append(data[start:pos])
        elif tag == 90 or tag == 88:  # NEWER_REFERENCE_EXT, NEW_PID_EXT
            # The usual node name is a SMALL_ATOM_UTF8; if not, the key misses the memo.
            if tag == 90:
                stop = pos + 9 + data[pos + 4] + 4 * data[pos + 2]
            else:
                stop = pos + 15 + data[pos + 2]
            identifier = known_identifier(data[pos:stop])
            if identifier is None:
                identifier, pos = _first_seen(data, pos, stop, atom_table)
            else:
                pos = stop
            append(identifier)
        elif tag == 106:  # NIL_EXT
            append([])
            pos += 1
        elif tag == 107:  # STRING_EXT
            start = pos + 3
            pos = start + _U16(data, pos + 1)[0]
            if pos > len(data):
                raise DecodeError(f"string of {pos - start} bytes, {len(data) - start} there")
            append(list(data[start:pos]))
        elif tag == 108 or tag == 116 or tag == 105:  # LIST_EXT, MAP_EXT, LARGE_TUPLE_EXT
            (size,) = _U32(data, pos + 1)
            num_terms = size + 1 if tag == 108 else 2 * size if tag == 116 else size
            pos += 5
            if num_terms > len(data) - pos:  # each element takes a byte at least
                raise DecodeError(f"{num_terms} elements announced, {len(data) - pos} bytes there")
            if not depth:
                raise DecodeError(_TOO_DEEP)
            below, pos = _read(data, pos, num_terms, depth - 1, atom_table)
            append(_list(below) if tag == 108 else _map(below) if tag == 116 else tuple(below))
        else:
            leaf = _LEAVES.get(tag)
            if leaf is None:
                raise DecodeError(f"unknown tag {tag} at byte {pos}")
            value, pos = leaf(data, pos, atom_table)
            append(value)
    return items, pos


def _list(items: list[Term]) -> Term:
    """``items`` ends with the tail, which OTP lets be any term."""
    tail = items.pop()
    if type(tail) is list:
        if tail:
            items += tail
        return items
    return ImproperList(tuple(items), tail) if items else tail


def _map(items: list[Term]) -> Term:
    keys = items[0::2]
    values = items[1::2]
    try:
        found = dict(zip(keys, values, strict=True))
    except (TypeError, RecursionError):  # a list or map inside a key, or too deep to hash here
        found = {}
    if len(found) == len(keys):
        return found
    if len({encode_term(key) for key in keys}) != len(keys):
        raise DecodeError(f"map of {len(keys)} pairs has the same key twice")
    return MapPairs(tuple(zip(keys, values, strict=True)))


def _to_atom(text: bytes, encoding: str) -> Term:
    try:
        name = text.decode(encoding)
    except UnicodeDecodeError as exc:
        raise DecodeError(f"atom is not {encoding}: {text[:40]!r}") from exc
    if len(name) > 255:
        raise DecodeError(f"atom of {len(name)} characters: OTP allows 255")
    if name == "true":
        return True
    if name == "false":
        return False
    return Atom(name)


def _small_atom(data: bytes, pos: int, stop: int) -> Term:
    if stop > len(data):
        raise DecodeError(f"atom of {stop - pos - 2} bytes, {len(data) - pos - 2} there")
    atom = _to_atom(data[pos + 2 : stop], "utf-8")
    if len(_atoms) >= MAX_CACHED:
        _atoms.clear()
    _atoms[data[pos:stop]] = atom
    return atom


def _atom(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Term, int]:
    """Any of the five ways to write an atom, or a reference to the packet's table."""
    tag = data[pos]
    if tag == 82:  # ATOM_CACHE_REF
        index = data[pos + 1]
        if index >= len(atom_table):
            raise DecodeError(f"atom cache reference {index} of {len(atom_table)}")
        return atom_table[index], pos + 2
    if tag in (119, 115):  # SMALL_ATOM_UTF8_EXT, SMALL_ATOM_EXT
        size, start = data[pos + 1], pos + 2
    elif tag in (118, 100):  # ATOM_UTF8_EXT, ATOM_EXT
        size, start = _U16(data, pos + 1)[0], pos + 3
    else:
        raise DecodeError(f"tag {tag} where an atom must be, at byte {pos}")
    stop = start + size
    if stop > len(data):
        raise DecodeError(f"atom of {size} bytes, {len(data) - start} there")
    return _to_atom(data[start:stop], "utf-8" if tag > 117 else "latin-1"), stop


def _node(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Atom, int]:
    node, pos = _atom(data, pos, atom_table)
    return (node if type(node) is Atom else Atom(str(node).lower())), pos


def identifier_at(data: bytes, pos: int) -> tuple[Pid | Ref | None, int]:
    """The identifier at ``data[pos]`` and its end; None if it is not one of the usual two kinds.

    Raises:
        DecodeError, EncodeError: it is one of them, and broken.
        IndexError, struct.error: cut short.
    """
    tag = data[pos]
    if tag == 90:
        stop = pos + 9 + data[pos + 4] + 4 * data[pos + 2]
    elif tag == 88:
        stop = pos + 15 + data[pos + 2]
    else:
        return None, pos
    found = known_identifier(data[pos:stop])
    return (found, stop) if found is not None else _first_seen(data, pos, stop, ())


def _first_seen(data: bytes, pos: int, stop: int, atom_table: AtomTable) -> tuple[Pid | Ref, int]:
    """A NEW_PID_EXT or NEWER_REFERENCE_EXT, which ends at ``stop`` if its node is as usual."""
    is_pid = data[pos] == 88
    at = pos + 1 if is_pid else pos + 3
    if data[at] != 119 or stop > len(data) or not (is_pid or 1 <= _U16(data, pos + 1)[0] <= 5):
        return _identifier(data, pos, atom_table)
    name_stop = at + 2 + data[at + 1]
    node = known_atom(data[at:name_stop]) or _small_atom(data, at, name_stop)
    if type(node) is not Atom:
        return _identifier(data, pos, atom_table)
    wire = data[pos:stop]
    found = Pid.of_wire(wire, node) if is_pid else Ref.of_wire(wire, node)
    if len(_identifiers) >= MAX_CACHED:
        _identifiers.clear()
    _identifiers[wire] = found  # the whole identifier: a hit can never mean another one
    return found, stop


def _identifier(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Pid | Ref, int]:
    """NEW_PID_EXT, PID_EXT, and the three reference tags."""
    tag = data[pos]
    found: Pid | Ref
    if tag == 88 or tag == 103:  # NEW_PID_EXT, PID_EXT
        node, pos = _node(data, pos + 1, atom_table)
        tail, size = (_PID_TAIL, 12) if tag == 88 else (_PID_TAIL_OLD, 9)
        found = Pid(node, *tail(data, pos))
        pos += size
    elif tag == 101:  # REFERENCE_EXT
        node, pos = _node(data, pos + 1, atom_table)
        found = Ref(node, data[pos + 4], (_U32(data, pos)[0],))
        pos += 5
    else:  # NEWER_REFERENCE_EXT, NEW_REFERENCE_EXT
        (num_words,) = _U16(data, pos + 1)
        if not 1 <= num_words <= 5:
            raise DecodeError(f"reference of {num_words} words")
        node, pos = _node(data, pos + 3, atom_table)
        creation: int = _U32(data, pos)[0] if tag == 90 else data[pos]
        pos += 4 if tag == 90 else 1
        found = Ref(node, creation, struct.unpack_from(f">{num_words}I", data, pos))
        pos += 4 * num_words
    return found, pos


def _port(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Term, int]:
    tag = data[pos]
    node, pos = _node(data, pos + 1, atom_table)
    if tag == 120:  # V4_PORT_EXT
        return Port(node, *_PORT_TAIL(data, pos)), pos + 12
    if tag == 89:  # NEW_PORT_EXT
        return Port(node, *_PORT_TAIL_NEW(data, pos)), pos + 8
    return Port(node, *_PORT_TAIL_OLD(data, pos)), pos + 5  # PORT_EXT


def _old_float(data: bytes, pos: int, _table: AtomTable) -> tuple[Term, int]:
    """FLOAT_EXT: sprintf "%.20e" in 31 bytes, padded with zeros."""
    stop = pos + 32
    if stop > len(data):
        raise DecodeError("float cut short")
    try:
        value = float(data[pos + 1 : stop].rstrip(b"\0").decode("ascii"))
    except ValueError as exc:
        raise DecodeError("old float is no number") from exc
    if not math.isfinite(value):
        raise DecodeError("float is not finite")
    return value, stop


def _big(data: bytes, pos: int, _table: AtomTable) -> tuple[Term, int]:
    if data[pos] == 110:  # SMALL_BIG_EXT
        size, start = data[pos + 1], pos + 3
    else:  # LARGE_BIG_EXT
        size, start = _U32(data, pos + 1)[0], pos + 6
    stop = start + size
    if stop > len(data):
        raise DecodeError(f"integer of {size} bytes, {len(data) - start} there")
    magnitude = int.from_bytes(data[start:stop], "little")
    return (-magnitude if data[start - 1] else magnitude), stop


def _bit_binary(data: bytes, pos: int, _table: AtomTable) -> tuple[Term, int]:
    (size,) = _U32(data, pos + 1)
    bits = data[pos + 5]
    start = pos + 6
    stop = start + size
    if stop > len(data):
        raise DecodeError(f"bitstring of {size} bytes, {len(data) - start} there")
    body = data[start:stop]
    if bits == 8 or (bits == 0 and not body):
        return body, stop
    if not (1 <= bits <= 7 and body):
        raise DecodeError(f"bitstring of {size} bytes with {bits} bits in the last")
    unused = 8 - bits  # what they hold is nobody's: zero, as OTP prints and compares
    return BitBinary(body[:-1] + bytes((body[-1] >> unused << unused,)), bits), stop


def _export(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Term, int]:
    module, pos = _node(data, pos + 1, atom_table)
    function, pos = _node(data, pos, atom_table)
    if data[pos] != 97:
        raise DecodeError(f"arity of {module}:{function} has tag {data[pos]}")
    return Export(module, function, data[pos + 1]), pos + 2


def _fun(data: bytes, pos: int, atom_table: AtomTable) -> tuple[Term, int]:
    """NEW_FUN_EXT, kept as it came; atoms of the packet's table are spelled out first."""
    (size,) = _U32(data, pos + 1)
    start, stop = pos + 1, pos + 1 + size
    if size < 29 or stop > len(data):
        raise DecodeError(f"fun of {size} bytes, {len(data) - start} there")
    if not atom_table:
        return Fun(data[start:stop]), stop
    (num_free,) = _U32(data, start + 25)
    if num_free > size:
        raise DecodeError(f"fun of {size} bytes with {num_free} free variables")
    fixed, parts = data[start + 4 : start + 29], []
    pos = start + 29
    for _ in range(4 + num_free):  # Module, OldIndex, OldUniq, Pid, then the free variables
        value, pos = decode_term(data, pos, atom_table)
        parts.append(encode_term(value))
    if pos != stop:
        raise DecodeError(f"fun of {size} bytes ends after {pos - start}")
    body = fixed + b"".join(parts)
    return Fun(struct.pack(">I", 4 + len(body)) + body), stop


_LEAVES: Final[dict[int, Callable[[bytes, int, AtomTable], tuple[Term, int]]]] = {
    **dict.fromkeys((82, 100, 115, 118), _atom),
    **dict.fromkeys((101, 103, 114), _identifier),
    **dict.fromkeys((89, 102, 120), _port),
    **dict.fromkeys((110, 111), _big),
    77: _bit_binary,
    99: _old_float,
    112: _fun,
    113: _export,
}
