"""The pure parts: chunks, offers, parts asked for, who fetches what, what goes for room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.etf import decode, encode
from bridge.term import Atom, Term
from control.errors import QuotaExceeded, UnknownNode
from control.load_options import MeshShape
from control.node_names import pick_node
from control.peer_files import chunks
from control.peer_files.board import LONG_S, Board, Run
from control.peer_files.chunks import CHUNK_BYTES
from control.peer_files.offer import Offer, offer_of, offer_term
from control.peer_files.part import HEADER, WHOLE, Part, ShardOf, part_of, part_term
from control.store_room import Holding, Room, choose_to_go

SIZES = st.integers(0, 5 * CHUNK_BYTES)


@given(size=SIZES, cuts=st.lists(SIZES, min_size=2, max_size=2))
def test_touched_chunks_cover_a_range_and_covered_ones_lie_inside(
    size: int, cuts: list[int]
) -> None:
    start, stop = sorted(min(cut, size) for cut in cuts)
    touched = chunks.touched([(start, stop)], size)
    covered = chunks.covered([(start, stop)] if start < stop else [], size)
    assert covered <= set(touched)
    assert all(0 <= n < chunks.num_chunks(size) for n in touched)
    if start < stop:
        first, last = chunks.as_ranges(touched, size)[0], chunks.as_ranges(touched, size)[-1]
        assert first[0] <= start
        assert last[1] >= stop
        assert chunks.covered(chunks.as_ranges(touched, size), size) == set(touched)


def test_rows_are_no_longer_than_asked() -> None:
    assert chunks.rows_of([5, 1, 2, 3, 9]) == [range(1, 4), range(5, 6), range(9, 10)]
    assert chunks.rows_of(range(5), 2) == [range(2), range(2, 4), range(4, 5)]


OFFER = Offer(
    id="/x/m.gguf",
    main="m.gguf",
    files=(("a/b.json", 3), ("m.gguf", 5 * CHUNK_BYTES)),
    fingerprint="f" * 32,
    header={"m.gguf": ((0, 100), (200, 300))},
    have={"m.gguf": ((0, CHUNK_BYTES),)},
    doors=(("127.0.0.1", 4000), ("fe80::1", 5)),
    tokens=(b"t" * 32,),
)


def over_the_wire(term: Term) -> Term:
    return decode(encode(term))


def test_an_offer_travels() -> None:
    assert offer_of(over_the_wire(offer_term(OFFER))) == OFFER
    assert "ttt" not in repr(OFFER)


BAD_NAMES = ["", "/etc/passwd", "../x", "a/../b", "a\\b", "c:x", ".hidden", "a//b", "a/", "x\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    term: dict[Any, Term] = offer_term(OFFER)
    term[Atom("files")] = [(name, 3), ("m.gguf", 5 * CHUNK_BYTES)]
    with pytest.raises(ValueError, match="not taken"):
        offer_of(over_the_wire(term))


@given(name=st.text(max_size=40))
def test_whatever_name_is_taken_stays_inside(name: str) -> None:
    term: dict[Any, Term] = offer_term(OFFER)
    term[Atom("files")] = [(name, 3), ("m.gguf", 5 * CHUNK_BYTES)]
    try:
        found = offer_of(term)
    except (ValueError, UnicodeError):
        return
    root = Path("/root/files")
    for taken, _ in found.files:
        assert (root / taken).is_relative_to(root)
        assert ".." not in Path(taken).parts


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_bytes": 5},
        {"main": "other"},
        {"header": {"none": [(0, 1)]}},
        {"have": {"m.gguf": [(0, 6 * CHUNK_BYTES)]}},
        {"header": {"m.gguf": [(5, 5)]}},
        {"doors": [("h", 0)]},
        {"files": 3},
        {"files": [("m.gguf", -1)]},
    ],
)
def test_offers_that_cannot_be(change: dict[str, Any]) -> None:
    term: dict[Any, Term] = offer_term(OFFER)
    term.update({Atom(key): value for key, value in change.items()})
    with pytest.raises(ValueError, match=r"."):
        offer_of(over_the_wire(term))


PARTS = [
    WHOLE,
    HEADER,
    Part("ranges", {"m": ((0, 5), (7, 9))}),
    Part("shard", shards=(ShardOf(MeshShape(2, 2, (1.0, 2.0, 3.0, 4.0)), 3, "across"),)),
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_travels(part: Part) -> None:
    again = part_of(over_the_wire(part_term(part)))
    assert again == part
    assert again.key == part.key


def test_parts_differ_by_their_keys() -> None:
    assert len({part.key for part in PARTS}) == len(PARTS)


def all_of(_name: str, _chunk: int) -> bool:
    return True


def test_a_board_gives_everything_out_once_and_then_what_is_under_way_again() -> None:
    clock = [0.0]
    board = Board({"f": range(40)}, now_s=lambda: clock[0])
    runs = [board.take(peer, all_of) for peer in "aba"]
    assert [run.count for run in runs if run] == [16, 16, 8]
    assert board.take("b", all_of) is None  # not for long enough
    clock[0] += LONG_S
    again = board.take("b", all_of)
    assert again is not None
    assert again in (runs[0], runs[2])  # never what b has under way itself
    assert runs[1] is not None
    board.done(runs[1], "b")
    for run in (runs[0], runs[2]):
        assert run is not None
        board.done(run, "a")
    assert board.is_empty()
    board.done(again, "b")  # brought twice: nothing happens


def test_a_bad_chunk_is_not_asked_of_the_same_peer_again() -> None:
    board = Board({"f": range(4)})
    run = board.take("a", all_of)
    assert run == Run("f", 0, 4)
    board.done(run, "a", bad=[2])
    assert board.take("a", all_of) is None
    assert board.is_hopeless("a", all_of)
    assert not board.is_hopeless("b", all_of)
    assert board.take("b", all_of) == Run("f", 2, 1)


def test_a_run_is_cut_to_what_a_peer_has() -> None:
    board = Board({"f": range(10)})
    assert board.take("a", lambda _, chunk: 3 <= chunk < 6) == Run("f", 3, 3)
    assert board.take("a", lambda _, chunk: 3 <= chunk < 6) is None
    found = {board.take("b", all_of) for _ in range(3)}
    assert {run for run in found if run} == {Run("f", 0, 3), Run("f", 6, 4)}


def test_machines_begin_at_different_places() -> None:
    board = Board({"f": range(64)}, begin=0.5)
    assert [board.take("a", all_of) for _ in range(4)] == [
        Run("f", first, 16) for first in (32, 48, 0, 16)
    ]


def test_a_slow_peer_is_asked_for_less() -> None:
    board = Board({"f": range(10)})
    assert board.take("a", all_of, 3) == Run("f", 0, 3)
    assert board.take("b", all_of) == Run("f", 3, 7)
    board.give_back(Run("f", 3, 7), "b")
    assert board.take("c", all_of, 4) == Run("f", 3, 4)


def test_what_is_given_back_is_given_out_again() -> None:
    board = Board({"f": range(4)})
    run = board.take("a", all_of)
    assert run is not None
    board.give_back(run, "a")
    assert board.take("a", all_of) == run


HELD = [
    Holding(name, name, size, used) for name, size, used in (("a", 5, 3), ("b", 5, 1), ("c", 5, 2))
]


@pytest.mark.parametrize(
    ("need", "room", "keep", "gone"),
    [
        (5, 5, "", ""),
        (6, 5, "", "b"),
        (11, 5, "", "bc"),
        (6, 5, "b", "c"),
        (21, 5, "", None),
        (6, 5, "abc", None),
        (1, -9, "", "bc"),
    ],
)
def test_what_was_used_longest_ago_goes_first(
    need: int, room: int, keep: str, gone: str | None
) -> None:
    found = choose_to_go(HELD, need, room, keep)
    assert (None if found is None else "".join(one.id for one in found)) == gone


@given(need=st.integers(0, 20), room=st.integers(-5, 10), keep=st.sets(st.sampled_from("abc")))
def test_no_more_goes_than_has_to(need: int, room: int, keep: set[str]) -> None:
    gone = choose_to_go(HELD, need, room, keep)
    if gone is not None:
        assert need <= room + sum(one.size_bytes for one in gone)
        assert not {one.folder for one in gone} & keep
        assert not gone or need > room + sum(one.size_bytes for one in gone[:-1])


def test_two_fetches_do_not_count_on_the_same_room(tmp_path: Path) -> None:
    removed: list[str] = []

    def remove(folder: str) -> bool:
        removed.append(folder)
        return True

    room = Room(tmp_path, 20, holdings=lambda: HELD, remove=remove)
    with room.fetching("x"):
        room.make("x", 4, set)
        with room.fetching("y"), pytest.raises(QuotaExceeded, match="models take"):
            room.make("y", 15, lambda: {"a"})
    assert removed == []
    room.make("y", 5, lambda: {"a"})
    room.make("z", 9, lambda: {"b"})
    assert removed == ["c"]


def test_a_node_is_meant_by_its_name_or_host() -> None:
    known = ["phalanx@n1", "phalanx@n2", "other@n2"]
    assert pick_node("phalanx@n2", known) == "phalanx@n2"
    assert pick_node("N1", known) == "phalanx@n1"
    assert pick_node("other", known) == "other@n2"
    for name in ("n2", "phalanx", "n3", ""):
        with pytest.raises(UnknownNode, match="up are"):
            pick_node(name, known)
