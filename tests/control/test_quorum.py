"""Any two quorums share a machine, whatever the roster and however it changes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import etf
from control.quorum import (
    Roster,
    alone,
    configured,
    has_quorum,
    is_fixed,
    missing,
    propose,
    quorum_since,
    revise,
    roster_of,
    roster_term,
    settle,
    stamped,
)

NAMES = [f"n{i}@10.0.0.{i}" for i in range(7)]
some_names = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)


@st.composite
def rosters(draw: st.DrawFn) -> Roster:
    members = draw(some_names)
    roster = Roster("line", (1, 1), tuple(sorted(members)), draw(st.sampled_from(members)))
    if draw(st.booleans()):
        wanted = draw(some_names)
        roster = propose(roster, wanted, draw(st.sampled_from(wanted)), 2)
    return roster


@pytest.mark.parametrize(
    ("members", "breaker", "here", "enough"),
    [
        ("a", "", "a", True),
        ("ab", "a", "a", True),  # the documented rule for two: the tie-breaker goes on alone
        ("ab", "a", "b", False),
        ("ab", "b", "b", True),
        ("abc", "a", "a", False),
        ("abc", "a", "bc", True),
        ("abcd", "a", "ab", True),
        ("abcd", "a", "bc", False),
        ("abcd", "a", "bcd", True),
        ("abc", "a", "axyz", False),  # strangers do not count
    ],
)
def test_a_majority_or_half_with_the_tie_breaker(
    members: str, breaker: str, here: str, enough: bool
) -> None:
    assert has_quorum(configured(list(members), breaker), set(here)) is enough


def test_the_first_machine_of_the_configuration_is_the_tie_breaker() -> None:
    assert configured(["b", "a"]).tie_breaker == "b"
    assert configured(["b", "a"]).members == ("a", "b")


def test_a_tie_breaker_has_to_be_one_of_the_machines() -> None:
    with pytest.raises(ValueError, match="'c' is none of the machines"):
        configured(["a", "b"], "c")
    with pytest.raises(ValueError, match="none of the machines"):
        configured([])


def test_lineages() -> None:
    one = configured(["a", "b"], "a")
    assert one.lineage == configured(["b", "a"], "a").lineage
    assert one.lineage != configured(["a", "b"], "b").lineage
    assert is_fixed(one.lineage)
    assert one.fixed
    assert not alone("a", "0f").fixed
    assert alone("a", "0f").lineage != alone("a", "1f").lineage


@given(rosters(), st.sets(st.sampled_from(NAMES)))
def test_two_sides_never_both_have_a_quorum(roster: Roster, side: set[str]) -> None:
    assert not (has_quorum(roster, side) and has_quorum(roster, set(NAMES) - side))


@given(rosters(), some_names, st.sets(st.sampled_from(NAMES)))
def test_no_side_decides_before_a_change_while_another_does_after(
    roster: Roster, wanted: list[str], side: set[str]
) -> None:
    """Each step of a change shares a machine with the step before it."""
    other = set(NAMES) - side
    if roster.joint:
        after = [settle(roster, 3), revise(roster, wanted, 3)]
    else:
        after = [propose(roster, wanted, wanted[0], 3)]
    for step in after:
        assert step.stamp > roster.stamp
        assert not (has_quorum(roster, side) and has_quorum(step, other))


@given(rosters(), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9)))
def test_the_time_since_a_quorum_was_heard(roster: Roster, heard: dict[str, int]) -> None:
    since_s = quorum_since(roster, {n: float(t) for n, t in heard.items()})
    for t in range(10):
        assert (since_s >= t) is has_quorum(roster, {n for n, at in heard.items() if at >= t})
    if not has_quorum(roster, heard.keys()):
        assert since_s == -math.inf


@given(rosters())
def test_a_roster_survives_the_wire(roster: Roster) -> None:
    assert roster_of(etf.decode(etf.encode(roster_term(roster)))) == roster


@pytest.mark.parametrize("bad", [(), 7, ("a", 1), ("l", (1, 2), [], "b", [], "")])
def test_no_roster(bad: object) -> None:
    with pytest.raises(ValueError, match="not a roster"):
        roster_of(bad)


def test_a_fixed_roster_is_not_stamped() -> None:
    fixed = configured(["a", "b", "c"])
    assert stamped(fixed, 9) is fixed


def test_people_are_told_what_is_missing() -> None:
    text = missing(configured(["a", "b", "c", "d"]), {"b"})
    assert text == ("1 of 4 machines are here, 3, or 2 with a are needed; missing: a, c, d")
    assert missing(configured(["a"]), {"a"}) == ""
