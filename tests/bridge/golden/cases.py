"""The terms of the golden vectors: Erlang expression, and the term it must decode to.

`record.py` writes what stock nodes make of the expressions to ``etf.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge.term import Atom, BitBinary, Export, ImproperList, MapPairs, Pid, Port, Ref, Term

_NODE = "n\u00f6de@127.0.0.1"


@dataclass(frozen=True)
class Case:
    """``exact``: our encoding of ``term`` is the bytes of the newest release."""

    name: str
    tag: int  # of the outermost term
    expression: str  # evaluates to a binary
    term: Term
    exact: bool = True


def _plain(name: str, tag: int, expression: str, term: Term) -> Case:
    return Case(name, tag, f"term_to_binary({expression})", term)


def _identifier(name: str, tag: int, wire: bytes, term: Term) -> Case:
    """Identifiers of another node: the emulator reads ours and writes its own form."""
    data = ",".join(map(str, b"\x83" + wire))
    return Case(name, tag, f"term_to_binary(binary_to_term(<<{data}>>))", term)


_LONG_ATOM = "\u00e5" * 200  # 400 bytes of UTF-8
_LATIN_ATOM = "h\u00e9llo"

CASES = [
    _plain("small_integer", 97, "255", 255),
    _plain("integer", 98, "256", 256),
    _plain("integer_negative", 98, "-1", -1),
    _plain("integer_lowest", 98, "-2147483648", -(2**31)),
    _plain("small_big", 110, "2147483648", 2**31),
    _plain("small_big_negative", 110, "-2147483649", -(2**31) - 1),
    _plain("small_big_widest", 110, "(1 bsl 2040) - 1", 2**2040 - 1),
    _plain("large_big", 111, "1 bsl 2040", 2**2040),
    _plain("large_big_negative", 111, "-(1 bsl 2048) - 7", -(2**2048) - 7),
    _plain("new_float", 70, "1.5", 1.5),
    _plain("new_float_tiny", 70, "-5.0e-324", -5.0e-324),
    Case("float", 99, "term_to_binary(1.0e-3, [{minor_version, 0}])", 0.001, exact=False),
    _plain("small_atom_utf8", 119, "'\\x{20ac}uro'", Atom("\u20acuro")),
    Case("atom", 100, "term_to_binary(hello, [{minor_version, 1}])", Atom("hello"), exact=False),
    Case(
        "atom_latin1",
        100,
        f"term_to_binary('{_LATIN_ATOM}', [{{minor_version, 1}}])",
        Atom(_LATIN_ATOM),
        exact=False,
    ),
    Case(
        "small_atom_utf8_latin1",
        119,
        f"term_to_binary('{_LATIN_ATOM}', [{{minor_version, 2}}])",
        Atom(_LATIN_ATOM),
    ),
    Case(
        "atom_utf8",
        118,
        "term_to_binary(list_to_atom(lists:duplicate(200, 16#e5)), [{minor_version, 2}])",
        Atom(_LONG_ATOM),
    ),
    Case("true", 119, "term_to_binary(true, [{minor_version, 2}])", True),
    Case("false", 119, "term_to_binary(false, [{minor_version, 2}])", False),
    Case("undefined", 119, "term_to_binary(undefined, [{minor_version, 2}])", Atom("undefined")),
    Case("empty_atom", 119, "term_to_binary('', [{minor_version, 2}])", Atom("")),
    _plain("nil", 106, "[]", []),
    _plain("string", 107, '"abc"', [97, 98, 99]),
    _plain("string_longest", 107, "lists:duplicate(65535, 7)", [7] * 65535),
    _plain("list_past_string", 108, "lists:duplicate(65536, 7)", [7] * 65536),
    _plain("list", 108, "[1, 1000, [], <<>>]", [1, 1000, [], b""]),
    _plain("list_of_integers", 108, "[256, 70000, 2147483647]", [256, 70000, 2147483647]),
    _plain("list_improper", 108, "[1, 2 | 3]", ImproperList((1, 2), 3)),
    _plain("list_improper_binary", 108, "[1 | <<2>>]", ImproperList((1,), b"\x02")),
    _plain("small_tuple", 104, "{1, {}, {2}}", (1, (), (2,))),
    _plain("large_tuple", 105, "list_to_tuple(lists:duplicate(256, []))", ([],) * 256),
    _plain("binary", 109, "<<0, 255>>", b"\x00\xff"),
    _plain("bit_binary", 77, "<<1, 5:3>>", BitBinary(b"\x01\xa0", 3)),
    _plain("map_empty", 116, "#{}", {}),
    _plain("map", 116, "#{1 => <<2>>}", {1: b"\x02"}),
    _plain("map_colliding", 116, "#{1 => 2, 1.0 => 3}", MapPairs(((1, 2), (1.0, 3)))),
    _plain("map_key_list", 116, "#{[1] => 2}", MapPairs((([1], 2),))),
    _identifier(
        "new_pid", 88, Pid(_NODE, 10, 3, 77).wire, Pid(_NODE, 10, 3, 77)
    ),
    _identifier(
        "new_pid_v4", 88, Pid(_NODE, 2**32 - 1, 2**32 - 1, 2**32 - 1).wire,
        Pid(_NODE, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    ),
    _identifier("port", 120, Port(_NODE, 9, 77).wire, Port(_NODE, 9, 77)),  # 89 on OTP 25
    _identifier("v4_port", 120, Port(_NODE, 2**28, 77).wire, Port(_NODE, 2**28, 77)),
    _identifier(
        "newer_reference", 90, Ref(_NODE, 77, (5, 6, 7)).wire, Ref(_NODE, 77, (5, 6, 7))
    ),
    _identifier(
        "newer_reference_5_words", 90, Ref(_NODE, 77, (5, 6, 7, 8, 9)).wire,
        Ref(_NODE, 77, (5, 6, 7, 8, 9)),
    ),
    Case(
        "export", 113, "term_to_binary(fun lists:map/2, [{minor_version, 2}])",
        Export(Atom("lists"), Atom("map"), 2),
    ),
    Case(
        "compressed", 80, "term_to_binary(lists:duplicate(300, 1), [compressed])", [1] * 300,
        exact=False,
    ),
]  # fmt: skip
