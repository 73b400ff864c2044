"""Who is up, by beats alone; the whole of it under fire is in ``tests/sim``."""

from __future__ import annotations

import pytest

from bridge import etf
from control.membership_rule import (
    AskFacts,
    Beat,
    Cut,
    Down,
    Limits,
    NewFacts,
    Peer,
    Up,
    beat_of,
    beat_term,
    check,
    connected,
    disconnected,
    on_beat,
)

LIMITS = Limits()
FACTS = {b"cores": 2}


def test_a_peer_is_up_from_its_first_beat_until_its_connection_ends() -> None:
    peer = connected(10.0)
    assert disconnected(peer) == ()
    peer, actions = on_beat(peer, Beat(7, 1, FACTS), 10.1)
    assert actions == (Up(), NewFacts(FACTS))
    assert on_beat(peer, Beat(7, 1), 11.0) == (Peer(11.0, 7, 1), ())
    assert disconnected(peer) == (Down("its connection ended"),)


def test_another_incarnation_is_another_peer() -> None:
    peer, _ = on_beat(connected(0.0), Beat(7, 1, FACTS), 0.0)
    peer, actions = on_beat(peer, Beat(8, 1), 1.0)
    assert actions == (Down("it has started again"), Up(), AskFacts())
    assert on_beat(peer, Beat(8, 1), 2.0)[1] == (AskFacts(),)  # until they come


@pytest.mark.parametrize(
    ("now_s", "checked_s", "down"),
    [
        (3.0, 2.75, False),
        (3.1, 2.85, True),
        (9.0, 2.75, False),  # we were late: its beats may be in our mailbox
        (9.25, 9.0, True),  # they were not
    ],
)
def test_three_seconds_of_silence_that_we_have_listened_to(
    now_s: float, checked_s: float, down: bool
) -> None:
    peer, _ = on_beat(connected(0.0), Beat(7, 1, FACTS), 0.0)
    actions = check(peer, now_s, checked_s, LIMITS)
    assert actions == ((Down(f"silent for {now_s:.1f} s"), Cut()) if down else ())


def test_who_never_beats_is_cut_without_having_been_up() -> None:
    assert check(connected(0.0), 3.1, 2.9, LIMITS) == (Cut(),)


@pytest.mark.parametrize("beat", [Beat(7, 1), Beat(7, 2, {b"cores": 2})])
def test_beats_are_plain_terms(beat: Beat) -> None:
    assert beat_of(etf.decode(etf.encode(beat_term(beat)))) == beat
    with pytest.raises(ValueError, match="not a beat"):
        beat_of(("beat", 1))
