"""Events reach every node once and in order, whatever is lost on the way."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from bridge.etf import decode, encode
from bridge.term import Atom
from control.gossip import (
    MAX_AHEAD,
    MAX_KEPT,
    MAX_ORIGINS,
    Book,
    Event,
    Want,
    digest_of,
    event_of,
    event_term,
)


def event(number: int, origin: str = "a", incarnation: int = 1) -> Event:
    return Event(origin, incarnation, number, float(number), "kind", {})


def numbers(events: list[Event]) -> list[int]:
    return [one.number for one in events]


def test_what_comes_in_order_is_news_at_once() -> None:
    book = Book("b", 1)
    assert numbers(book.take(event(1))[0]) == [1]
    assert numbers(book.take(event(2))[0]) == [2]
    assert book.take(event(2)) == ([], None)


def test_a_hole_is_asked_for_and_then_all_is_news_in_order() -> None:
    origin, book = Book("a", 1), Book("b", 1)
    told = [origin.write("kind", {}, float(i)) for i in range(4)]
    book.take(told[0])
    news, want = book.take(told[3])
    assert (news, want) == ([], Want("a", 1, 2, 3))
    assert want is not None
    given_ = origin.give(want)
    assert given_ is not None
    assert numbers(book.take_given(given_)) == [2, 3, 4]


def test_a_digest_finds_what_was_lost_at_the_end() -> None:
    origin, book = Book("a", 1), Book("b", 1)
    for i in range(3):
        origin.write("kind", {}, float(i))
    assert book.lacks(origin.digest()) == [Want("a", 1, 1, 3)]
    assert origin.lacks(book.digest()) == []


def test_what_nobody_has_any_more_is_skipped() -> None:
    origin, book = Book("a", 1), Book("b", 1)
    for i in range(MAX_KEPT + 50):
        origin.write("kind", {}, float(i))
    (want,) = book.lacks(origin.digest())
    given_ = origin.give(want)
    assert given_ is not None
    assert numbers(book.take_given(given_)) == list(range(51, MAX_KEPT + 51))
    assert book.lacks(origin.digest()) == []


def test_a_new_life_of_the_origin_starts_anew_and_the_old_one_is_over() -> None:
    book = Book("b", 1)
    book.take(event(1))
    assert numbers(book.take(event(1, incarnation=2))[0]) == [1]
    assert book.take(event(2, incarnation=1)) == ([], None)
    assert book.give(Want("a", 1, 1, 1)) is None


def test_a_third_node_fills_holes_of_an_origin_that_is_gone() -> None:
    third, book = Book("c", 1), Book("b", 1)
    for number in (1, 2, 3):
        third.take(event(number))
    (want,) = [w for w in book.lacks(third.digest()) if w.origin == "a"]
    given_ = third.give(want)
    assert given_ is not None
    assert numbers(book.take_given(given_)) == [1, 2, 3]


def test_memory_is_bounded() -> None:
    book = Book("b", 1)
    for number in range(2, 3 * MAX_AHEAD):
        book.take(event(number))
    assert len(book.recent(10_000)) <= MAX_KEPT
    for origin in range(MAX_ORIGINS + 10):
        book.take(event(1, origin=f"n{origin}"))
    assert len(book.digest()) <= MAX_ORIGINS


def test_our_own_events_are_nobody_elses_to_tell() -> None:
    book = Book("b", 1)
    assert book.take(event(5, origin="b")) == ([], None)
    assert book.lacks({"b": (9, 9)}) == []


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 0.9))
def test_whatever_is_lost_or_mixed_up_everything_comes_once_and_in_order(
    seed: int, count: int, loss: float
) -> None:
    rng = random.Random(seed)
    origin, book, seen = Book("a", 1), Book("b", 1), []
    sent = [origin.write("kind", {}, 0.0) for _ in range(count)]
    rng.shuffle(sent)
    for one in sent:
        if rng.random() < loss:
            continue
        news, want = book.take(one)
        seen += news
        if want is not None and rng.random() > loss:
            answer = origin.give(want)
            assert answer is not None
            seen += book.take_given(answer)
    for want in book.lacks(origin.digest()):
        answer = origin.give(want)
        assert answer is not None
        seen += book.take_given(answer)
    assert numbers(seen) == list(range(1, count + 1))


def test_events_and_digests_pass_the_wire() -> None:
    one = Event("a@h", 7, 3, 1.5, "node_up", {Atom("node"): Atom("b@h")})
    assert event_of(decode(encode(event_term(one)))) == one
    book = Book("a@h", 5)
    assert (
        digest_of(decode(encode({Atom(k): v for k, v in book.digest().items()}))) == book.digest()
    )
