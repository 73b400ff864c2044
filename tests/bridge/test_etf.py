"""The term codec: round trips, bounds, and what it refuses."""

from __future__ import annotations

import math
import struct
import zlib
from enum import IntEnum, StrEnum
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from bridge.errors import DecodeError, EncodeError
from bridge.term import Atom, BitBinary, Export, ImproperList, MapPairs, Pid, Ref, Term
from tests.bridge.terms import terms


@given(terms)
def test_every_term_survives_the_round_trip(term: Term) -> None:
    data = etf.encode(term)
    found = etf.decode(data)
    assert repr(found) == repr(term)  # repr tells 1, 1.0 and True apart
    assert etf.encode(found) == data


@given(terms, terms)
def test_a_term_in_the_middle_ends_where_the_next_begins(first: Term, second: Term) -> None:
    wire = etf.encode_term(second, etf.encode_term(first, b"head"))
    found, pos = etf.decode_term(wire, 4)
    assert repr(found) == repr(first)
    found, pos = etf.decode_term(wire, pos)
    assert repr(found) == repr(second)
    assert pos == len(wire)


@given(terms)
def test_a_term_cut_anywhere_is_refused(term: Term) -> None:
    data = etf.encode(term)
    step = max(1, len(data) // 50)
    for size in range(0, len(data), step):
        with pytest.raises(DecodeError):
            etf.decode(data[:size])


class Colour(IntEnum):
    RED = 300


class Word(StrEnum):
    HI = "hi"


class Point(NamedTuple):
    x: int
    y: list[int]


@pytest.mark.parametrize(
    ("value", "term"),
    [
        (None, Atom("undefined")),
        ("h\u00e9", "h\u00e9".encode()),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        (Colour.RED, 300),
        (Word.HI, b"hi"),
        (Point(1, [2]), (1, [2])),
        ([True, 2], [True, 2]),
        (Atom("true"), True),
        ({"k": None}, {b"k": Atom("undefined")}),
        ([-5, 70000, 2**40], [-5, 70000, 2**40]),
        ([-5, 7, 70000], [-5, 7, 70000]),
    ],
)
def test_python_values_become_the_documented_terms(value: Term, term: Term) -> None:
    assert repr(etf.decode(etf.encode(value))) == repr(term)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1 + 2j,
        math.nan,
        math.inf,
        "\ud800",
        Atom("\ud800"),
        Atom("x" * 256),
        BitBinary(b"\1", 8),
        BitBinary(b"", 3),
        Export(Atom("m"), Atom("f"), 256),
        (1, [object()]),
    ],
)
def test_values_without_an_erlang_form_are_refused(value: Term) -> None:
    with pytest.raises(EncodeError):
        etf.encode(value)


def test_a_broken_repr_does_not_hide_what_cannot_be_encoded() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(EncodeError, match="Broken"):
        etf.encode(Broken())


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 2), (1.0, 3)], MapPairs(((1, 2), (1.0, 3)))),
        ([(1, 2), (True, 3)], MapPairs(((1, 2), (True, 3)))),
        ([([], 2)], MapPairs((([], 2),))),
        ([(({},), 2), (3, 4)], MapPairs(((({},), 2), (3, 4)))),
        ([((1, 0), 2), ((1.0, False), 3)], MapPairs((((1, 0), 2), ((1.0, False), 3)))),
    ],
)
def test_maps_that_no_dict_can_hold(pairs: list[tuple[Term, Term]], expected: MapPairs) -> None:
    data = etf.encode(MapPairs(tuple(pairs)))
    assert repr(etf.decode(data)) == repr(expected)
    assert etf.encode(etf.decode(data)) == data


def test_a_key_twice_in_one_map_is_refused() -> None:
    with pytest.raises(DecodeError, match="same key twice"):
        etf.decode(etf.encode(MapPairs(((1, 2), (1, 3)))))


def nest(opening: bytes, depth: int, innermost: bytes, closing: bytes = b"") -> bytes:
    return b"\x83" + opening * depth + innermost + closing * depth


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        (b"h\x01", b""),
        (b"i\0\0\0\1", b""),
        (b"l\0\0\0\1", b"j"),
        (b"l\0\0\0\1a\1", b""),
        (b"t\0\0\0\1", b"j"),
        (b"t\0\0\0\1a\1", b""),
    ],
)
def test_nesting_is_bounded(opening: bytes, closing: bytes) -> None:
    inside = etf.decode(nest(opening, etf.MAX_DEPTH, b"j", closing))
    assert etf.encode(etf.decode(etf.encode(inside))) == etf.encode(inside)
    for depth in (etf.MAX_DEPTH + 1, 200_000):
        with pytest.raises(DecodeError, match="deeper"):
            etf.decode(nest(opening, depth, b"j", closing))


def test_a_term_that_holds_itself_is_refused() -> None:
    loop: list[Term] = []
    loop.append((loop,))
    with pytest.raises(EncodeError, match="deeper"):
        etf.encode(loop)


