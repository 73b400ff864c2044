"""When an instance may move, and who goes for whom."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.moves import (
    FIRST_WAIT_S,
    FREE_MOVES,
    GROW_EVERY_S,
    MOST_WAIT_S,
    STABLE_S,
    WINDOW_S,
    Moves,
    Tenant,
    fewest,
    victims,
)


def test_the_first_moves_are_free_and_each_further_one_waits_twice_as_long() -> None:
    moves, waits = Moves(), []
    for _ in range(FREE_MOVES + 8):
        waits.append(moves.wait_s("i", 50.0))
        moves.note_move("i", 50.0)
    doubled = [min(MOST_WAIT_S, FIRST_WAIT_S * 2**n) for n in range(8)]
    assert waits == [0.0] * FREE_MOVES + doubled
    assert moves.wait_s("other", 50.0) == 0.0
    assert moves.wait_s("i", 50.0 + WINDOW_S) == 0.0
    moves.forget("i")
    assert moves.wait_s("i", 50.0) == 0.0


@given(st.lists(st.floats(0, 60), max_size=40))
def test_who_waits_as_told_never_moves_often(pauses_s: list[float]) -> None:
    """Machines that come and go without an end cost a bounded number of moves."""
    moves, now_s, moved_s = Moves(), 0.0, list[float]()
    for pause_s in pauses_s:
        now_s += pause_s
        now_s += moves.wait_s("i", now_s)
        assert moves.wait_s("i", now_s) == pytest.approx(0.0, abs=1e-6)
        moves.note_move("i", now_s)
        moved_s.append(now_s)
    for n, first_s in enumerate(moved_s):
        inside = sum(1 for t in moved_s[n:] if t - first_s < WINDOW_S)
        assert inside <= FREE_MOVES + 7  # 5 + 10 + 20 + 40 + 80 + 120 s, and one more
    assert len(moves.moved_s.get("i", ())) <= FREE_MOVES + 7


def test_what_runs_well_moves_seldom_and_when_machines_have_settled() -> None:
    moves = Moves()
    assert moves.may_grow("i", 0.0)
    moves.note_move("i", 0.0)
    assert not moves.may_grow("i", GROW_EVERY_S - 1)
    assert moves.may_grow("i", GROW_EVERY_S)
    assert moves.settles_in_s(0.0) == 0.0
    moves.note_up("a", 3.0)
    moves.note_up("b", 5.0)
    assert moves.settles_in_s(6.0) == STABLE_S - 1
    moves.note_down("b")
    assert moves.settles_in_s(6.0) == STABLE_S - 3
    assert moves.settles_in_s(5.0 + STABLE_S) == 0.0


def tenant(
    id_: str, *, wanted: bool = False, priority: int = 0, idle_s: float = 0.0, size: int = 1
) -> Tenant:
    return Tenant(id_, "n", wanted, priority, {("n", "memory"): size}, idle_s)


def test_the_least_recently_used_goes_first_and_nobody_for_an_equal() -> None:
    busy, short, long = tenant("busy"), tenant("short", idle_s=1), tenant("long", idle_s=9)
    kept = tenant("kept", wanted=True)
    low = tenant("low", wanted=True, priority=-1, idle_s=99)
    low_demand = tenant("low-demand", priority=-2)
    everybody = [kept, busy, short, low, long, low_demand]

    def go(**newcomer: object) -> list[str]:
        return [one.id for one in victims(everybody, **newcomer)]  # type: ignore[arg-type]

    assert go(wanted=False, priority=0) == ["low-demand", "long", "short", "low"]
    assert go(wanted=True, priority=0) == ["low-demand", "long", "short", "busy", "low"]
    assert go(wanted=True, priority=1) == ["low-demand", "long", "short", "busy", "low", "kept"]
    assert go(wanted=True, priority=-2) == ["low-demand"]
    assert go(wanted=False, priority=-2) == []


TENANTS = st.builds(
    Tenant,
    st.uuids().map(str),
    st.just("n"),
    st.booleans(),
    st.integers(-2, 2),
    st.just({}),
    st.sampled_from([0.0, 1.0, 5.0]),
)


@given(st.lists(TENANTS, max_size=8), st.booleans(), st.integers(-2, 2))
def test_victims_are_never_worth_more(tenants: list[Tenant], wanted: bool, priority: int) -> None:
    going = victims(tenants, wanted=wanted, priority=priority)
    assert all(one.priority <= priority for one in going)
    assert not any(one.wanted and one.priority == priority for one in going)
    if not wanted:
        assert not any(one.priority == priority and one.idle_s == 0 for one in going)


@given(st.lists(st.integers(1, 9), max_size=7), st.integers(1, 40))
def test_no_more_go_than_have_to(sizes: list[int], needed: int) -> None:
    may_go = [tenant(f"i{n}", size=size) for n, size in enumerate(sizes)]

    def room(going: Sequence[Tenant]) -> int:
        return sum(sum(one.bytes.values()) for one in going)

    going = fewest(may_go, lambda some: room(some) >= needed)
    if sum(sizes) < needed:
        assert going == []
        return
    assert room(going) >= needed
    for one in going:
        assert room(going) - room([one]) < needed


def test_who_takes_memory_elsewhere_stays() -> None:
    """The one that was idle longest is on a machine where it does not help."""
    far, near = tenant("far", idle_s=9), tenant("near", idle_s=1)
    assert fewest([far, near], lambda going: near in going) == [near]
