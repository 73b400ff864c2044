"""The codec against bytes recorded from stock OTP 28 and OTP 25."""

from __future__ import annotations

import pytest

from bridge import etf
from bridge.term import Atom, BitBinary, Export, Fun, LocalTerm, Pid, Port, Ref, Term
from tests.bridge.golden.cases import CASES, Case
from tests.bridge.golden.record import OPAQUE, load

RECORDED = load()
VECTORS = [
    pytest.param(case, release, data, id=f"{case.name}-{release}")
    for case in CASES
    for release, data in RECORDED[case.name].items()
]


@pytest.mark.parametrize(("case", "release", "data"), VECTORS)
def test_recorded_bytes_decode_to_the_term(case: Case, release: str, data: bytes) -> None:
    found = etf.decode(data)
    assert found == case.term
    assert type(found) is type(case.term)


@pytest.mark.parametrize(
    ("case", "data"),
    [pytest.param(c, RECORDED[c.name]["otp28"], id=c.name) for c in CASES if c.exact],
)
def test_terms_encode_to_what_otp_28_writes(case: Case, data: bytes) -> None:
    assert data[1] == case.tag
    assert etf.encode(case.term) == data


@pytest.mark.parametrize(("name", "kind"), [("new_fun", Fun), ("local", LocalTerm)])
def test_opaque_terms_are_given_back_bit_for_bit(name: str, kind: type) -> None:
    assert name in OPAQUE
    for data in RECORDED[name].values():
        found = etf.decode(data)
        assert type(found) is kind
        assert etf.encode(found) == data


def test_every_case_is_recorded_and_every_tag_of_otp_is_a_case() -> None:
    assert {case.name for case in CASES} | set(OPAQUE) == set(RECORDED)
    assert all("otp28" in found for found in RECORDED.values())
    seen = {found["otp28"][1] for found in RECORDED.values()} | {
        found["otp25"][1] for found in RECORDED.values() if "otp25" in found
    }
    written_by_otp = {
        *(70, 77, 80, 88, 89, 90, 97, 98, 99, 100, 104, 105, 106, 107, 108),
        *(109, 110, 111, 112, 113, 116, 118, 119, 120, 121),
    }
    assert seen >= written_by_otp


# Tags that no supported release writes any more, spelled out after the documentation.
NODE = b"s\x03a@b"
OLD = [
    pytest.param(b"s\x02\xe9\xe8", Atom("éè"), id="small_atom_latin1"),
    pytest.param(b"g" + NODE + bytes([0, 0, 0, 9, 0, 0, 0, 8, 3]), Pid("a@b", 9, 8, 3), id="pid"),
    pytest.param(b"f" + NODE + bytes([0, 0, 0, 9, 3]), Port("a@b", 9, 3), id="port"),
    pytest.param(b"Y" + NODE + bytes([0, 0, 0, 9, 0, 0, 0, 3]), Port("a@b", 9, 3), id="new_port"),
    pytest.param(b"e" + NODE + bytes([0, 0, 0, 9, 3]), Ref("a@b", 3, (9,)), id="reference"),
    pytest.param(
        b"r\x00\x02" + NODE + bytes([3, 0, 0, 0, 9, 0, 0, 0, 8]),
        Ref("a@b", 3, (9, 8)),
        id="new_reference",
    ),
    pytest.param(b"l\x00\x00\x00\x00j", [], id="list_of_none"),
    pytest.param(b"l\x00\x00\x00\x01a\x01l\x00\x00\x00\x01a\x02j", [1, 2], id="list_as_tail"),
    pytest.param(b"n\x01\x00\x05", 5, id="small_big_that_is_small"),
    pytest.param(b"M\x00\x00\x00\x01\x08\x05", b"\x05", id="bit_binary_of_whole_bytes"),
    pytest.param(b"M\x00\x00\x00\x01\x03\xff", BitBinary(b"\xe0", 3), id="bit_binary_unmasked"),
    pytest.param(b"qd\x00\x01ms\x01fa\x02", Export(Atom("m"), Atom("f"), 2), id="export_old_atoms"),
]


@pytest.mark.parametrize(("wire", "term"), OLD)
def test_old_and_unusual_forms_are_read(wire: bytes, term: Term) -> None:
    assert etf.decode(b"\x83" + wire) == term


def test_atom_cache_references_are_read_from_the_table() -> None:
    pid = Pid("a@b", 1, 2, 3)
    wire = b"h\x02R\x01X" + b"R\x00" + pid.wire[6:]
    table = [Atom("a@b"), True]
    assert etf.decode_term(wire, 0, table) == ((True, pid), len(wire))


def test_a_fun_inside_a_packet_with_an_atom_table_is_spelled_out() -> None:
    (spelled, *_) = RECORDED["new_fun"].values()
    plain = etf.decode(spelled)
    module = b"w\x08erl_eval"
    assert plain.raw.count(module) >= 1
    short = plain.raw[4:].replace(module, b"R\x00")
    wire = b"p" + (len(short) + 4).to_bytes(4, "big") + short
    found, end = etf.decode_term(wire, 0, [Atom("erl_eval")])
    assert end == len(wire)
    assert found == plain