def test_compressed_terms_are_unpacked_within_a_limit() -> None:
    wire = etf.encode([b"x" * 10_000])[1:]

    def packed(size: int, stream: bytes) -> bytes:
        return b"\x83P" + struct.pack(">I", size) + stream

    stream = zlib.compress(wire)
    assert etf.decode(packed(len(wire), stream)) == [b"x" * 10_000]
    for data in (
        packed(len(wire) + 1, stream),
        packed(len(wire) - 1, stream),
        packed(len(wire), stream[:-1]),
        packed(len(wire), stream + b"x"),
        packed(len(wire), b"no stream"),
        packed(2**32 - 1, stream),
        packed(0, zlib.compress(b"")),
        b"\x83P\0",
    ):
        with pytest.raises(DecodeError):
            etf.decode(data)
    with pytest.raises(DecodeError, match="limit is 100"):
        etf.decode(packed(len(wire), stream), max_inflated_bytes=100)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no external term"),
        (b"\x83", "no external term"),
        (b"\x82a\1", "no external term"),
        (b"\x83a\1a", "after the term"),
        (b"\x83\xff", "unknown tag"),
        (b"\x83h\1y\0", "unknown tag"),
        (b"\x83h\1P\0\0\0\0", "unknown tag"),
        (b"\x83h\1\x83a\1", "unknown tag"),
        (b"\x83R\0", "atom cache reference"),
        (b"\x83F\x7f\xf0\0\0\0\0\0\0", "finite"),
        (b"\x83F\x7f\xf8\0\0\0\0\0\0", "finite"),
        (b"\x83c" + b"abc".ljust(31, b"\0"), "no number"),
        (b"\x83c" + b"inf".ljust(31, b"\0"), "finite"),
        (b"\x83w\x02\xff\xff", "utf-8"),
        (b"\x83v\x01\x00" + b"a" * 256, "256 characters"),
        (b"\x83d\x01\x00" + b"a" * 256, "256 characters"),
        (b"\x83Z\0\0w\1a\0\0\0\1", "0 words"),
        (b"\x83Z\0\6w\1a" + b"\0" * 28, "6 words"),
        (b"\x83Xa\1" + b"\0" * 12, "where an atom must be"),
        (b"\x83qw\1mw\1fb\0\0\0\2", "arity"),
        (b"\x83M\0\0\0\1\x09\0", "9 bits"),
        (b"\x83M\0\0\0\1\0\0", "0 bits"),
        (b"\x83p\0\0\0\1", "fun of 1"),
        (b"\x83u\0\0\0\0", "unknown tag"),
    ],
)
def test_bad_bytes_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(DecodeError, match=match):
        etf.decode(data)


def test_identifiers_are_values() -> None:
    pid, same, other = Pid("a@b", 1, 2, 3), Pid(Atom("a@b"), 1, 2, 3), Pid("a@b", 1, 2, 4)
    assert pid == same != other
    assert {pid: 1}[same] == 1
    assert hash(pid) == hash(same)
    assert pid != Ref("a@b", 3, (1,))
    assert (pid == 5) is False
    assert (pid.node, pid.id, pid.serial, pid.creation) == ("a@b", 1, 2, 3)
    with pytest.raises(AttributeError, match="immutable"):
        pid.id = 7
    with pytest.raises(AttributeError, match="immutable"):
        del pid.id
    assert str(Ref("a@b", 3, (1, 2))) == "#Ref<a@b.1.2>"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pid("a@b", 2**32, 0, 0),
        lambda: Pid("a@b", -1, 0, 0),
        lambda: Ref("a@b", 1, ()),
        lambda: Ref("a@b", 1, (1,) * 6),
        lambda: Ref("a@b", 2**32, (1,)),
    ],
)
def test_identifiers_out_of_range_cannot_be_made(make: object) -> None:
    assert callable(make)
    with pytest.raises(EncodeError):
        make()


def test_the_memos_are_bounded_and_never_mix_terms_up() -> None:
    for number in range(20_000):
        name = Atom(f"n{number}")
        pid = Pid("a@b", number, 0, 1)
        assert etf.decode(etf.encode((name, pid))) == (name, pid)
    from bridge import etf_decode, etf_encode

    for memo in (etf_decode._atoms, etf_decode._identifiers, etf_encode._atom_wires):
        assert len(memo) <= etf_encode.MAX_CACHED


def test_improper_lists_keep_their_tail() -> None:
    alias = ImproperList((Atom("alias"),), Ref("a@b", 1, (1, 2, 3)))
    assert etf.decode(etf.encode([alias])) == [alias]


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**33), 2**33) | st.integers(0, 300),
            st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 300),
        ),
        max_size=20,
    )
)
def test_pairs_of_numbers_survive_and_fail_as_all_else(pairs: list[tuple[int, float]]) -> None:
    data = etf.encode(pairs)
    assert etf.decode(data) == pairs
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            etf.decode(data[:cut])


@pytest.mark.parametrize("head", [b"\x83h\x01h\x02b\0\0\1\0F", b"\x83h\x01h\x02a\1F"])
def test_a_pair_with_a_float_that_is_no_number_is_refused(head: bytes) -> None:
    for bits in (b"\x7f\xf8", b"\x7f\xf0", b"\xff\xf0"):
        with pytest.raises(DecodeError, match="not finite"):
            etf.decode(head + bits + bytes(6))
